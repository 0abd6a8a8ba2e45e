"""Data from the course's pair of .npy files: images, and labels or class numbers."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from diffusion_jax.data.dataset import FEATURES, Dataset, Source, check, check_rows, hold_out
from diffusion_jax.data.sprites import CLASS_NAMES
from diffusion_jax.files import HEAD, explain, open_file
from diffusion_jax.typing import InputError, require


def npy(
    images: Path | None = None,
    labels: Path | None = None,
    class_names: tuple[str, ...] = (),
    held_out: float = 0.0,
) -> Source:
    """Read a .npy file of uint8 images (N, h, w, 3) or (N, h, w), and one of labels.

    labels: (N, features) numbers, or (N,) class numbers. class_names: names of the features or
    classes. held_out: the fraction that training does not see; evaluation measures against it.
    """
    require(images, "data=npy: give images=FILE.npy")
    return hold_out(npy_pair(str(images), str(labels or ""), class_names), held_out)


def npy_pair(images: str, labels: str = "", class_names: Sequence[str] = ()) -> Dataset:
    """Read images (N, h, w, 3), (N, h, w, 1) or (N, h, w) uint8, and their labels, into memory.

    labels: a file of (N, F) numbers, whose rows are context vectors, or of (N,) class numbers.
    Without labels every context is zero. Without class_names the classes are the numbers that
    occur. They are named after these numbers, or have the course's names if they are 0..4.
    Raise InputError naming the file and the fault.
    """
    pixels = load_npy(images)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    count = len(pixels) if pixels.ndim else 0
    names = tuple(class_names)
    vectors = np.zeros((count, len(names) or 1), np.float32)
    if labels:
        vectors, names = _context_vectors(load_npy(labels), labels, names, count)
    names = names or default_class_names(vectors.shape[-1])
    return check(Dataset(pixels, vectors, names), f"{images}, {labels}" if labels else images)


def default_class_names(count: int) -> tuple[str, ...]:
    """Return names for a number of classes: the course's names if there are five."""
    return CLASS_NAMES if count == len(CLASS_NAMES) else tuple(f"class{i}" for i in range(count))


def load_npy(path: str) -> ndarray:
    """Read the array of a .npy file into memory. Raise InputError naming the file."""
    require(os.path.lexists(path), f"{path}: there is no such file")
    require(os.path.isfile(path), f"{path} is not a .npy file of numbers: it is not a file")
    reason = ""
    try:
        with open_file(path) as file, warnings.catch_warnings(action="ignore"):  # about Python 2
            if file.peek().startswith(b"\x93NUMPY"):
                return np.lib.format.read_array(file, allow_pickle=False)
            reason = explain(file.read(HEAD), "give one array, as np.save writes it")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged header can raise anything
        reason = str(error)
        if "allow_pickle" in reason:
            reason = "it holds Python objects: make one array of numbers of them, and save that"
    raise InputError(f"{path} is not a .npy file of numbers: {reason}")


def _context_vectors(
    labels: ndarray, path: str, names: tuple[str, ...], count: int
) -> tuple[ndarray, tuple[str, ...]]:
    """Return context vectors (count, F) from stored labels, and the names of the classes."""
    shape = f"{path}: labels of shape {labels.shape}"
    require(
        labels.dtype.kind in "biuf", f"{path}: labels of type {labels.dtype}: they must be numbers"
    )
    must = "they must be (N, features), or (N,) class numbers"
    require(labels.ndim in (1, 2), f"{shape}: {must}")
    check_rows(count, labels, path)
    require(
        labels.ndim == 1 or labels.shape[1] <= FEATURES, f"{shape}: at most {FEATURES} features"
    )
    with np.errstate(all="ignore"):  # overflow gives infinity, which is refused
        vectors = np.asarray(labels, np.float32)
        whole = np.all(labels == np.rint(labels)) and np.any(labels > 1)
    if labels.ndim == 2 and labels.shape[1] == 1:
        clear = labels.dtype.kind != "f" or not whole
        advice = "give class numbers as integers, or scale a feature to around 1"
        require(clear, f"{shape} of whole numbers: {advice}")
        labels = labels if labels.dtype.kind == "f" else labels[:, 0]
    return (vectors, names) if labels.ndim == 2 else _one_hot(labels, path, names)


def _one_hot(labels: ndarray, path: str, names: tuple[str, ...]) -> tuple[ndarray, tuple[str, ...]]:
    """Return one-hot rows and class names. With names, class numbers (N,) count from 0 or 1."""
    values = np.asarray(labels, np.float64)
    bad = values[~((values >= 0) & (values < FEATURES) & (values == np.rint(values)))]
    if len(bad):
        must = f"it must be whole, in 0..{FEATURES - 1}"
        raise InputError(f"{path}: class number {bad[0]:g}: {must}")
    found, place = np.unique(values.astype(int), return_inverse=True)
    if not names:
        course = np.array_equal(found, np.arange(len(CLASS_NAMES)))
        names = CLASS_NAMES if course else tuple(f"class{number}" for number in found)
        return np.eye(len(found), dtype=np.float32)[place], names
    first = int(0 not in found and found.max(initial=0) == len(names))
    if found.max(initial=0) - first >= len(names):
        raise InputError(
            f"{path}: class number {found[-1]}, but there are {len(names)} class names: "
            f"it must be in 0..{len(names) - 1}"
        )
    return np.eye(len(names), dtype=np.float32)[found[place] - first], names
