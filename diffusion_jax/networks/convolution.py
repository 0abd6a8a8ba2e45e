"""A convolution that is fast on CPUs, its gradients too, also inside loops."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from diffusion_jax.networks import winograd
from diffusion_jax.networks.winograd import Kernel, Maps


@jax.custom_vjp
def convolve(x: Maps, kernel: Kernel) -> Maps:
    """Convolve with a kernel of odd size, zeros around the image, height and width kept.

    On CPUs by Winograd's algorithm where it suits; elsewhere as the compiler likes.
    """
    return lax.platform_dependent(x, kernel, cpu=_on_cpu, default=_plain)


def _forward(x: Maps, kernel: Kernel) -> tuple[Maps, tuple[Maps, Kernel]]:
    return convolve(x, kernel), (x, kernel)


def _backward(saved: tuple[Maps, Kernel], g: Maps) -> tuple[Maps, Kernel]:
    return lax.platform_dependent(*saved, g, cpu=_gradients_on_cpu, default=_plain_gradients)


convolve.defvjp(_forward, _backward)


def _plain(x: Maps, kernel: Kernel) -> Maps:
    return _correlate(x, kernel, kernel.shape[0] // 2)


def _correlate(x: Maps, kernel: Array, pad: int) -> Maps:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=layout)


def _plain_gradients(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    return jax.vjp(_plain, x, kernel)[1](g)


def _on_cpu(x: Maps, kernel: Kernel) -> Maps:
    return (winograd.convolve if winograd.suits(x, kernel) else _plain)(x, kernel)


def _gradients_on_cpu(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    """By x: a convolution by the kernel turned round. By the kernel: of x by g, over the batch.

    XLA brings convolutions to the form that it has fast code for, except inside loops, where jax's
    own gradients are tens of times slower. These are in that form.
    """
    by_x = _on_cpu(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    if winograd.suits(x, kernel):
        return by_x, winograd.gradient_by_kernel(x, kernel, g)
    by_kernel = _correlate(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), kernel.shape[0] // 2)
    return by_x, by_kernel.transpose(1, 2, 0, 3)
