"""Map a function over many rows, in chunks of one size on all devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.parallel import merge, replicate, split

CHUNK = 512  # rows on a device at once


def map_rows(
    fn: Callable,
    shared: Any,
    rows: Any,
    devices: Sequence[jax.Device],
    chunk: int = CHUNK,
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Return fn(shared, rows), a tree of arrays with a leading axis of rows.

    fn: from data_parallel. rows: an array, or a tree of arrays of equal length. chunk: the rows on
    a device at once. progress: called with the number of rows that all devices have just done.
    """
    shared = replicate(shared, devices)
    count, size = len(jax.tree.leaves(rows)[0]), chunk * len(devices)
    parts = []
    for first in range(0, count, size):
        chosen = np.minimum(np.arange(first, first + size), count - 1)  # the last one is padded
        some = split(jax.tree.map(lambda leaf, at=chosen: leaf[at], rows), len(devices))
        parts.append(merge(jax.tree.map(np.asarray, fn(shared, some))))
        if progress is not None:
            progress(min(size, count - first))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
