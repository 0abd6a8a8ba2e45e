"""All measures of a set of samples, each beside the same measure of a second real set."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)
from diffusion_jax.evaluation.estimate import Estimate, mean
from diffusion_jax.evaluation.neighbours import Neighbours, nearest, overlap
from diffusion_jax.evaluation.real import RealImages
from diffusion_jax.evaluation.samples import Pixels
from diffusion_jax.evaluation.spaces import spaces

NEAR = 0.05  # the fraction of held-out images whose distance to training counts as near

Labels = Float[np.ndarray, "n class"]


class Row(NamedTuple):
    """A measure of the samples, and the same measure of real images."""

    samples: Estimate
    real: Estimate


Found = tuple[dict[str, Row], Neighbours | None]


def measure_against(
    real: RealImages, params: Any | None, devices: Sequence[jax.Device]
) -> Callable[[Pixels, Labels | None], Found]:
    """Return a function that measures samples; it measures the real images once, here.

    The function takes samples, and the classes that they should show or None. It returns all
    measures by name, and the samples' nearest training images if these are known.
    params: a classifier's weights, or None. Class accuracy needs both weights and classes.
    """
    measure = measures(real, params, devices)
    of_real = measure(real.other.images, real.other.labels)
    theirs = None if real.seen is None else to_training(real.other.images, real.seen, devices)

    def evaluate(samples: Pixels, labels: Labels | None) -> Found:
        found = measure(samples, labels)
        rows = {name: Row(value, of_real[name]) for name, value in found.items()}
        if theirs is None:
            return rows, None
        ours = to_training(samples, real.seen, devices)
        return rows | memorised(ours.distances, theirs.distances), ours

    return evaluate


def measures(
    real: RealImages, params: Any | None, devices: Sequence[jax.Device]
) -> Callable[[Pixels, Labels | None], dict[str, Estimate]]:
    """Return a function (images, labels) -> measures by name, against the reference images.

    Overlap is measured in the first space.
    """
    compared = spaces(real.teaching, params, devices)
    reference = {name: space(real.reference.images) for name, space in compared.items()}
    first = next(iter(compared))

    def measure(images: Pixels, labels: Labels | None) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        for name, space in compared.items():
            sets = reference[name], space(images)
            found[f"KID, {name}"] = kernel_distance(*sets)
            found[f"Frechet, {name}"] = frechet_distance(*sets)
            if name == first:
                found |= overlap(*sets, devices)
        ours, theirs = (_flat(v) / np.float32(127.5) for v in (images, real.reference.images))
        found["sliced Wasserstein, pixels"] = sliced_wasserstein(theirs, ours)
        if params is not None and labels is not None:
            drawn = real.other._replace(images=images, labels=labels)
            right = classifier.recognise(params, drawn, devices)
            found["class accuracy"] = class_accuracy(right, labels)
        return found

    return measure


def to_training(images: Pixels, seen: Any, devices: Sequence[jax.Device]) -> Neighbours:
    """Return the nearest training image of each image.

    A distance is the root mean square difference of the pixels, in grey levels (0..255). It is
    computed from differences, so it is exactly 0 for copies.
    """
    found = nearest(_flat(images), _flat(seen.images), 1, devices).indices
    gaps = _flat(images).astype(np.float32) - _flat(seen.images)[found[:, 0]]
    return Neighbours(np.sqrt(np.square(gaps).mean(1, keepdims=True)), found)


def memorised(ours: Float[np.ndarray, "n 1"], theirs: Float[np.ndarray, "m 1"]) -> dict[str, Row]:
    """Compare the distances to training images of samples (ours) and of other images (theirs).

    An image is near if its distance is at most the NEAR quantile of the distances in one half of
    the other images. The second half is compared with the samples.
    """
    threshold = np.quantile(theirs[::2], NEAR)
    near = (mean(distances <= threshold) for distances in (ours, theirs[1::2]))
    return {
        "distance to training": Row(mean(ours), mean(theirs)),
        "part near training": Row(*near),
    }


def class_accuracy(right: Bool[np.ndarray, " n"], classes: Labels) -> Estimate:
    """Return the fraction of images that get their class, as the mean over the classes."""
    owner = classes.argmax(1)
    parts = (right[owner == number] for number in np.unique(owner))
    each = [mean(part) for part in parts if len(part) > 1]
    error = np.sqrt(np.sum([one.error**2 for one in each])) / len(each)
    return Estimate(float(np.mean([one.value for one in each])), float(error))


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images).reshape(len(images), -1)
