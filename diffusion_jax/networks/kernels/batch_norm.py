"""Normalisation by the moments of a batch, with a gradient that needs few passes over it."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.networks.kernels.winograd import Maps

Channels = Float[Array, " channel"]


def spread(channels: Channels) -> Float[Array, "1 1 1 channel"]:
    """Reshape a vector of channels so that it broadcasts against images."""
    return channels.reshape(1, 1, 1, -1)


def plain(
    x: Maps, scale: Channels, bias: Channels, epsilon: float, axis: str | None
) -> tuple[Maps, Channels, Channels]:
    """Return x normalised by the batch, the mean of the batch, and its unbiased variance."""
    return _forward(x, scale, bias, epsilon, axis)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: Maps, scale: Channels, bias: Channels, epsilon: float, axis: str | None
) -> tuple[Maps, Channels, Channels]:
    """Return the same as `plain`. Its gradient is written by hand (Ioffe & Szegedy 2015, sec. 3).

    The gradient needs fewer passes over the images than the automatic one, and stores only x.
    """
    return plain(x, scale, bias, epsilon, axis)


def _forward(
    x: Maps, scale: Channels, bias: Channels, epsilon: float, axis: str | None
) -> tuple[tuple[Maps, Channels, Channels], tuple]:
    mean, var = _moments(x, axis)
    rate = jax.lax.rsqrt(var + epsilon)
    y = (x - spread(mean)) * spread(scale * rate) + spread(bias)
    count = _count(x, axis)
    return (y, mean, var * (count / max(count - 1, 1))), (x, scale, mean, rate)


def _backward(epsilon: float, axis: str | None, saved: tuple, gradients: tuple) -> tuple:
    x, scale, mean, rate = saved
    g = gradients[0]
    centred = (x - spread(mean)) * spread(rate)
    by_bias, by_scale = g.sum((0, 1, 2)), (g * centred).sum((0, 1, 2))
    sums = jnp.stack([by_bias, by_scale])
    if axis:
        sums = jax.lax.psum(sums, axis)
    along_mean, along_var = sums / _count(x, axis)
    by_x = spread(scale * rate) * (g - spread(along_mean) - centred * spread(along_var))
    return by_x, by_scale, by_bias


normalise.defvjp(_forward, _backward)


def _moments(x: Maps, axis: str | None) -> tuple[Channels, Channels]:
    """Return the mean and the biased variance of each channel, over all mapped batches.

    The moments of all devices are gathered once and combined without cancellation (Chan, Golub &
    LeVeque 1983). This takes half as many collectives as averaging each moment over the devices.
    """
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - spread(mean)).mean((0, 1, 2))  # two passes: no cancellation
    if axis:
        means, variances = jax.lax.all_gather(jnp.stack([mean, var]), axis, axis=1)
        mean = means.mean(0)
        var = variances.mean(0) + jnp.square(means - mean).mean(0)
    return mean, var


def _count(x: Maps, axis: str | None) -> int:
    """Return the number of values in each channel, over all mapped batches."""
    return x.size // x.shape[-1] * (jax.lax.axis_size(axis) if axis else 1)
