"""What a data set holds, as files in a run folder."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from diffusion_jax import pictures
from diffusion_jax.data import Dataset
from diffusion_jax.data.summary import CLASSES, class_counts, describe
from diffusion_jax.files import write_atomically

EACH = 8  # images of a class


def picture(dataset: Dataset) -> UInt8[ndarray, "height width 3"]:
    """Return EACH images of the first CLASSES classes, or a square of images without classes."""
    title, counts = describe(dataset).partition(";")[0], class_counts(dataset)
    if not counts:
        return pictures.grid(_some(dataset.images, EACH**2), title=title, columns=EACH)
    groups = {
        f"{name} {number:,}": _some(dataset.images[dataset.labels[:, at] == 1], EACH)
        for at, (name, number) in enumerate(counts.items())
        if number and at < CLASSES
    }
    rows = pictures.Rows({name: len(images) for name, images in groups.items()}, EACH)
    images = rows.arrange(np.concatenate([*groups.values()]) / np.float32(127.5) - 1)
    return pictures.grid(images, title=title, columns=rows.columns, labels=rows.labels)


def write_summary(folder: Path, dataset: Dataset) -> None:
    """Write data.json, with the numbers of images, and data.png into a run folder."""
    _, height, width, channels = dataset.images.shape
    counts = {"images": len(dataset.images), "classes": class_counts(dataset)}
    shape = {"height": height, "width": width, "channels": channels}
    write_atomically(folder / "data.json", json.dumps(counts | shape, indent=2).encode())
    pictures.save_png(folder / "data.png", picture(dataset))


def _some(images: ndarray, count: int) -> ndarray:
    """Return at most `count` images, evenly spaced."""
    return images[np.unique(np.linspace(0, len(images) - 1, count).astype(int))]
