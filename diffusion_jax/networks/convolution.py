"""A convolution whose gradients are fast inside loops too.

XLA's CPU compiler brings convolutions to the form that it has fast code for, except inside loops.
The forward pass is in that form; jax's gradients of it are not, and make a training step in a
fori_loop tens of times slower. Here they are written in that form.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Maps = Float[Array, "batch _ _ _"]  # images whose size or channels a layer changes
Kernel = Float[Array, "size size in_features out_features"]


@jax.custom_vjp
def convolve(x: Maps, kernel: Kernel) -> Maps:
    """Convolve with a kernel of odd size, zeros around the image, height and width kept."""
    return _correlate(x, kernel, kernel.shape[0] // 2)


def _correlate(x: Maps, kernel: Array, pad: int) -> Maps:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=layout)


def _forward(x: Maps, kernel: Kernel) -> tuple[Maps, tuple[Maps, Kernel]]:
    return convolve(x, kernel), (x, kernel)


def _backward(saved: tuple[Maps, Kernel], g: Maps) -> tuple[Maps, Kernel]:
    return lax.platform_dependent(*saved, g, cpu=_gradients, default=_automatic_gradients)


def _gradients(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    """Both gradients are convolutions: by the kernel turned round, and of x by g over the batch."""
    pad = kernel.shape[0] // 2
    turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    by_kernel = _correlate(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), pad)
    return _correlate(g, turned, pad), by_kernel.transpose(1, 2, 0, 3)


def _automatic_gradients(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    return jax.vjp(lambda x, kernel: _correlate(x, kernel, kernel.shape[0] // 2), x, kernel)[1](g)


convolve.defvjp(_forward, _backward)
