"""A data set: images in memory, a context vector for each, and the names of the classes."""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from diffusion_jax.data.frames import WHOLE, Frame
from diffusion_jax.typing import InputError, require

LONGEST = 100  # characters of a class name
FEATURES = 1024  # the most features of a context


class Dataset(NamedTuple):
    """N images of 1 or 3 channels, a context vector for each, and the names of its features.

    fingerprint: that of all images of the source, also of a part of them; () if it was not
    computed.
    """

    images: UInt8[ndarray, "N height width channel"]
    labels: Float32[ndarray, "N feature"]
    class_names: tuple[str, ...]
    fingerprint: tuple[str, ...] = ()

    def part(self, chosen: ndarray) -> "Dataset":
        """Return the images at these indices, with their labels."""
        return self._replace(images=self.images[chosen], labels=self.labels[chosen])


class Source(NamedTuple):
    """All images that a data spec describes, and how many of them training does not see.

    dataset: None if the images are not recorded. held_out: the fraction that is kept from training.
    fresh: a function (n, number) that draws n new images, which no training set contains; None if
    the images cannot be drawn.
    """

    dataset: Dataset | None
    held_out: float = 0.0
    fresh: Callable[[int, int], Dataset] | None = None


def hold_out(dataset: Dataset, part: float, frame: Frame = WHOLE) -> Source:
    """Return recorded images in a frame. Training does not see a part of them, in [0, 1)."""
    require(0 <= part < 1, f"held_out={part}: it must be in [0, 1)")
    return Source(dataset._replace(images=frame.arrays(dataset.images)), part)


def digests(rows: ndarray) -> list[bytes]:
    """Return the SHA-256 of each row of an array."""
    return [hashlib.sha256(row).digest() for row in np.ascontiguousarray(rows)]


def fingerprint(dataset: Dataset) -> tuple[str, str, str, str]:
    """Return the number of images, and digests of the images, of the labels, and of the pairs.

    The digest of the pairs does not depend on their order.
    """
    images, labels = digests(dataset.images), digests(dataset.labels)
    pairs = sorted(map(b"".join, zip(images, labels, strict=True)))
    found = (hashlib.sha256(b"".join(rows)).hexdigest() for rows in (images, labels, pairs))
    return (str(len(images)), *found)  # type: ignore[return-value]


def changes(old: Sequence[str], new: Sequence[str]) -> str:
    """Describe how the data of two fingerprints differ.

    Return "" if they do not differ, or if one is unknown.
    """
    if old == new or not len(old) == len(new) == 4:
        return ""
    if old[0] != new[0]:
        return f"{new[0]} images, where there were {old[0]}"
    if old[3] == new[3]:
        return "the same images in a different order"
    parts = zip(("images", "labels"), old[1:3], new[1:3], strict=True)
    return f"other {' and other '.join(name for name, a, b in parts if a != b)}"


def check_class_names(names: Sequence[str], source: str = "") -> None:
    """Raise InputError unless every name can be displayed and can be written as a context."""
    for name in names:
        control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
        require(
            0 < len(name) <= LONGEST and name != "none" and not control,
            f"{source}class name {name[:LONGEST]!a}: give it a different one, of at most {LONGEST} "
            'characters, without control characters; "none" means no context',
        )


def check_rows(n_images: int, labels: ndarray, source: str) -> None:
    """Raise InputError unless there is one row of labels for each image."""
    require(
        len(labels) == n_images,
        f"{source}: {n_images} images but labels of shape {labels.shape}: "
        "there must be one row of labels for each image",
    )


def check(dataset: Dataset, source: str) -> Dataset:
    """Return the data set, whose images may be (N, height, width), with an axis of channels.

    Raise InputError naming source and fault if it cannot be trained on.
    """
    images, labels, names = dataset[:3]
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]
    must = "they must be (N, height, width), (N, height, width, 1) or (N, height, width, 3)"
    fits = images.ndim == 4 and images.shape[3] in (1, 3)
    require(fits, f"{source}: images of shape {shape}: {must}")
    fits = images.dtype == np.uint8
    require(fits, f"{source}: images of type {images.dtype}: they must be uint8, 0..255")
    require(images.size, f"{source}: there are no images in it")
    require(images.max() != 1, f"{source}: images of only 0 and 1: they must be 0..255")
    check_rows(len(images), labels, source)
    fits = bool(np.all(np.isfinite(labels)))
    require(fits, f"{source}: labels must be finite numbers, some are NaN or infinite")
    require(
        len(names) == labels.shape[1],
        f"{source}: {len(names)} class names ({', '.join(names)}) for "
        f"{labels.shape[1]} label columns: there must be one for each (class_names=...)",
    )
    check_class_names(names, f"{source}: ")
    return dataset._replace(images=images)


def split(dataset: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
    """Return the data set without its held-out images, and the held-out images.

    The choice is always the same, and equal images stay together. Raise InputError if either part
    would be empty.
    """
    total = len(dataset.images)
    order = np.random.default_rng(0).permutation(total)
    copies, first = digests(dataset.images), dict[bytes, int]()
    rank = np.array([first.setdefault(copies[image], at) for at, image in enumerate(order)])
    order = order[np.argsort(rank, kind="stable")]
    cuts = np.flatnonzero(np.diff(np.sort(rank))) + 1  # the cuts that do not separate copies
    count = round(held_out * total)
    if not 0 < count < total or not len(cuts):
        raise InputError(
            f"held_out={held_out}: that is {count} of {total} images: it must be neither 0 nor "
            f"all, and copies stay together: {len(first)} of the images differ"
        )
    count = cuts[np.argmin(np.abs(cuts - count))]
    return dataset.part(np.sort(order[count:])), dataset.part(np.sort(order[:count]))
