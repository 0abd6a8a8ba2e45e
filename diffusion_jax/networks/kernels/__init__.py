"""Computations written by hand, and plain ones that can be chosen instead.

XLA compiles convolutions and their gradients poorly on CPUs, above all inside loops. "fast" holds
hand-written computations, which have gradients but no forward-mode derivatives. "plain" leaves
everything to XLA and can be differentiated in every mode. Both agree up to rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from diffusion_jax.networks.kernels import batch_norm, convolution
from diffusion_jax.networks.kernels.batch_norm import Channels, spread
from diffusion_jax.networks.kernels.winograd import Maps

__all__ = ["KERNELS", "Channels", "Kernels", "Maps", "spread"]


class Kernels(NamedTuple):
    """One implementation of each computation.

    convolve: (x, kernel) -> y, for kernels of odd size. It keeps height and width, and pads the
    image with zeros.
    normalise: (x, scale, bias, epsilon, axis) -> (y, mean, unbiased variance). The mean and the
    variance are those of the batch, joined over all devices of `axis`. Only y has gradients.
    """

    convolve: Callable[..., Array]
    normalise: Callable[..., tuple[Maps, Channels, Channels]]


KERNELS = {
    "fast": Kernels(convolution.convolve, batch_norm.normalise),
    "plain": Kernels(convolution.plain, batch_norm.plain),
}
