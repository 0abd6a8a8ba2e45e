"""Data from a folder that has a subfolder of images for each class."""

import math
import warnings
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageOps

from diffusion_jax.data.dataset import FEATURES, Dataset, Source, check, hold_out
from diffusion_jax.typing import InputError, RunWarning, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
PIXELS = 2**26  # the largest image that is decoded has 8192 x 8192: 256 MB


def folder(path: Path | None = None, size: int = 0, held_out: float = 0.0) -> Source:
    """Read a folder with a subfolder of images for each class.

    size: the height and width to scale images to; 0 does not scale them. held_out: as for npy.
    """
    require(path, "data=folder: give path=FOLDER")
    require(0 <= size <= 1024, f"size={size}: it must be in 0..1024")
    return hold_out(image_folder(str(path), size), held_out)


def image_folder(folder: str, image_size: int = 0) -> Dataset:
    """Read a folder with one subfolder of images for each class, in alphabetical order.

    Images are put on white in RGB and turned by their EXIF orientation. Only the first frame of an
    animation is read. Hidden files and subfolders without images are skipped. Files that are not
    images are skipped with a RunWarning. image_size: the height and width to scale images to; with
    0, images are not scaled and must all have one size.
    Raise InputError naming the file that does not fit.
    """
    try:
        files, misplaced, others = _class_files(Path(folder))
    except OSError as error:
        raise InputError(f"{folder}: {error.filename}: {error.strerror}") from None
    names, owner = np.unique([path.parent.name for path in files], return_inverse=True)
    layout = "it must hold one subfolder for each class, with the class's images"
    if misplaced:
        raise InputError(f"{folder}: {misplaced[0]} is not in the subfolder of a class: {layout}")
    require(files, f"{folder}: no images in it: {layout}, {', '.join(SUFFIXES)} files")
    require(len(names) <= FEATURES, f"{folder}: {len(names)} classes: at most {FEATURES}")
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        message = f"{folder}: left out, because not an image: {others[0]}{more}"
        warnings.warn(message, RunWarning, stacklevel=2)
    images: list[ndarray] = []
    for path in files:
        images.append(_read_image(path, image_size))
        shapes = [image.shape[:2] for image in (images[-1], images[0])]
        require(
            shapes[0] == shapes[1],
            f"{path} has size {shapes[0]} where {files[0]} has {shapes[1]}: scale them all with "
            "size=N",
        )
    labels = np.eye(len(names), dtype=np.float32)[owner]
    return check(Dataset(np.stack(images), labels, tuple(map(str, names))), folder)


def _visible(folder: Path) -> list[Path]:
    """Return the entries of a folder in alphabetical order, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _class_files(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the images in class folders, images elsewhere, and other files of class folders."""
    top = _visible(folder)
    inside = [path for one in top if one.is_dir() for path in _visible(one)]
    below = [path for one in inside if one.is_dir() for path in sorted(one.rglob("[!.]*"))]
    others = [path for path in inside if not _is_image(path) and not path.is_dir()]
    return [*filter(_is_image, inside)], [*filter(_is_image, top + below)], others


def _is_image(path: Path) -> bool:
    """Return whether a file's name is that of an image."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _read_image(path: Path, size: int) -> ndarray:
    require(path.is_file(), f"{path} cannot be read as an image: it is not a file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            fits = math.prod(file.size) <= PIXELS
            require(fits, f"{path} has size {file.size}: more than {PIXELS} pixels")
            deep = file.mode[0] in "IF"  # Pillow would cut its values off at 255
            require(not deep, f"{path} is an image of more than 8 bits a channel: give it 8")
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX) if size else image)
