"""Draw contact sheets, in which labelled images stand side by side, and write PNG files."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFont

from diffusion_jax.files import FilePath, write_atomically
from diffusion_jax.spec import choose
from diffusion_jax.typing import require

GROUND, INK, ACCENT = "#eeeeea", "#2c2e34", "#2f6db5"
# The colour of text by its coverage, 0..255, from the background to the ink.
RAMP = np.linspace(ImageColor.getrgb(GROUND), ImageColor.getrgb(INK), 256).round().astype(np.uint8)
FRAMES = ("frame", "batch", "height", "width", "channel")


def _clip(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, -1, 1) + 1) / 2


def _stretch(images: np.ndarray) -> np.ndarray:
    low = images.min((-3, -2, -1), keepdims=True)
    span = images.max((-3, -2, -1), keepdims=True) - low
    return np.where(span > 0, (images - low) / np.where(span > 0, span, 1), 0.5)


SCALINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"clip": _clip, "per_image": _stretch}


def to_uint8(images: ArrayLike, scaling: str = "clip") -> np.ndarray:
    """Turn images (..., height, width, 1 or 3) into uint8 RGB (..., height, width, 3).

    "clip" clips to [-1, 1] and maps this range to 0..255, so that equal values look equal.
    "per_image" maps each image's own minimum..maximum to 0..255, and a constant image to mid-grey.
    """
    return pixels_of("images", images, ("...", "height", "width", "channel"), scaling)


def grid(images: ArrayLike, scaling: str = "clip", **layout: Any) -> np.ndarray:
    """Lay out images (batch, height, width, channel), row by row, as one picture.

    layout: `columns`, by default 8, or more to make a square of over 64 images; `scale`, the side
    of the block that shows a pixel, by default 6 for 16x16 images; `labels`, one for each row,
    which determine the columns if these are not given; `title`. No text is cut.
    """
    return lay_out(pixels_of("images", images, FRAMES[1:], scaling), RAMP, **layout)


class Rows(NamedTuple):
    """Images in rows of at most `most` columns. Each name starts a new row.

    counts: how many images each name has, in the order of the images.
    """

    counts: Mapping[str, int]
    most: int = 16

    @property
    def columns(self) -> int:
        """Return the number of columns of the picture."""
        return min(self.most, max(self.counts.values())) if len(self.counts) > 1 else 8

    def arrange(self, images: np.ndarray) -> np.ndarray:
        """Insert white images so that the images of each name fill whole rows."""
        parts = np.split(images, np.cumsum(list(self.counts.values()))[:-1])
        fill = (np.ones((-len(part) % self.columns, *images.shape[1:])) for part in parts)
        return np.concatenate([one for pair in zip(parts, fill, strict=True) for one in pair])

    @property
    def labels(self) -> list[str]:
        """Return the label of each row: the name in its first row, then empty texts."""
        rows = ((name, -(-count // self.columns)) for name, count in self.counts.items())
        return [word for name, count in rows for word in [name, *[""] * (count - 1)]]


def png_bytes(pixels: ArrayLike) -> bytes:
    """Encode one picture (height, width, 1 or 3) as PNG, exactly."""
    picture = pixels_of("pixels", pixels, FRAMES[2:], "clip")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: FilePath, pixels: ArrayLike) -> None:
    """Write one picture (height, width, 1 or 3) as a PNG file."""
    write_atomically(path, png_bytes(pixels))


def pixels_of(name: str, images: ArrayLike, axes: tuple[str, ...], scaling: str) -> np.ndarray:
    """Check images and convert them to uint8 RGB. Errors name the argument `name`."""
    array = np.asarray(images)
    shape = f"{name}: shape {array.shape}"
    fits = array.ndim == len(axes) or (axes[0] == "..." and array.ndim >= 3)
    require(fits, f"{shape}: give ({', '.join(axes)})")
    require(array.shape[-1] in (1, 3), f"{shape}: the last axis must be 1 (grey) or 3 (RGB)")
    require(array.size, f"{shape} holds no pixel: give at least one image")
    scaled = choose(SCALINGS, "scaling", scaling)(_floats(name, array))
    return np.rint(255 * scaled).astype(np.uint8).repeat(3 // array.shape[-1], -1)


def _floats(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array / np.float32(127.5) - 1
    known = array.dtype.kind in "fV"  # V: bfloat16
    require(known, f"{name}: dtype {array.dtype}: give floats in [-1, 1] or uint8 in 0..255")
    floats = array.astype(np.float32)
    bad = floats.size - np.count_nonzero(np.isfinite(floats))
    require(not bad, f"{name}: {bad} of {floats.size} values are NaN or infinite: give numbers")
    return floats


def _columns(count: int, columns: int | None, labels: Sequence[str] | None) -> int:
    """Return the columns as given, else by the labels, else 8, or more for a square of many."""
    if columns is None:
        square = math.ceil(math.sqrt(count))
        columns = math.ceil(count / len(labels)) if labels else min(count, max(8, square))
    require(columns >= 1, f"columns={columns}: it must be at least 1")
    rows, given = math.ceil(count / columns), len(labels or ())
    fits = labels is None or given == rows
    require(fits, f"labels: {given} for {rows} rows of {columns}: give one for each")
    return columns


def lay_out(
    images: np.ndarray,
    ramp: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> np.ndarray:
    """Tile images (B, h, w, C) under a title and beside labels. ramp (256, C) colours the text."""
    count, height, width, _ = images.shape
    columns = _columns(count, columns, labels)
    scale = max(1, 96 // max(height, width)) if scale is None else scale
    require(scale >= 1, f"scale={scale}: it must be at least 1")
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
