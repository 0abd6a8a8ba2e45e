"""Objectives of learning: how far samples are from images, or from a fine solution of the ODE.

The distances of distributions are 2 E k(x, y) - E k(x, x') - E k(y, y') up to sign, over all pairs
of different samples. They are summed over several spaces: the layers of a network with random
weights, which are fresh at each step; those of a classifier of the training images, unless these
have no classes; and pixels. The contexts are part of each vector.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from diffusion_jax.parallel import AXIS
from diffusion_jax.typing import Context, Images, require

WIDTHS = (32, 64, 64)  # channels of the random network
Distance = Callable[[Array, Array], Array]  # of all pairs of rows, on several devices
Layers = Callable[[Images], Sequence[Float[Array, "batch _"]]]  # the features of images
Loss = Callable[[Images, Images, Context, Layers], Float[Array, ""]]


class Objective(NamedTuple):
    """A function to minimise.

    loss(samples, targets, contexts, layers): the part of this device, to be summed over AXIS.
    Target i has the context of sample i.
    solution: the sampler whose images from the same noise are the targets; "" for real images.
    """

    loss: Loss
    solution: str = ""


def energy(pixels: float = 1.0, context: float = 0.5) -> Objective:
    """Energy distance: Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.

    pixels: the weight of the distance of pixels; that of each layer is 1.
    context: the scale of the context in each feature vector, whose mean square is 1.
    """
    return _between_distributions(_euclidean, pixels, context)


def mmd(pixels: float = 1.0, context: float = 0.5) -> Objective:
    """Maximum mean discrepancy with the cubic kernel of KID: arXiv:1801.01401, sec. 4.

    pixels, context: those of energy.
    """
    return _between_distributions(_cubic, pixels, context)


def solution(steps: int = 50) -> Objective:
    """Mean square difference from the images of unipc with many steps, from the same noise.

    It needs a sampler that adds no noise.
    """

    def loss(x: Images, y: Images, contexts: Context, layers: Layers) -> Float[Array, ""]:
        return jnp.mean((x - y) ** 2) / lax.axis_size(AXIS)

    return Objective(loss, f"unipc:{steps}")


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "energy": energy,
    "mmd": mmd,
    "solution": solution,
}


def _between_distributions(distance: Distance, pixels: float, context: float) -> Objective:
    for name, value in (("pixels", pixels), ("context", context)):
        require(0 <= value < np.inf, f"{name}={value}: it must be 0 or more, and finite")

    def loss(x: Images, y: Images, contexts: Context, layers: Layers) -> Float[Array, ""]:
        parts = [*zip(layers(x), layers(y), strict=True)]
        weights = [*[1.0] * len(parts), pixels]
        parts.append((x.reshape(len(x), -1), y.reshape(len(y), -1)))
        total = jnp.zeros(())
        for weight, (ours, theirs) in zip(weights, parts, strict=True):
            sides = _to_vectors(ours, theirs, context * contexts)
            total += weight * _discrepancy(distance, *sides)
        return total

    return Objective(loss)


def random_features(key: Key[Array, ""], images: Images) -> list[Float[Array, "batch _"]]:
    """Return the outputs of the last two layers of a convolutional network with random weights."""
    x, found = images, []
    for layer, (width, one) in enumerate(
        zip(WIDTHS, jax.random.split(key, len(WIDTHS)), strict=True)
    ):
        scale = np.sqrt(2 / (9 * x.shape[-1]))
        kernel = scale * jax.random.normal(one, (3, 3, x.shape[-1], width))
        x = jax.nn.gelu(_convolve(x, kernel))
        x = _halve(x)
        if layer:
            found.append(x.reshape(len(x), -1))
    return found


def _convolve(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _halve(x: Array) -> Array:
    """Average over windows of 2 x 2 as far as they fit; a side of 1 stays."""
    n, *sides, channels = x.shape
    down, across = (max(1, side // 2) for side in sides)
    high, wide = (min(2, side) for side in sides)
    x = x[:, : down * high, : across * wide]
    return x.reshape(n, down, high, across, wide, channels).mean((2, 4))


def _to_vectors(ours: Array, theirs: Array, contexts: Array) -> tuple[Array, Array]:
    """Centre and scale both sides by the targets of all devices, and append the contexts."""
    targets = lax.all_gather(theirs, AXIS, tiled=True)
    centre = targets.mean(0)
    scale = jnp.sqrt(jnp.maximum(targets.var(0).sum(), 1e-12))

    def vectors(x: Array) -> Array:
        return jnp.concatenate([(x - centre) / scale, contexts], 1)

    return vectors(ours), vectors(theirs)


def _discrepancy(distance: Distance, ours: Array, theirs: Array) -> Float[Array, ""]:
    """Return this device's part of the discrepancy of samples and targets.

    Sample i and target i have the same context, so pairs (i, i) are left out on all sides. Each
    device has the gradient of its own samples. A pair of two samples counts once on the device of
    each, so its gradient is complete when the parts are summed.
    """
    samples, targets = (lax.all_gather(x, AXIS, tiled=True) for x in (ours, theirs))
    n, own = len(samples), lax.axis_index(AXIS) * len(ours) + jnp.arange(len(ours))
    different = own[:, None] != jnp.arange(n)

    def mean(x: Array, y: Array) -> Array:
        return jnp.where(different, distance(x, y), 0).sum() / (n * (n - 1))

    across, among = mean(ours, targets), mean(ours, lax.stop_gradient(samples))
    value = lax.stop_gradient(2 * across - among - mean(theirs, targets))
    return 2 * (across - among) - lax.stop_gradient(2 * (across - among)) + value


def _euclidean(x: Array, y: Array) -> Array:
    square = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return jnp.sqrt(jnp.maximum(square, 1e-6))


def _cubic(x: Array, y: Array) -> Array:
    """Return -k for the cubic kernel; vectors have mean square about 1."""
    return -((x @ y.T + 1) ** 3)
