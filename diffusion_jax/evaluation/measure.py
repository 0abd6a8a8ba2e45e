"""All measures of a set of samples, each beside what another set of real images gets."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from diffusion_jax.data import Dataset
from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)
from diffusion_jax.evaluation.estimate import Estimate, mean
from diffusion_jax.evaluation.neighbours import (
    Neighbours,
    density_coverage,
    nearest,
    precision_recall,
)
from diffusion_jax.evaluation.real import LEAST, Real
from diffusion_jax.evaluation.spaces import Space, spaces
from diffusion_jax.typing import InputError, RunWarning, require

NEAR = 0.05  # the part of held-out images whose distance to training counts as near
OUTSIDE = 0.1  # the part of samples' values outside of [-1, 1] from which there is a warning

Pixels = UInt8[np.ndarray, "n height width channel"]


class Row(NamedTuple):
    """A measure of the samples, and the same of real images."""

    samples: Estimate
    real: Estimate


def check_samples(images: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    """Raise InputError unless images are (n, *shape), n >= LEAST, in uint8 or floats in [-1, 1].

    Floats that are nowhere negative, and uint8 of 0 and 1 alone, are taken for another range. A
    RunWarning tells how many floats are outside of [-1, 1].
    """
    want = ", ".join(map(str, shape))
    fits = images.ndim == 4 and images.shape[1:] == shape
    require(fits, f"{name}: images of shape {images.shape}: they must be (n, {want})")
    right = "float32 in [-1, 1], or uint8"
    known = images.dtype in (np.uint8, np.float32, np.float64)
    require(known, f"{name}: images of type {images.dtype}: {right}")
    require(len(images) >= LEAST, f"{name}: n={len(images)}: it must be at least {LEAST}")
    finite = np.all(np.isfinite(images))
    require(finite, f"{name}: the images must be finite numbers, some are NaN or infinite")
    low, high = images.min(), images.max()
    if (high == 1) if images.dtype == np.uint8 else low >= 0:
        scale = "[0, 1]" if high <= 1 else "[0, 255]"
        raise InputError(f"{name}: the images look like {scale}: give {right} in 0..255")
    if images.dtype != np.uint8 and (outside := np.mean(np.abs(images) > 1.01)) > OUTSIDE:
        words = f"{outside:.0%} of the values are outside of [-1, 1], and are clipped"
        warnings.warn(f"{name}: {words}", RunWarning, stacklevel=2)


def to_pixels(images: np.ndarray) -> Pixels:
    """Images as they are looked at: clipped to [-1, 1] and rounded to 0..255."""
    if images.dtype == np.uint8:
        return images
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def evaluate(
    samples: Pixels,
    labels: Float[np.ndarray, "n class"] | None,
    real: Real,
    params: Any | None,
    devices: Sequence[jax.Device],
) -> tuple[dict[str, Row], Neighbours | None]:
    """All measures by name, and the samples' nearest training images, if these are known.

    labels: what the samples should show, or None; params: a classifier's weights, or None. The
    class accuracy takes both.
    """
    measured = measure(samples, real, spaces(real.teaching, params, devices), devices)
    if params is not None and labels is not None:
        drawn = real.other._replace(images=samples, labels=labels)
        both = [recognised(params, part, devices) for part in (drawn, real.other)]
        measured["class accuracy"] = Row(*both)
    if real.seen is None:
        return measured, None
    rows, near = memorised(samples, real.seen, real.other, devices)
    return measured | rows, near


def measure(
    samples: Pixels, real: Real, compared: dict[str, Space], devices: Sequence[jax.Device]
) -> dict[str, Row]:
    """Distances, precision and its kin, by name; neighbours are measured in the first space."""
    found: dict[str, Row] = {}
    for name, space in compared.items():
        sets = [space.rows(v, devices) for v in (real.reference.images, samples, real.other.images)]
        for label, distance in (("KID", kernel_distance), ("Frechet", frechet_distance)):
            found[f"{label}, {name}"] = Row(*(distance(sets[0], rows) for rows in sets[1:]))
        if name == next(iter(compared)):
            for method in (precision_recall, density_coverage):
                both = [method(sets[0], rows, devices) for rows in sets[1:]]
                found |= {label: Row(both[0][label], both[1][label]) for label in both[0]}
    flat = [
        _flat(v) / np.float32(127.5) for v in (real.reference.images, samples, real.other.images)
    ]
    found["sliced Wasserstein, pixels"] = Row(*(sliced_wasserstein(flat[0], v) for v in flat[1:]))
    return found


def memorised(
    samples: Pixels, seen: Dataset, other: Dataset, devices: Sequence[jax.Device]
) -> tuple[dict[str, Row], Neighbours]:
    """How near samples are to training images, beside other ones; and the nearest images.

    Distances are root mean squares over the pixels, in grey levels (0..255). An image is near if
    its distance is at most the NEAR quantile of one half of the other images'; the second half is
    the comparison.
    """
    ours, theirs = (_to_training(v, seen.images, devices) for v in (samples, other.images))
    half, rest = theirs.distances[::2], theirs.distances[1::2]
    threshold = np.quantile(half, NEAR)
    rows = {
        "distance to training": Row(mean(ours.distances), mean(theirs.distances)),
        "part near training": Row(mean(ours.distances <= threshold), mean(rest <= threshold)),
    }
    return rows, ours


def _to_training(images: Pixels, seen: np.ndarray, devices: Sequence[jax.Device]) -> Neighbours:
    """The nearest training images; distances anew from differences, exact for copies too."""
    found = nearest(_flat(images), _flat(seen), 1, devices).indices
    gaps = _flat(images).astype(np.float32) - _flat(seen)[found[:, 0]]
    return Neighbours(np.sqrt(np.square(gaps).mean(1, keepdims=True)), found)


def recognised(params: Any, drawn: Dataset, devices: Sequence[jax.Device]) -> Estimate:
    """The class accuracy of images that were drawn for their labels, by a classifier's weights."""
    right = classifier.recognise(params, drawn, devices)
    return class_accuracy(right, np.asarray(drawn.labels))


def class_accuracy(
    right: Bool[np.ndarray, " n"], classes: Float[np.ndarray, "n class"]
) -> Estimate:
    """The mean over classes of the part of its images that the classifier gives to it."""
    owner = classes.argmax(1)
    each = [
        mean(right[owner == number]) for number in np.unique(owner) if np.sum(owner == number) > 1
    ]
    errors = np.array([estimate.error for estimate in each])
    value = float(np.mean([estimate.value for estimate in each]))
    return Estimate(value, float(np.sqrt(np.square(errors).sum()) / len(each)))


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images).reshape(len(images), -1)
