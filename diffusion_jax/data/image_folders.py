"""Data from a folder of images, with a subfolder for each class, a file of labels, or neither."""

import warnings
from pathlib import Path

import numpy as np

from diffusion_jax.data.dataset import FEATURES, Dataset, Source, check, hold_out
from diffusion_jax.data.frames import WHOLE, Channels, Fit, Frame, frame, read_picture, stack
from diffusion_jax.data.labels import Labels, read_labels
from diffusion_jax.typing import InputError, RunWarning, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")


def folder(
    path: Path | None = None,
    labels: Path | None = None,
    size: tuple[int, ...] = (0,),
    fit: Fit = "stretch",
    background: str = "white",
    channels: Channels = 3,
    held_out: float = 0.0,
) -> Source:
    """Read a folder of images, with a subfolder for each class, or without classes.

    labels: a .csv or .json file with a label for the name of each image. size, fit, background: as
    in frames.frame. channels: 1 reads images as grey. held_out: as for npy.
    """
    require(path, "data=folder: give path=FOLDER")
    shape = frame(size, fit, background, channels)
    return hold_out(image_folder(str(path), shape, str(labels or "")), held_out)


def image_folder(folder: str, frame: Frame = WHOLE, labels: str = "") -> Dataset:
    """Read a folder of images in alphabetical order.

    The classes are its subfolders. If it has none, every context is zero. Hidden files and
    subfolders without images are skipped. Files that are not images are skipped with a RunWarning.
    labels: a file of labels by the names of images in the folder, such as cat/1.png.
    Raise InputError naming the file that does not fit.
    """
    try:
        loose, inside, deep, others = _files(Path(folder))
    except OSError as error:
        words = f"{error.filename}: {error.strerror}: give a folder of images"
        raise InputError(words) from None
    files = sorted(loose + inside)
    layout = "it must hold images, or one subfolder of images for each class"
    mixed = deep or (loose if inside and not labels else [])
    require(
        not mixed, f"{folder}: {next(iter(mixed), '')} is not in the subfolder of a class: {layout}"
    )
    require(files, f"{folder}: no images in it: {layout}, {', '.join(SUFFIXES)} files")
    if inside and not labels:
        found = _classes(inside, folder)
    else:
        names = [path.relative_to(folder).as_posix() for path in files]
        found = read_labels(labels, len(files), files=names)
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        message = f"{folder}: left out, because not an image: {others[0]}{more}"
        warnings.warn(message, RunWarning, stacklevel=2)
    images = stack((path, read_picture(path, frame)) for path in files)
    return check(Dataset(images, *found), folder)


def _classes(files: list[Path], folder: str) -> Labels:
    """Return the subfolders of files as classes."""
    names, owner = np.unique([path.parent.name for path in files], return_inverse=True)
    require(len(names) <= FEATURES, f"{folder}: {len(names)} classes: at most {FEATURES}")
    return np.eye(len(names), dtype=np.float32)[owner], tuple(map(str, names))


def _visible(folder: Path) -> list[Path]:
    """Return the entries of a folder in alphabetical order, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files(folder: Path) -> tuple[list[Path], ...]:
    """Return images of the folder, of its subfolders and below, and other files of subfolders.

    Raise InputError if one of them is a link out of the folder.
    """
    top = _visible(folder)
    inside = [path for one in top if one.is_dir() for path in _visible(one)]
    below = [path for one in inside if one.is_dir() for path in sorted(one.rglob("[!.]*"))]
    others = [path for path in inside if not _is_image(path) and not path.is_dir()]
    for path in filter(Path.is_symlink, top + inside):
        stays = path.resolve().is_relative_to(folder.resolve())
        require(stays, f"{path} is a link out of {folder}: put the images themselves there")
    return *(list(filter(_is_image, each)) for each in (top, inside, below)), others


def _is_image(path: Path) -> bool:
    """Return whether a file's name is that of an image."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()
