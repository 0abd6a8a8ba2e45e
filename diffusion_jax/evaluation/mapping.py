"""A function of many rows, in chunks of one size over all devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.parallel import merge, replicate, split

CHUNK = 512  # rows on a device at once


def map_rows(fn: Callable, shared: Any, rows: np.ndarray, devices: Sequence[jax.Device]) -> Any:
    """fn(shared, rows), a tree of arrays with a leading axis of rows; fn is from data_parallel."""
    shared = replicate(shared, devices)
    size = CHUNK * len(devices)
    parts = []
    for first in range(0, len(rows), size):
        chosen = np.minimum(np.arange(first, first + size), len(rows) - 1)  # the last is filled up
        parts.append(merge(jax.tree.map(np.asarray, fn(shared, split(rows[chosen], len(devices))))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(rows)], *parts)
