"""Distances between two sets of images: kernel, Frechet and sliced Wasserstein."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from diffusion_jax.evaluation.estimate import BLOCKS, Estimate, jackknife

PROJECTIONS = 128  # random directions of the sliced Wasserstein distance

Rows = Float[np.ndarray, "n feature"]
Others = Float[np.ndarray, "m feature"]


def kernel_distance(x: Rows, y: Others) -> Estimate:
    """Return KID (Binkowski et al. 2018, arXiv:1801.01401): MMD^2 with kernel (x.y / d + 1)^3.

    It is the unbiased estimate over all pairs, so it can be negative. The jackknife leaves out one
    block of both sets at a time. If the distributions are equal, its error is up to 1.6 times too
    large. Rows that do not fill the BLOCKS blocks are not used.
    """
    sizes = len(x) // BLOCKS, len(y) // BLOCKS
    a, b = (v[: BLOCKS * m].reshape(BLOCKS, m, -1) for v, m in zip((x, y), sizes, strict=True))
    of_a, of_b, across = _kernel_sums(a, a), _kernel_sums(b, b), _kernel_sums(a, b)
    for sums, rows in ((of_a, a), (of_b, b)):  # leave out pairs of a row with itself
        own = (np.square(rows, dtype=np.float64).sum(2) / rows.shape[2] + 1) ** 3
        sums -= np.diag(own.sum(1))

    def mmd(kept: np.ndarray) -> float:
        m, n = (kept.sum() * size for size in sizes)
        within_a, within_b, between = (s[kept][:, kept].sum() for s in (of_a, of_b, across))
        return within_a / (m * (m - 1)) + within_b / (n * (n - 1)) - 2 * between / (m * n)

    return jackknife(mmd)


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "b b"]:
    """Sum the kernel over pairs of blocks: along rows on the device, then in float64."""
    return np.asarray(_row_sums(x, y), np.float64).sum(1)


@jax.jit
def _row_sums(x: Array, y: Array) -> Float[Array, "b m b"]:
    rows = y.reshape(-1, y.shape[2])

    def of_block(block: Array) -> Array:
        dots = jnp.matmul(block, rows.T, precision=lax.Precision.HIGHEST)
        return ((dots / block.shape[1] + 1) ** 3).reshape(len(block), *y.shape[:2]).sum(2)

    return lax.map(of_block, x)


def frechet_distance(x: Rows, y: Others) -> Estimate:
    """Return the Frechet distance of Gaussians with the moments of the sets, in float64.

    It equals the FID only in Inception's features. In units of a feature's variance, it is too
    large by about the number of features divided by the number of images. So compare it with the
    distance of real images from real images.
    """
    sums = [_block_sums(v) for v in (x, y)]
    return jackknife(
        lambda kept: frechet(*(part for s in sums for part in _moments(*(v[kept] for v in s))))
    )


def frechet(
    mean1: Float[np.ndarray, " d"],
    cov1: Float[np.ndarray, "d d"],
    mean2: Float[np.ndarray, " d"],
    cov2: Float[np.ndarray, "d d"],
) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of two Gaussians."""
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov2 @ root)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(mean1 - mean2).sum() + trace)


def _block_sums(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of rows, their sum and the sum of their products, for each block."""
    blocks = np.array_split(np.asarray(x, np.float64), BLOCKS)
    counts = np.array([len(block) for block in blocks])
    return counts, np.stack([b.sum(0) for b in blocks]), np.stack([b.T @ b for b in blocks])


def _moments(counts: Any, totals: np.ndarray, products: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return mean and unbiased covariance. Rows are nearly centred, so no digits are lost."""
    count = counts.sum()
    centre = totals.sum(0) / count
    return centre, (products.sum(0) - count * np.outer(centre, centre)) / (count - 1)


def sliced_wasserstein(x: Rows, y: Others, seed: int = 0) -> Estimate:
    """Return the root mean square of the projections' 2-Wasserstein distances over directions.

    There are PROJECTIONS random directions. The larger set is cut to the size of the smaller one.
    The distance is biased upwards, so compare it with that of real images from real images.
    """
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], PROJECTIONS))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)
    n = min(len(x), len(y))
    shadows = [directions.T @ v[:n].T for v in (x, y)]
    block = np.arange(n) * BLOCKS // n

    def distance(kept: np.ndarray) -> float:
        ours, theirs = (np.sort(shadow[:, kept[block]], 1) for shadow in shadows)
        return float(np.sqrt(np.mean(np.square(ours - theirs, dtype=np.float64))))

    return jackknife(distance)
