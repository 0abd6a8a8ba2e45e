"""Animations of images: GIF files, and HTML pages with a player."""

import io
import math
import re
from pathlib import Path
from string import Template
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from diffusion_jax.files import FilePath, write_atomically
from diffusion_jax.pictures.sheets import FRAMES, RAMP, lay_out, pixels_of
from diffusion_jax.typing import require

COLOURS = 240  # of a GIF's 256; the other 16 are every 17th colour of the ramp
LAST_FRAME = 2000  # its milliseconds
PLAYER = Path(__file__).with_name("player.css")
PAGE = Path(__file__).with_name("page.html")


def gif_bytes(
    frames: ArrayLike, fps: float | int = 5, scaling: str = "clip", **layout: Any
) -> bytes:
    """Animate frames (frame, batch, height, width, channel), laid out as by `grid`, as a GIF.

    It loops, and shows the last frame for 2 seconds. Up to 240 colours are exact. More colours are
    reduced without dithering; in the choice of the palette, the last frame counts as much as all
    others together.
    """
    interval = _interval(fps)
    palette, indices = _palette(pixels_of("frames", frames, FRAMES, scaling))
    ramp = (COLOURS + np.arange(256) // 16).astype(np.uint8)[:, None]
    first, *others = [Image.fromarray(lay_out(frame, ramp, **layout)[..., 0]) for frame in indices]
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

    The HTML is a fragment for a notebook or a page. It holds every frame and fetches nothing.
    """
    import matplotlib
    from matplotlib.animation import FuncAnimation
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    interval = _interval(fps)
    sheets = [lay_out(f, RAMP, **layout) for f in pixels_of("frames", frames, FRAMES, scaling)]
    height, width = sheets[0].shape[:2]
    figure = Figure(figsize=(width / 64, height / 64), dpi=64)  # with 64, sizes in inches are exact
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    artist = axes.imshow(sheets[0], interpolation="nearest", aspect="auto")
    movie = FuncAnimation(figure, artist.set_data, sheets, interval=interval)
    # Whatever the user's settings, keep whole figures, pixel for pixel, and every frame.
    settings = {"savefig.dpi": "figure", "savefig.bbox": None, "animation.embed_limit": math.inf}
    with matplotlib.rc_context(cast(Any, settings)):
        player = movie.to_jshtml()
    return f"<style>{PLAYER.read_text()}</style>" + re.sub(r"<link[^>]*>", "", player)


def save_gif(path: FilePath, frames: ArrayLike, fps: float | int = 5, **options: Any) -> None:
    """Write the GIF of `gif_bytes` to a file. options: those of gif_bytes."""
    write_atomically(path, gif_bytes(frames, fps, **options))


def save_html(path: FilePath, frames: ArrayLike, fps: float | int = 5, **options: Any) -> None:
    """Write the player of `animation_html` as a page in one file. options: its options."""
    player = animation_html(frames, fps, **options)
    write_atomically(path, Template(PAGE.read_text()).substitute(player=player).encode())


def _interval(fps: float | int) -> int:
    """Return the milliseconds of a frame, at least 20: browsers slow faster GIFs down."""
    require(0 < fps <= 50, f"fps={fps}: it must be above 0, at most 50")
    return round(1000 / fps)


def _palette(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a palette (256, 3), and uint8 indices (F, B, h, w, 1) of frames (F, B, h, w, 3)."""
    weighted = np.concatenate([frames, frames[-1:].repeat(len(frames), 0)])
    strip = Image.fromarray(weighted.reshape(-1, frames.shape[-2], 3))
    reduced = strip.quantize(COLOURS, Image.Quantize.MEDIANCUT)
    palette = np.zeros((256, 3), np.uint8)
    colours = np.array(reduced.getpalette(), np.uint8).reshape(-1, 3)[:COLOURS]
    palette[: len(colours)] = colours
    palette[COLOURS:] = RAMP[::17]
    return palette, np.asarray(reduced).reshape(*weighted.shape[:-1], 1)[: len(frames)]
