"""Data sets from files: the course's pair of .npy files, and a folder of images by class."""

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from diffusion_jax.data.dataset import Dataset, check, check_rows
from diffusion_jax.data.sprites import CLASS_NAMES
from diffusion_jax.typing import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
PIXELS = 2**26  # of the largest image that is decoded, 8192 x 8192: 256 MB
FEATURES = 1024  # the most features of a context


def npy_pair(images: str, labels: str = "", class_names: Sequence[str] = ()) -> Dataset:
    """Images (N, h, h, 3), (N, h, h, 1) or (N, h, h) uint8, memory-mapped, and their labels.

    labels: a file of (N, F) numbers, a context vector a row, or of (N,) class numbers 0..F-1;
    without one, every context is zero. class_names default to the course's where there are five.
    Raises InputError naming the file and what is wrong.
    """
    pixels = load_npy(images)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    count = len(pixels) if pixels.ndim else 0
    if labels:
        vectors = _context_vectors(load_npy(labels), labels, len(class_names), count)
    else:
        vectors = np.zeros((count, len(class_names) or 1), np.float32)
    names = tuple(class_names) or default_class_names(vectors.shape[-1])
    return check(Dataset(pixels, vectors, names), f"{images}, {labels}" if labels else images)


def default_class_names(count: int) -> tuple[str, ...]:
    """Names for so many classes: the course's if there are five."""
    return CLASS_NAMES if count == len(CLASS_NAMES) else tuple(f"class{i}" for i in range(count))


def load_npy(path: str) -> ndarray:
    """The array of a .npy file, memory-mapped. Raises InputError naming the file."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: there is no such file")
    if not os.path.isfile(path):  # reading a pipe or a device would not end
        raise InputError(f"{path} is not a .npy file of numbers: it is no file")
    try:
        with warnings.catch_warnings(action="ignore"):  # on headers written by Python 2
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{path} is not a .npy file of numbers: {error}") from None
    if not isinstance(array, ndarray):
        raise InputError(f"{path} is an archive: it must be one array, as np.save writes it")
    return array


def _context_vectors(labels: ndarray, path: str, classes: int, count: int) -> ndarray:
    if labels.dtype.kind not in "biuf":
        raise InputError(f"{path}: labels of type {labels.dtype}: they must be numbers")
    if labels.ndim not in (1, 2):
        raise InputError(
            f"{path}: labels of shape {labels.shape}: they must be (N, features), or (N,) class "
            "numbers"
        )
    check_rows(count, labels, path)
    if labels.ndim == 2 and labels.shape[1] > FEATURES:
        raise InputError(f"{path}: labels of shape {labels.shape}: at most {FEATURES} features")
    if labels.ndim == 2:
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused
            return np.asarray(labels, np.float32)
    values = np.asarray(labels, np.float64)
    bad = values[~((values >= 0) & (values < FEATURES) & (values == np.rint(values)))]
    if len(bad):
        must = f"it must be whole, in 0..{FEATURES - 1}"
        raise InputError(f"{path}: class number {bad[0]:g}: {must}")
    numbers = values.astype(int)
    classes = classes or int(numbers.max(initial=0)) + 1
    if numbers.max(initial=0) >= classes:
        raise InputError(
            f"{path}: class number {numbers.max()}, but there are {classes} class names: "
            f"it must be in 0..{classes - 1}"
        )
    return np.eye(classes, dtype=np.float32)[numbers]


def image_folder(folder: str, image_size: int = 0) -> Dataset:
    """A folder with one subfolder of images for each class, the classes in alphabetical order.

    Images become RGB on white; of an animation the first frame counts. Hidden files and
    subfolders without images are left out. image_size: scale the images to that height and width;
    0 takes them as they are, then all must have one size.
    Raises InputError naming the file that does not fit.
    """
    try:
        found = {path.name: _image_files(path) for path in _visible(Path(folder)) if path.is_dir()}
    except OSError as error:
        raise InputError(f"{folder}: {error.filename}: {error.strerror}") from None
    classes = [name for name, paths in found.items() if paths]
    files = [(path, number) for number, name in enumerate(classes) for path in found[name]]
    if not files:
        raise InputError(
            f"{folder}: no images in it: it must hold one subfolder for each class, with "
            f"{', '.join(SUFFIXES)} files"
        )
    if len(classes) > FEATURES:
        raise InputError(f"{folder}: {len(classes)} classes: at most {FEATURES}")
    images: list[ndarray] = []
    for path, _ in files:
        image = _read_image(path, image_size)
        images.append(image)
        if image.shape != images[0].shape:
            raise InputError(
                f"{path} has size {image.shape[:2]} where {files[0][0]} has "
                f"{images[0].shape[:2]}: scale them all with --image_size"
            )
    labels = np.eye(len(classes), dtype=np.float32)[[number for _, number in files]]
    return check(Dataset(np.stack(images), labels, tuple(classes)), folder)


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, in alphabetical order, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def _read_image(path: Path, size: int) -> ndarray:
    if not path.is_file():
        raise InputError(f"{path} cannot be read as an image: it is no file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            if math.prod(file.size) > PIXELS:
                raise InputError(f"{path} has size {file.size}: more than {PIXELS} pixels")
            if file.mode[0] in "IF":  # Pillow would cut its values off at 255
                raise InputError(f"{path} is an image of more than 8 bits a channel: give it 8")
            image = file.convert("RGBA")
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX) if size else image)
