"""Winograd's algorithm F(2 x 2, 3 x 3) for convolutions and their gradients by the kernel.

A tile of 2 x 2 outputs is computed from 4 x 4 inputs with 16 products for each pair of channels,
where a plain convolution needs 36. Its rounding errors have the same size. See Lavin & Gray (2016),
"Fast Algorithms for Convolutional Neural Networks", section 4.1. Their equation is
Y = A^T [(G k G^T) * (B^T d B)] A. Here OUTPUT is A^T, KERNEL is G and _inputs is B^T, each for both
directions at once.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Maps = Float[Array, "batch _ _ _"]  # height, width and channels may change in a layer
Kernel = Float[Array, "size size in_features out_features"]

WORTH = 32 * 64  # pairs of channels: with fewer, the transformations take longer than the products
CACHE = 4 * 2**20  # bytes that the transforms of one part of a batch may take
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
KERNEL, OUTPUT = np.kron(_G, _G), np.kron(_A, _A).T  # (16, 9) and (4, 16), for both directions


def suits(x: Maps, kernel: Kernel) -> bool:
    """Return whether this algorithm can compute a convolution, and is faster at it."""
    _, height, width, _ = x.shape
    even = height % 2 == width % 2 == 0
    wide = x.dtype.itemsize >= 4  # bfloat16 is too coarse for the transforms
    return kernel.shape[:2] == (3, 3) and kernel[0, 0].size >= WORTH and even and wide


def convolve(x: Maps, kernel: Kernel) -> Maps:
    """Convolve with zero padding, in parts of the batch that fit in the cache."""
    batch, height, width, _ = x.shape
    inputs, outputs = kernel.shape[2:]
    kernels = _times(KERNEL, kernel).reshape(16, inputs, outputs)

    def part(x: Maps) -> Maps:
        products = jnp.einsum("tbhwi,tio->tbhwo", _inputs(x), kernels)
        tiles = _times(OUTPUT, products).reshape(2, 2, -1, height // 2, width // 2, outputs)
        return tiles.transpose(2, 3, 0, 4, 1, 5).reshape(-1, height, width, outputs)

    return lax.map(part, _parts(x, kernel)).reshape(batch, height, width, outputs)


def gradient_by_kernel(x: Maps, kernel: Kernel, g: Maps) -> Kernel:
    """Return the gradient with respect to the kernel, which is the adjoint of `convolve`.

    It sums the products of transformed inputs and transformed gradients over all tiles. Gradients
    are transposed before the transform, because the transform makes them larger.
    """
    inputs, outputs = kernel.shape[2:]

    def transposed(g: Maps) -> Array:
        batch, height, width, _ = g.shape
        tiles = g.reshape(batch, height // 2, 2, width // 2, 2, outputs)
        return tiles.transpose(2, 4, 5, 0, 1, 3)

    def add(total: Array, part: tuple[Maps, Array]) -> tuple[Array, None]:
        x, tiles = part
        gradients = _times(OUTPUT.T, tiles).reshape(16, *tiles.shape[2:])
        return total + jnp.einsum("tobhw,tbhwi->toi", gradients, _inputs(x)), None

    xs = _parts(x, kernel)
    gs = lax.map(transposed, g.reshape(*xs.shape[:2], *g.shape[1:]))
    total, _ = lax.scan(add, jnp.zeros((16, outputs, inputs), g.dtype), (xs, gs))
    return _times(KERNEL.T, total).reshape(3, 3, outputs, inputs).swapaxes(2, 3)


def _parts(x: Maps, kernel: Kernel) -> Float[Array, "parts part _ _ _"]:
    """Split the batch into parts, and pad each image by one pixel on every side."""
    batch, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    if not isinstance(batch, int):  # symbolic, in an export
        return padded[None]
    bytes_each = 4 * height * width * max(kernel.shape[2:]) * x.dtype.itemsize
    return padded.reshape(-1, fitting(batch, bytes_each), *padded.shape[1:])


def fitting(batch: int, bytes_each: int) -> int:
    """Return the largest divisor of `batch` such that this number of images fits in the cache."""
    divisors = (n for n in range(1, batch + 1) if batch % n == 0)
    return max((n for n in divisors if n * bytes_each <= CACHE), default=1)


def _inputs(x: Maps) -> Float[Array, "16 batch _ _ channel"]:
    """Transform all tiles of 4 x 4. They begin at every second pixel of the padded images."""
    height, width = x.shape[1] - 3, x.shape[2] - 3
    pixels = [[x[:, i : i + height : 2, j : j + width : 2] for i in range(4)] for j in range(4)]
    rows = zip(*(_combine(*column) for column in pixels), strict=True)
    stacked = jnp.stack([jnp.stack(_combine(*row)) for row in rows])  # nested, so XLA fuses more
    return stacked.reshape(16, *stacked.shape[2:])


def _combine(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    """Multiply four rows or columns by B^T of the paper."""
    return a - c, b + c, c - b, b - d


def _times(matrix: np.ndarray, x: Array) -> Float[Array, "rows _"]:
    """Multiply x by a matrix from the left. The first axes of x match the columns of the matrix."""
    return jnp.asarray(matrix, x.dtype) @ x.reshape(matrix.shape[1], -1)
