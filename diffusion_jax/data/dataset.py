"""A data set: images in memory, a context vector for each, and the names of the classes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from diffusion_jax.typing import InputError


class Dataset(NamedTuple):
    """N square images of 1 or 3 channels, a context vector for each, and the names of its parts."""

    images: UInt8[ndarray, "N height width channel"]
    labels: Float32[ndarray, "N feature"]
    class_names: tuple[str, ...]


def check_rows(n_images: int, labels: ndarray, source: str) -> None:
    """Raise InputError unless there is one row of labels for each image."""
    if len(labels) != n_images:
        raise InputError(
            f"{source}: {n_images} images but labels of shape {labels.shape}: "
            "there must be one row of labels for each image"
        )


def check(dataset: Dataset, source: str) -> Dataset:
    """Return the data set if it can be trained on. Raises InputError naming source and fault."""
    images, labels, names = dataset
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1] != images.shape[2]:
        raise InputError(
            f"{source}: images of shape {images.shape}: they must be "
            "(N, height, width), (N, height, width, 1) or (N, height, width, 3), and square"
        )
    if images.dtype != np.uint8:
        raise InputError(f"{source}: images of type {images.dtype}: they must be uint8, 0..255")
    if images.shape[1] < 8 or images.shape[1] % 4:
        raise InputError(
            f"{source}: images of height {images.shape[1]}: it must be a multiple of 4, from 8 up"
        )
    if not len(images):
        raise InputError(f"{source}: there are no images in it")
    check_rows(len(images), labels, source)
    if not np.all(np.isfinite(labels)):
        raise InputError(f"{source}: labels must be finite numbers, some are NaN or infinite")
    if len(names) != labels.shape[1]:
        raise InputError(
            f"{source}: {len(names)} class names ({', '.join(names)}) for "
            f"{labels.shape[1]} label columns: there must be one for each (--class_names)"
        )
    return dataset
