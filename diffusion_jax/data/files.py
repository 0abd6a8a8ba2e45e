"""Data sets from files: the course's pair of .npy files, and a folder of images by class."""

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageOps

from diffusion_jax.data.dataset import Dataset, check, check_rows
from diffusion_jax.data.sprites import CLASS_NAMES
from diffusion_jax.files import open_file
from diffusion_jax.magic import HEAD, explain
from diffusion_jax.typing import InputError, RunWarning

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
PIXELS = 2**26  # of the largest image that is decoded, 8192 x 8192: 256 MB
FEATURES = 1024  # the most features of a context


def npy_pair(images: str, labels: str = "", class_names: Sequence[str] = ()) -> Dataset:
    """Images (N, h, w, 3), (N, h, w, 1) or (N, h, w) uint8, and their labels, read into memory.

    labels: a file of (N, F) numbers, a context vector a row, or of (N,) class numbers; without
    one, every context is zero. The classes are those of class_names, or else the numbers that
    occur, called by them, or as the course does where they are 0..4.
    Raises InputError naming the file and what is wrong.
    """
    pixels = load_npy(images)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    count = len(pixels) if pixels.ndim else 0
    names = tuple(class_names)
    if labels:
        vectors, names = _context_vectors(load_npy(labels), labels, names, count)
    else:
        vectors = np.zeros((count, len(names) or 1), np.float32)
    names = names or default_class_names(vectors.shape[-1])
    return check(Dataset(pixels, vectors, names), f"{images}, {labels}" if labels else images)


def default_class_names(count: int) -> tuple[str, ...]:
    """Names for so many classes: the course's if there are five."""
    return CLASS_NAMES if count == len(CLASS_NAMES) else tuple(f"class{i}" for i in range(count))


def load_npy(path: str) -> ndarray:
    """Read the array of a .npy file into memory. Raises InputError naming the file."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: there is no such file")
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a .npy file of numbers: it is no file")
    reason = ""
    try:
        with open_file(path) as file, warnings.catch_warnings(action="ignore"):  # of Python 2
            if not file.peek().startswith(b"\x93NUMPY"):
                reason = explain(file.read(HEAD), "give one array, as np.save writes it")
            else:
                return np.lib.format.read_array(file, allow_pickle=False)
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
    """Context vectors (count, F) of labels as they are stored, and the names of their classes."""
    if labels.dtype.kind not in "biuf":
        raise InputError(f"{path}: labels of type {labels.dtype}: they must be numbers")
    if labels.ndim not in (1, 2):
        raise InputError(
            f"{path}: labels of shape {labels.shape}: they must be (N, features), or (N,) class "
            "numbers"
        )
    check_rows(count, labels, path)
    if labels.ndim == 2 and labels.shape[1] == 1 and _are_class_numbers(labels, path):
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1] > FEATURES:
        raise InputError(f"{path}: labels of shape {labels.shape}: at most {FEATURES} features")
    if labels.ndim == 2:
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused
            return np.asarray(labels, np.float32), names
    values = np.asarray(labels, np.float64)
    bad = values[~((values >= 0) & (values < FEATURES) & (values == np.rint(values)))]
    if len(bad):
        must = f"it must be whole, in 0..{FEATURES - 1}"
        raise InputError(f"{path}: class number {bad[0]:g}: {must}")
    return _one_hot(values.astype(int), path, names)


def _are_class_numbers(labels: ndarray, path: str) -> bool:
    """Whether a single column holds class numbers; InputError if that cannot be told."""
    if labels.dtype.kind != "f":
        return True
    with np.errstate(invalid="ignore"):
        counts = np.all(labels == np.rint(labels)) and np.any(labels > 1)
    if counts:
        raise InputError(
            f"{path}: labels of shape {labels.shape} of whole numbers: give class numbers as "
            "integers, or scale a feature to around 1"
        )
    return False


def _one_hot(
    numbers: ndarray, path: str, names: tuple[str, ...]
) -> tuple[ndarray, tuple[str, ...]]:
    """One-hot rows of class numbers: of the named classes, from 0 or 1, or of those that occur."""
    found = np.unique(numbers)
    if not names:
        names = tuple(f"class{number}" for number in found)
        if np.array_equal(found, np.arange(len(CLASS_NAMES))):
            names = CLASS_NAMES
        return np.eye(len(found), dtype=np.float32)[np.searchsorted(found, numbers)], names
    last = found.max(initial=0)
    if last == len(names) and 0 not in found:
        numbers = numbers - 1
    elif last >= len(names):
        raise InputError(
            f"{path}: class number {last}, but there are {len(names)} class names: "
            f"it must be in 0..{len(names) - 1}"
        )
    return np.eye(len(names), dtype=np.float32)[numbers], names


def image_folder(folder: str, image_size: int = 0) -> Dataset:
    """A folder with one subfolder of images for each class, the classes in alphabetical order.

    Images become RGB on white, turned as their EXIF data say; of an animation the first frame
    counts. Hidden files and subfolders without images are left out, and with a RunWarning files
    that are not images. image_size: scale the images to that height and width; 0 takes them as
    they are, then all must have one size.
    Raises InputError naming the file that does not fit.
    """
    try:
        found, misplaced, others = _class_files(Path(folder))
    except OSError as error:
        raise InputError(f"{folder}: {error.filename}: {error.strerror}") from None
    files = [(path, number) for number, name in enumerate(found) for path in found[name]]
    layout = "it must hold one subfolder for each class, and that the class's images"
    if misplaced:
        raise InputError(f"{folder}: {misplaced[0]} is not in the subfolder of a class: {layout}")
    if not files:
        raise InputError(f"{folder}: no images in it: {layout}, {', '.join(SUFFIXES)} files")
    if len(found) > FEATURES:
        raise InputError(f"{folder}: {len(found)} classes: at most {FEATURES}")
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        message = f"{folder}: left out, because not an image: {others[0]}{more}"
        warnings.warn(message, RunWarning, stacklevel=2)
    images: list[ndarray] = []
    for path, _ in files:
        image = _read_image(path, image_size)
        images.append(image)
        if image.shape != images[0].shape:
            raise InputError(
                f"{path} has size {image.shape[:2]} where {files[0][0]} has "
                f"{images[0].shape[:2]}: scale them all with --image_size"
            )
    labels = np.eye(len(found), dtype=np.float32)[[number for _, number in files]]
    return check(Dataset(np.stack(images), labels, tuple(found)), folder)


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, in alphabetical order, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _class_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path], list[Path]]:
    """The images of each class, images that are elsewhere, and other files of the classes."""
    found: dict[str, list[Path]] = {}
    misplaced, others = [path for path in _visible(folder) if _is_image(path)], []
    for path in (path for path in _visible(folder) if path.is_dir()):
        inside = _visible(path)
        if images := [one for one in inside if _is_image(one)]:
            found[path.name] = images
        others += [one for one in inside if not _is_image(one) and not one.is_dir()]
        for below in (one for one in inside if one.is_dir()):
            for place, _, names in os.walk(below):
                within = (Path(place, name) for name in names if not name.startswith("."))
                misplaced += filter(_is_image, within)
    return found, misplaced, others


def _is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _read_image(path: Path, size: int) -> ndarray:
    if not path.is_file():
        raise InputError(f"{path} cannot be read as an image: it is no file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            if math.prod(file.size) > PIXELS:
                raise InputError(f"{path} has size {file.size}: more than {PIXELS} pixels")
            if file.mode[0] in "IF":  # Pillow would cut its values off at 255
                raise InputError(f"{path} is an image of more than 8 bits a channel: give it 8")
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX) if size else image)
