"""Pictures: contact sheets, animations as GIF and as HTML, loss curves, all written atomically.

Images are arrays (..., height, width, channel) with 1 (grey) or 3 (RGB) channels: floating point,
nominally in [-1, 1], or uint8 in 0..255. A picture is one uint8 RGB array (height, width, 3).
What is wrong with an argument is said by an InputError. Matplotlib, which takes long to import, is
imported where it draws.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont

from diffusion_jax.files import FilePath, write_atomically
from diffusion_jax.typing import InputError

GROUND, INK, ACCENT = "#eeeeea", "#2c2e34", "#2f6db5"
# The colour of text by its coverage, 0..255: the ground, the ink and what is between.
RAMP = np.linspace(ImageColor.getrgb(GROUND), ImageColor.getrgb(INK), 256).round().astype(np.uint8)
COLOURS = 240  # of the 256 of a GIF; the other 16 are every 17th of the ramp
LAST_FRAME = 2000  # milliseconds
FRAMES = ("frame", "batch", "height", "width", "channel")
# The player's buttons get their glyphs from here instead of from a font on the network.
PLAYER_STYLE = r"""<style>
.animation, .animation img, .anim-slider { max-width: 100%; image-rendering: pixelated; }
.animation .anim-buttons button { width: 2.2rem; height: 2rem; }
.animation .fa { display: inline-block; font: 1rem/1 monospace; }
.fa-minus::before { content: "\2212"; } .fa-plus::before { content: "+"; }
.fa-fast-backward::before { content: "|\25C0\FE0E"; }
.fa-fast-forward::before { content: "\25B6\FE0E|"; }
.fa-step-backward::before { content: "\2039"; } .fa-step-forward::before { content: "\203A"; }
.fa-play::before { content: "\25B6\FE0E"; } .fa-flip-horizontal { transform: scaleX(-1); }
.fa-pause::before { content: "\2016"; }
</style>"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Animation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ margin: 1rem .5rem; text-align: center; background: #eeeeea; color: #2c2e34;
font: 14px system-ui, sans-serif; color-scheme: light; }}</style></head>
<body>{}</body></html>
"""


def _clip(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, -1, 1) + 1) / 2


def _stretch(images: np.ndarray) -> np.ndarray:
    low = images.min((-3, -2, -1), keepdims=True)
    span = images.max((-3, -2, -1), keepdims=True) - low
    return np.where(span > 0, (images - low) / np.where(span > 0, span, 1), 0.5)


SCALINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"clip": _clip, "per_image": _stretch}


def to_uint8(images: ArrayLike, scaling: str = "clip") -> np.ndarray:
    """Turn images (..., height, width, 1 or 3) into uint8 RGB (..., height, width, 3).

    "clip" cuts at [-1, 1] and maps that to 0..255, so that equal values look equal; "per_image"
    maps each image's own minimum..maximum to 0..255, and an image of one value to mid-grey.
    """
    return _pixels("images", images, ("...", "height", "width", "channel"), scaling)


def grid(images: ArrayLike, scaling: str = "clip", **layout: Any) -> np.ndarray:
    """Lay out images (batch, height, width, channel), row by row, as one picture.

    layout: `columns`, by default 8, or more for a square of more than 64; `scale`, the side of
    the block that an image's pixel becomes, by default 6 for 16x16 images; `labels`, one a row,
    which settle the columns too if these are not given; `title`. No text is cut.
    """
    return _sheet(_pixels("images", images, FRAMES[1:], scaling), RAMP, **layout)


def png_bytes(pixels: ArrayLike) -> bytes:
    """Encode one picture (height, width, 1 or 3) as PNG, exactly."""
    picture = _pixels("pixels", pixels, FRAMES[2:], "clip")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def gif_bytes(
    frames: ArrayLike, fps: float | int = 5, scaling: str = "clip", **layout: Any
) -> bytes:
    """Animate frames (frame, batch, height, width, channel), laid out as by `grid`, as a GIF.

    It loops, and stays on the last frame for 2 seconds. Up to 240 colours are exact; more are
    reduced, without dithering, to a palette that weighs the last frame as much as all others.
    """
    interval = _interval(fps)
    palette, indices = _palette(_pixels("frames", frames, FRAMES, scaling))
    ramp = (COLOURS + np.arange(256) // 16).astype(np.uint8)[:, None]
    first, *others = [Image.fromarray(_sheet(frame, ramp, **layout)[..., 0]) for frame in indices]
    for sheet in (first, *others):
        sheet.putpalette(palette.tobytes())
    durations = [interval] * len(others) + [LAST_FRAME]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def animation_html(
    frames: ArrayLike, fps: float | int = 5, scaling: str = "clip", **layout: Any
) -> str:
    """Animate frames (frame, batch, height, width, channel), laid out as by `grid`, in a player.

    The HTML is a fragment, for a notebook or a page, that holds every frame and fetches nothing.
    """
    import matplotlib
    from matplotlib.animation import FuncAnimation
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    interval = _interval(fps)
    sheets = [_sheet(f, RAMP, **layout) for f in _pixels("frames", frames, FRAMES, scaling)]
    height, width = sheets[0].shape[:2]
    figure = Figure(figsize=(width / 64, height / 64), dpi=64)  # 64: sizes in inches are exact
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    artist = axes.imshow(sheets[0], interpolation="nearest", aspect="auto")
    movie = FuncAnimation(figure, artist.set_data, sheets, interval=interval)
    # Whole figures, pixel for pixel, and all of them, whatever the user's own settings.
    settings = {"savefig.dpi": "figure", "savefig.bbox": None, "animation.embed_limit": math.inf}
    with matplotlib.rc_context(cast(Any, settings)):
        player = movie.to_jshtml()
    return PLAYER_STYLE + re.sub(r"<link[^>]*>", "", player)


def save_png(path: FilePath, pixels: ArrayLike) -> None:
    """Write one picture (height, width, 1 or 3) as a PNG file."""
    write_atomically(path, png_bytes(pixels))


def save_gif(path: FilePath, frames: ArrayLike, fps: float | int = 5, **options: Any) -> None:
    """Write what `gif_bytes` makes, with its options, as a file."""
    write_atomically(path, gif_bytes(frames, fps, **options))


def save_html(path: FilePath, frames: ArrayLike, fps: float | int = 5, **options: Any) -> None:
    """Write what `animation_html` makes, with its options, as a page in one file."""
    write_atomically(path, PAGE.format(animation_html(frames, fps, **options)).encode())


def loss_curve(
    path: FilePath | None, steps: ArrayLike, losses: ArrayLike, ylabel: str = "loss"
) -> bytes:
    """Draw losses (n,) over increasing steps (n,): each value thin, medians of neighbours bold.

    Returns the PNG, and writes it where a path is given. Values that are not finite are left out;
    the axis is logarithmic if all are positive and span a factor of 3.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"losses: shape {y.shape} for steps of shape {x.shape}; give (n,) twice")
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        raise InputError(f"losses: none of {y.size} values is finite; give at least one that is")
    figure = Figure(figsize=(6.4, 3), dpi=200, facecolor=GROUND, layout="constrained")
    _plot_losses(figure.add_subplot(facecolor=GROUND), x[finite], y[finite], ylabel)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    if path is not None:
        write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def _pixels(name: str, images: ArrayLike, axes: tuple[str, ...], scaling: str) -> np.ndarray:
    """Check and convert to uint8 RGB; errors call the argument by `name`."""
    array = np.asarray(images)
    if array.ndim != len(axes) and not (axes[0] == "..." and array.ndim >= 3):
        raise InputError(f"{name}: shape {array.shape}; give ({', '.join(axes)})")
    if array.shape[-1] not in (1, 3):
        raise InputError(f"{name}: shape {array.shape}; the last axis is 1 (grey) or 3 (RGB)")
    if array.size == 0:
        raise InputError(f"{name}: shape {array.shape} holds no pixel; give at least one image")
    if scaling not in SCALINGS:
        raise InputError(f"scaling: {scaling!r}; give one of {', '.join(SCALINGS)}")
    scaled = SCALINGS[scaling](_floats(name, array))
    return np.rint(255 * scaled).astype(np.uint8).repeat(3 // array.shape[-1], -1)


def _floats(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array / np.float32(127.5) - 1
    if array.dtype.kind not in "fV":  # V: bfloat16
        raise InputError(f"{name}: dtype {array.dtype}; give floats in [-1, 1] or uint8 in 0..255")
    floats = array.astype(np.float32)
    if bad := floats.size - np.count_nonzero(np.isfinite(floats)):
        raise InputError(f"{name}: {bad} of {floats.size} values are NaN or infinite; give numbers")
    return floats


def _interval(fps: float | int) -> int:
    """Milliseconds a frame; browsers slow a GIF down that asks for less than 20."""
    if not 0 < fps <= 50:
        raise InputError(f"fps: {fps}; give the frames a second, above 0 and up to 50")
    return round(1000 / fps)


def _columns(count: int, columns: int | None, labels: Sequence[str] | None) -> int:
    """Settle the columns: as given, else by the labels, else 8, or more for a square of many."""
    if columns is None:
        square = math.ceil(math.sqrt(count))
        columns = math.ceil(count / len(labels)) if labels else min(count, max(8, square))
    if columns < 1:
        raise InputError(f"columns: {columns}; give at least 1")
    rows = math.ceil(count / columns)
    if labels is not None and len(labels) != rows:
        raise InputError(f"labels: {len(labels)} for {rows} rows of {columns}; give one for each")
    return columns


def _sheet(
    images: np.ndarray,
    ramp: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> np.ndarray:
    """Tile images (B, h, w, C) on the ground, under and beside text that ramp (256, C) colours."""
    count, height, width, _ = images.shape
    columns = _columns(count, columns, labels)
    scale = max(1, 96 // max(height, width)) if scale is None else scale
    if scale < 1:
        raise InputError(f"scale: {scale}; give a whole number from 1 up")
    gap = max(1, scale // 2)
    across, down = width * scale + gap, height * scale + gap
    font = ImageFont.load_default(size := min(max(11, down // 6), 24))
    names = [" ".join(label.split()) for label in labels or ()]
    margin, space = 2 * gap + 4, size // 2
    left = margin + (math.ceil(max(map(font.getlength, names))) + space if names else 0)
    top = margin + (size + space if title else 0)
    inside = max(columns * across - gap, math.ceil(font.getlength(title)))
    bottom = top + math.ceil(count / columns) * down - gap
    text = Image.new("L", (left + inside + margin, bottom + margin))
    draw = ImageDraw.Draw(text)
    draw.text((left, margin), title, 255, font, anchor="lt")
    for row, name in enumerate(names):
        middle = top + row * down + height * scale // 2
        draw.text((left - space, middle), name, 255, font, anchor="rm")
    sheet = ramp[np.asarray(text)]
    for index, image in enumerate(images):
        y, x = top + index // columns * down, left + index % columns * across
        block = image.repeat(scale, 0).repeat(scale, 1)
        sheet[y : y + height * scale, x : x + width * scale] = block
    return sheet


def _palette(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index frames (F, B, h, w, 3): a palette (256, 3) and uint8 indices (F, B, h, w, 1)."""
    weighted = np.concatenate([frames, frames[-1:].repeat(len(frames), 0)])
    strip = Image.fromarray(weighted.reshape(-1, frames.shape[-2], 3))
    reduced = strip.quantize(COLOURS, Image.Quantize.MEDIANCUT)
    palette = np.zeros((256, 3), np.uint8)
    colours = np.array(reduced.getpalette(), np.uint8).reshape(-1, 3)[:COLOURS]
    palette[: len(colours)] = colours
    palette[COLOURS:] = RAMP[::17]
    return palette, np.asarray(reduced).reshape(*weighted.shape[:-1], 1)[: len(frames)]


def _plot_losses(axes: Any, x: np.ndarray, y: np.ndarray, ylabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    many = len(x) >= 60
    bins = np.array_split(np.arange(len(x)), min(len(x) // 10, 100) if many else len(x))
    single: dict[str, Any] = {"alpha": 0.45} if many else {"marker": "o", "ms": 3}
    axes.plot(x, y, color=ACCENT, lw=0.5, **single)
    axes.plot([x[b].mean() for b in bins], [np.median(y[b]) for b in bins], color=ACCENT, lw=1.6)
    if y.min() > 0 and y.max() > 3 * y.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(labelcolor=INK, color=INK, which="both", length=3)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
