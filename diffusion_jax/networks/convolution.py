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

FEW = 8  # channels: patches of fewer are not worth their copying
CACHE = 6 * 2**20  # bytes of patches at once


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
    """By x: a convolution by the kernel turned round. By the kernel: products of g and patches."""
    pad = kernel.shape[0] // 2
    turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    by_kernel = _by_kernel if x.shape[-1] >= FEW and pad else _by_kernel_of_few
    return _correlate(g, turned, pad), by_kernel(x, g, kernel.shape[0])


def _by_kernel(x: Maps, g: Maps, size: int) -> Kernel:
    """Sum over parts of the batch, each small enough that its patches stay in the cache.

    The patches of all parts are written into one buffer: XLA copies those of a concatenation twice.
    """
    batch, height, width, channels = x.shape
    bytes_each = height * width * size**2 * channels * x.dtype.itemsize
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * bytes_each <= CACHE]
    part = max(fitting, default=1)
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
    wide = x.dtype if x.dtype.itemsize > 4 else jnp.float32  # bfloat16 would lose what is added
    total = jnp.zeros((g.shape[-1], size**2 * channels), wide)
    total, _ = lax.fori_loop(0, batch // part, add, (total, patches))
    return total.reshape(-1, size, size, channels).transpose(1, 2, 3, 0).astype(x.dtype)


def _by_kernel_of_few(x: Maps, g: Maps, size: int) -> Kernel:
    """Convolve x by g over the batch."""
    pad = size // 2
    return _correlate(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), pad).transpose(1, 2, 0, 3)


def _automatic_gradients(x: Maps, kernel: Kernel, g: Maps) -> tuple[Maps, Kernel]:
    return jax.vjp(lambda x, kernel: _correlate(x, kernel, kernel.shape[0] // 2), x, kernel)[1](g)


convolve.defvjp(_forward, _backward)
