"""Nearest neighbours, and the measures that rest on them; distances are Euclidean, in blocks."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from diffusion_jax.evaluation.estimate import Estimate, mean
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.parallel import data_parallel

PRECISION_K = 3  # the neighbours of Kynkaanniemi et al.
COVERAGE_K = 5  # the neighbours of Naeem et al.
BLOCK = 2048  # points whose distances to a part of the queries are in memory at once

Rows = Num[np.ndarray, "n feature"]  # uint8 pixels, or features in float32
Points = Num[np.ndarray, "m feature"]


class Neighbours(NamedTuple):
    """For each query, its nearest points: distances, ascending, and the points' numbers."""

    distances: Float[np.ndarray, "n k"]
    indices: Int[np.ndarray, "n k"]


def nearest(queries: Rows, points: Points, k: int, devices: Sequence[jax.Device]) -> Neighbours:
    """The k nearest points of each query. k must not exceed the number of points."""
    found = map_rows(_nearest(k, tuple(devices)), _blocks(points), queries, devices)
    return Neighbours(np.sqrt(found[0]), found[1])


def balls(
    queries: Rows, points: Points, radii: Float[np.ndarray, " m"], devices: Sequence[jax.Device]
) -> Int[np.ndarray, " n"]:
    """How many of the balls of these radii around the points each query lies in."""
    shared = (*_blocks(points), _pad(np.square(radii).astype(np.float32), -1.0))
    return map_rows(_balls(tuple(devices)), shared, queries, devices)


def precision_recall(
    real: Rows, fake: Points, devices: Sequence[jax.Device]
) -> dict[str, Estimate]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), k = 3.

    precision: the part of fake that lies in the union of balls around real that reach to the
    k-th neighbour; recall the other way round. Errors are of the images that are counted, with
    the balls held fixed.
    """
    inside = balls(fake, real, radii(real, PRECISION_K, devices), devices) > 0
    reached = balls(real, fake, radii(fake, PRECISION_K, devices), devices) > 0
    return {"precision": mean(inside), "recall": mean(reached)}


def density_coverage(
    real: Rows, fake: Points, devices: Sequence[jax.Device]
) -> dict[str, Estimate]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797), k = 5.

    density: how many balls around real an image of fake lies in, over k; near 1 where fake is
    distributed as real. coverage: the part of the balls that hold an image of fake. Errors as in
    precision_recall.
    """
    reach = radii(real, COVERAGE_K, devices)
    covered = nearest(real, fake, 1, devices).distances[:, 0] <= reach
    return {
        "density": mean(balls(fake, real, reach, devices) / COVERAGE_K),
        "coverage": mean(covered),
    }


def radii(points: Rows, k: int, devices: Sequence[jax.Device]) -> Float[np.ndarray, " n"]:
    """The distance of each point to its k-th nearest other point."""
    return nearest(points, points, k + 1, devices).distances[:, k]


def _blocks(points: Rows) -> tuple[Any, Any]:
    """Points in blocks, and which of them are real: the last block is filled up."""
    valid = _pad(np.ones(len(points), bool), False)
    return _pad(points, 0), valid


def _pad(values: np.ndarray, fill: Any) -> np.ndarray:
    surplus = -len(values) % BLOCK
    padded = np.concatenate([values, np.full((surplus, *values.shape[1:]), fill, values.dtype)])
    return padded.reshape(-1, BLOCK, *values.shape[1:])


def _squared(queries: Array, points: Array, valid: Array) -> Array:
    """Squared distances (query, point), infinite for points that are none."""
    q, p = queries.astype(jnp.float32), points.astype(jnp.float32)
    dots = jnp.matmul(q, p.T, precision=lax.Precision.HIGHEST)
    squares = jnp.square(q).sum(1)[:, None] + jnp.square(p).sum(1)[None, :]
    return jnp.where(valid[None, :], jnp.maximum(squares - 2 * dots, 0.0), jnp.inf)


@lru_cache
def _nearest(k: int, devices: tuple[jax.Device, ...]) -> Any:
    def on_one_device(points: Any, queries: Array) -> tuple[Array, Array]:
        def body(best: tuple[Array, Array], block: tuple) -> tuple[tuple[Array, Array], None]:
            number, rows, valid = block
            squares = _squared(queries, rows, valid)
            near, where = smallest(squares, k)
            values = jnp.concatenate([best[0], near], 1)
            indices = jnp.concatenate([best[1], where + number * BLOCK], 1)
            values, chosen = smallest(values, k)
            return (values, jnp.take_along_axis(indices, chosen, 1)), None

        numbers = jnp.arange(len(points[0]), dtype=jnp.int32)
        shape = (len(queries), k)
        start = (jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32))
        return lax.scan(body, start, (numbers, *points))[0]

    return data_parallel(on_one_device, (None, 0), (0, 0), devices=devices)


def smallest(values: Float[Array, "n m"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k smallest entries of each row, ascending, and where they are."""
    if k == 1:
        where = jnp.argmin(values, 1, keepdims=True).astype(jnp.int32)
        return jnp.take_along_axis(values, where, 1), where
    near, where = lax.top_k(-values, k)
    return -near, where


@lru_cache
def _balls(devices: tuple[jax.Device, ...]) -> Any:
    def on_one_device(points: Any, queries: Array) -> Array:
        def body(count: Array, block: tuple) -> tuple[Array, None]:
            rows, valid, reach = block
            inside = _squared(queries, rows, valid) <= reach[None, :]
            return count + inside.sum(1, dtype=jnp.int32), None

        return lax.scan(body, jnp.zeros(len(queries), jnp.int32), points)[0]

    return data_parallel(on_one_device, (None, 0), 0, devices=devices)
