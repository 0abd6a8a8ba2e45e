"""A data set: images in memory, a context vector for each, and the names of the classes."""

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from diffusion_jax.typing import InputError

LONGEST = 100  # characters of a class name
UNKNOWN = ("unknown",)  # the fingerprint where the training images are not known


class Dataset(NamedTuple):
    """N images of 1 or 3 channels, a context vector for each, and the names of its parts.

    fingerprint: that of the whole files that the images are from, or () if it was not taken.
    """

    images: UInt8[ndarray, "N height width channel"]
    labels: Float32[ndarray, "N feature"]
    class_names: tuple[str, ...]
    fingerprint: tuple[str, ...] = ()


def digests(rows: ndarray) -> list[bytes]:
    """Return the SHA-256 of each row of an array."""
    return [hashlib.sha256(row).digest() for row in np.ascontiguousarray(rows)]


def fingerprint(dataset: Dataset) -> tuple[str, str, str, str]:
    """Return the number of images, and digests of the images, of the labels, and of the pairs.

    The last does not depend on the order.
    """
    images, labels = digests(dataset.images), digests(dataset.labels)
    pairs = sorted(map(b"".join, zip(images, labels, strict=True)))
    found = (hashlib.sha256(b"".join(rows)).hexdigest() for rows in (images, labels, pairs))
    return (str(len(images)), *found)  # type: ignore[return-value]


def changes(old: Sequence[str], new: Sequence[str]) -> str:
    """Say how the data of two fingerprints differ; empty if they do not, or one is not known."""
    if old == new or not len(old) == len(new) == 4:
        return ""
    if old[0] != new[0]:
        return f"{new[0]} images, where there were {old[0]}"
    if old[3] == new[3]:
        return "the same images in another order"
    parts = zip(("images", "labels"), old[1:3], new[1:3], strict=True)
    return f"other {' and other '.join(name for name, a, b in parts if a != b)}"


def check_class_names(names: Sequence[str]) -> None:
    """Raise InputError unless every name can be shown, and written as a context."""
    for name in names:
        control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
        if control or not 0 < len(name) <= LONGEST or name == "none":
            raise InputError(
                f"class name {name[:LONGEST]!a}: give it another one, of at most {LONGEST} "
                'characters, none of them a control character; "none" means no context'
            )


def check_rows(n_images: int, labels: ndarray, source: str) -> None:
    """Raise InputError unless there is one row of labels for each image."""
    if len(labels) != n_images:
        raise InputError(
            f"{source}: {n_images} images but labels of shape {labels.shape}: "
            "there must be one row of labels for each image"
        )


def check(dataset: Dataset, source: str) -> Dataset:
    """Return the data set if it can be trained on. Raises InputError naming source and fault."""
    images, labels, names = dataset[:3]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(
            f"{source}: images of shape {images.shape}: they must be "
            "(N, height, width), (N, height, width, 1) or (N, height, width, 3)"
        )
    if images.dtype != np.uint8:
        raise InputError(f"{source}: images of type {images.dtype}: they must be uint8, 0..255")
    if not images.size:
        raise InputError(f"{source}: there are no images in it")
    if images.max() == 1:
        raise InputError(f"{source}: images of 0 and 1 alone: they must be 0..255")
    check_rows(len(images), labels, source)
    if not np.all(np.isfinite(labels)):
        raise InputError(f"{source}: labels must be finite numbers, some are NaN or infinite")
    if len(names) != labels.shape[1]:
        raise InputError(
            f"{source}: {len(names)} class names ({', '.join(names)}) for "
            f"{labels.shape[1]} label columns: there must be one for each (--class_names)"
        )
    try:
        check_class_names(names)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return dataset
