"""Distances between two sets of images: kernel, Frechet and sliced Wasserstein."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from diffusion_jax.evaluation.estimate import Estimate

BLOCKS = 10  # disjoint parts of a set, from whose scatter errors follow
RESAMPLES = 20  # bootstrap samples, from whose scatter the sliced Wasserstein's error follows
PROJECTIONS = 128  # random directions of the sliced Wasserstein distance

Rows = Float[np.ndarray, "n feature"]
Others = Float[np.ndarray, "m feature"]


def kernel_distance(x: Rows, y: Others) -> Estimate:
    """KID (Binkowski et al. 2018, arXiv:1801.01401): MMD^2 with the kernel (x.y / d + 1)^3.

    The unbiased estimate of all pairs, so that it may be negative. The error is a jackknife's that
    leaves out a block of both sets at a time; for equal distributions it is up to 1.6 times too
    large. Rows left over by the BLOCKS blocks are not used.
    """
    sizes = len(x) // BLOCKS, len(y) // BLOCKS
    a, b = (v[: BLOCKS * m].reshape(BLOCKS, m, -1) for v, m in zip((x, y), sizes, strict=True))
    of_a, of_b, across = _kernel_sums(a, a), _kernel_sums(b, b), _kernel_sums(a, b)
    for sums, rows in ((of_a, a), (of_b, b)):  # a row is no other row of its set
        own = (np.square(rows, dtype=np.float64).sum(2) / rows.shape[2] + 1) ** 3
        sums -= np.diag(own.sum(1))

    def without(block: int | None) -> float:
        kept = np.arange(BLOCKS) != block
        m, n = (kept.sum() * size for size in sizes)
        within_a, within_b, between = (s[kept][:, kept].sum() for s in (of_a, of_b, across))
        return within_a / (m * (m - 1)) + within_b / (n * (n - 1)) - 2 * between / (m * n)

    left = [without(block) for block in range(BLOCKS)]
    return Estimate(without(None), float(np.std(left) * np.sqrt(BLOCKS - 1)))


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "b b"]:
    """The kernel's sums over pairs of blocks: rows on the device, and their sums in float64."""
    return np.asarray(_row_sums(x, y), np.float64).sum(1)


@jax.jit
def _row_sums(x: Array, y: Array) -> Float[Array, "b m b"]:
    rows = y.reshape(-1, y.shape[2])

    def of_block(block: Array) -> Array:
        dots = jnp.matmul(block, rows.T, precision=lax.Precision.HIGHEST)
        return ((dots / block.shape[1] + 1) ** 3).reshape(len(block), *y.shape[:2]).sum(2)

    return lax.map(of_block, x)


def frechet_distance(x: Rows, y: Others) -> Estimate:
    """The Frechet distance of the Gaussians with the sets' means and covariances, in float64.

    Of any features: only of Inception's is it the FID. It is biased upwards by about the number
    of features over the number of images, in units of a feature's variance: look at real against
    real. The error is a jackknife's that leaves out a block of both sets at a time.
    """
    sums = [_block_sums(v) for v in (x, y)]

    def without(block: int | None) -> float:
        kept = np.arange(BLOCKS) != block
        return frechet(*(part for s in sums for part in _moments(*(v[kept].sum(0) for v in s))))

    left = [without(block) for block in range(BLOCKS)]
    return Estimate(without(None), float(np.std(left) * np.sqrt(BLOCKS - 1)))


def frechet(
    mean1: Float[np.ndarray, " d"],
    cov1: Float[np.ndarray, "d d"],
    mean2: Float[np.ndarray, " d"],
    cov2: Float[np.ndarray, "d d"],
) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1^1/2 cov2 cov1^1/2)^1/2) of two Gaussians."""
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov2 @ root)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(mean1 - mean2).sum() + trace)


def _block_sums(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of rows, their sum and the sum of their products, for each of BLOCKS blocks."""
    blocks = np.array_split(np.asarray(x, np.float64), BLOCKS)
    counts = np.array([len(block) for block in blocks])
    return counts, np.stack([b.sum(0) for b in blocks]), np.stack([b.T @ b for b in blocks])


def _moments(count: Any, total: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance. The rows are nearly centred already: nothing cancels."""
    centre = total / count
    return centre, (products - count * np.outer(centre, centre)) / (count - 1)


def sliced_wasserstein(x: Rows, y: Others, seed: int = 0) -> Estimate:
    """The 2-Wasserstein distance of the sets' projections, in the root mean square over directions.

    There are PROJECTIONS random directions; of the larger set, only as many rows as the other has
    are used. It is biased upwards: look at real against real. The error is by bootstrap.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(x.shape[1], PROJECTIONS))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)
    n = min(len(x), len(y))
    shadows = [np.asarray(_project(directions.T, v[:n].T)) for v in (x, y)]
    value = _distance_of_shadows(*shadows)
    picks = rng.integers(0, n, (RESAMPLES, 2, n))
    again = [_distance_of_shadows(shadows[0][:, i], shadows[1][:, j]) for i, j in picks]
    return Estimate(value, float(np.std(again, ddof=1)))


_project = jax.jit(partial(jnp.matmul, precision=lax.Precision.HIGHEST))


def _distance_of_shadows(x: np.ndarray, y: np.ndarray) -> float:
    """Of (direction, n); NumPy sorts a hundred times as fast as XLA on a CPU."""
    between = np.sort(x, 1) - np.sort(y, 1)
    return float(np.sqrt(np.mean(np.square(between, dtype=np.float64))))
