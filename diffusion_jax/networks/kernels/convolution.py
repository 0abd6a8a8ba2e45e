"""A convolution that is fast on CPUs, even inside loops, and so are its gradients."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from diffusion_jax.networks.kernels import winograd
from diffusion_jax.networks.kernels.winograd import Kernel, Maps

FEW = 8  # with fewer channels, patches are not worth copying


def plain(x: Maps, kernel: Kernel) -> Maps:
    """Convolve with a kernel of odd size and zero padding. Keep height and width."""
    return _correlate(x, kernel, kernel.shape[0] // 2)


@jax.custom_vjp
def convolve(x: Maps, kernel: Kernel) -> Maps:
    """Return the same as `plain`. On CPUs, use Winograd's algorithm where it is faster."""
    return lax.platform_dependent(x, kernel, cpu=_on_cpu, default=plain)


def _forward(x: Maps, kernel: Kernel) -> tuple[Maps, tuple[Maps, Kernel]]:
    return convolve(x, kernel), (x, kernel)


def _backward(saved: tuple[Maps, Kernel], g: Maps) -> tuple[Maps, Kernel]:
    return lax.platform_dependent(*saved, g, cpu=_gradients_on_cpu, default=_plain_gradients)


convolve.defvjp(_forward, _backward)


def _correlate(x: Maps, kernel: Array, pad: int) -> Maps:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=layout)


def _plain_gradients(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    return jax.vjp(plain, x, kernel)[1](g)


def _on_cpu(x: Maps, kernel: Kernel) -> Maps:
    return (winograd.convolve if winograd.suits(x, kernel) else plain)(x, kernel)


def _gradients_on_cpu(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    """Return the gradients with respect to x and the kernel.

    The gradient with respect to x is a convolution with the flipped kernel. XLA rewrites
    convolutions to a form for which it has fast code, but not inside loops, where JAX's own
    gradients are tens of times slower. The gradients here are written in that form.
    """
    by_x = _on_cpu(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    if winograd.suits(x, kernel):
        return by_x, winograd.gradient_by_kernel(x, kernel, g)
    size, *_, inputs, _ = kernel.shape
    by_kernel = _by_patches if size > 1 and inputs >= FEW else _over_batch
    return by_x, by_kernel(x, g, size)


def _over_batch(x: Maps, g: Maps, size: int) -> Kernel:
    """Convolve x with g over the batch. The rounding depends on the number of devices."""
    pad = size // 2
    return _correlate(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), pad).transpose(1, 2, 0, 3)


def _by_patches(x: Maps, g: Maps, size: int) -> Kernel:
    """Sum the products of g and patches of x over parts of the batch that fit in the cache.

    The patches of all parts are written into one buffer, because XLA copies a concatenation twice.
    """
    batch, height, width, channels = x.shape
    part = winograd.fitting(batch, height * width * size**2 * channels * x.dtype.itemsize)
    x = jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))

    def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, patches = carry
        for n in range(size**2):
            corner = i * part, n // size, n % size, 0
            window = lax.dynamic_slice(x, corner, (part, height, width, channels))
            patches = patches.at[..., n * channels : (n + 1) * channels].set(window)
        of = lax.dynamic_slice_in_dim(g, i * part, part)
        product = jnp.einsum("bhwo,bhwp->op", of, patches, preferred_element_type=total.dtype)
        return total + product, patches

    patches = jnp.zeros((part, height, width, size**2 * channels), x.dtype)
    wide = x.dtype if x.dtype.itemsize > 4 else jnp.float32  # a sum in bfloat16 loses small terms
    total = jnp.zeros((g.shape[-1], size**2 * channels), wide)
    total, _ = lax.fori_loop(0, batch // part, add, (total, patches))
    return total.reshape(-1, size, size, channels).transpose(1, 2, 3, 0).astype(x.dtype)
