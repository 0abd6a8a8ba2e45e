"""The computations that are written by hand, with plain ones in their place on request.

XLA compiles convolutions and their gradients poorly on CPUs, above all inside loops. "fast" holds
hand-written ones, which have gradients but no forward-mode derivatives. "plain" leaves everything
to XLA and differentiates in every mode. Both agree to rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from diffusion_jax.networks.kernels import batch_norm, convolution
from diffusion_jax.networks.kernels.batch_norm import Channels, spread
from diffusion_jax.networks.kernels.winograd import Maps

__all__ = ["KERNELS", "Channels", "Kernels", "Maps", "spread"]


class Kernels(NamedTuple):
    """A set of computations.

    convolve: (x, kernel) -> y, of odd size; keeps height and width, with zeros around the image.
    normalise: (x, scale, bias, epsilon, axis) -> (y, mean, unbiased variance), by the moments of
        the batch, which includes what is mapped over `axis`. Only y has gradients.
    """

    convolve: Callable[..., Array]
    normalise: Callable[..., tuple[Maps, Channels, Channels]]


KERNELS = {
    "fast": Kernels(convolution.convolve, batch_norm.normalise),
    "plain": Kernels(convolution.plain, batch_norm.plain),
}
