"""Data from .npy files: an array of images, and labels."""

from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.data.dataset import Dataset, Source, check, hold_out
from diffusion_jax.data.frames import Fit, frame
from diffusion_jax.data.labels import read_labels
from diffusion_jax.files import load_npy
from diffusion_jax.typing import require


def npy(
    images: Path | None = None,
    labels: Path | None = None,
    class_names: tuple[str, ...] = (),
    size: tuple[int, ...] = (0,),
    fit: Fit = "stretch",
    background: str = "white",
    held_out: float = 0.0,
) -> Source:
    """Read a .npy file of uint8 images (N, h, w, 3) or (N, h, w), and a file of labels.

    labels: a .npy, .csv or .json file of (N, features) numbers, or of (N,) class numbers or words.
    class_names: names of the features or classes. size, fit, background: as in frames.frame.
    held_out: the fraction that training does not see; evaluation measures against it.
    """
    require(images, "data=npy: give images=FILE.npy")
    shape = frame(size, fit, background)
    return hold_out(npy_pair(str(images), str(labels or ""), class_names), held_out, shape)


def npy_pair(images: str, labels: str = "", class_names: Sequence[str] = ()) -> Dataset:
    """Read images (N, h, w, 3), (N, h, w, 1) or (N, h, w) uint8, and their labels, into memory.

    Without labels every context is zero. Raise InputError naming the file and the fault.
    """
    pixels = load_npy(images)
    found = read_labels(labels, len(pixels) if pixels.ndim else 0, class_names)
    return check(Dataset(pixels, *found), f"{images}, {labels}" if labels else images)
