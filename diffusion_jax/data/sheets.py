"""Data from a sprite sheet: one image with tiles in rows and columns."""

from pathlib import Path

import numpy as np
from numpy import ndarray

from diffusion_jax.data.dataset import Dataset, Source, check, hold_out
from diffusion_jax.data.frames import Channels, Fit, frame, read_picture
from diffusion_jax.data.labels import read_labels
from diffusion_jax.typing import require


def sheet(
    path: Path | None = None,
    tile: tuple[int, ...] = (16,),
    gap: int = 0,
    labels: Path | None = None,
    size: tuple[int, ...] = (0,),
    fit: Fit = "stretch",
    background: str = "white",
    channels: Channels = 3,
    held_out: float = 0.0,
) -> Source:
    """Cut an image into tiles, row by row. Tiles of one colour are left out.

    tile: the side of a tile, or height,width. gap: pixels between tiles. labels: a file with a row
    for each tile that is not left out. The other options are those of folder.
    """
    require(path, "data=sheet: give path=FILE.png")
    shape = frame(size, fit, background, channels)
    fits = len(tile) in (1, 2) and min(tile, default=0) >= 1 and gap >= 0
    require(fits, f"tile={','.join(map(str, tile))}:gap={gap}: give pixels, at least 1 for a tile")
    whole = read_picture(Path(str(path)), shape._replace(size=None))
    tiles = cut(whole, tile[0], tile[-1], gap, str(path))
    found = read_labels(str(labels or ""), len(tiles))
    return hold_out(check(Dataset(tiles, *found), str(path)), held_out, shape)


def cut(whole: ndarray, height: int, width: int, gap: int, path: str) -> ndarray:
    """Return the tiles of more than one colour, row by row: (N, height, width, channel)."""
    steps = height + gap, width + gap
    rows, columns = ((side + gap) // step for side, step in zip(whole.shape, steps, strict=False))
    fits = rows * columns and whole.shape[:2] == (rows * steps[0] - gap, columns * steps[1] - gap)
    require(
        fits,
        f"{path} has size {whole.shape[:2]}: that is not a whole number of tiles of "
        f"{(height, width)} with gap={gap}: give the tiles with tile=N or tile=HEIGHT,WIDTH",
    )
    tiles = [
        whole[y : y + height, x : x + width]
        for y in range(0, rows * steps[0], steps[0])
        for x in range(0, columns * steps[1], steps[1])
    ]
    tiles = [tile for tile in tiles if np.any(tile != tile[0, 0])]
    require(tiles, f"{path}: every tile has one colour: give a sheet of pictures")
    return np.stack(tiles)
