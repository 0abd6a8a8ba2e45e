"""A number with its standard error."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike

BLOCKS = 10  # disjoint parts of a set, whose scatter gives the error


class Estimate(NamedTuple):
    """A measured value and its standard error; left: the values without each block, if known."""

    value: float
    error: float
    left: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Return value and error as text, with the digits that the error justifies."""
        places = int(np.clip(1 - np.floor(np.log10(self.error)), 0, 7)) if self.error > 0 else 4
        return f"{self.value:.{places}f} +- {self.error:.{places}f}"


def mean(values: ArrayLike) -> Estimate:
    """Return the mean of independent values, and its standard error."""
    values = np.asarray(values, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def jackknife(measure: Callable[[Bool[np.ndarray, " block"]], float]) -> Estimate:
    """Return a measure of all blocks of a set, and its error by leaving out one block at a time.

    measure: a function of the mask of the blocks to use, of shape (BLOCKS,).
    """
    blocks = np.arange(BLOCKS)
    left = [measure(blocks != block) for block in blocks]
    return from_left(measure(blocks >= 0), left)


def from_left(value: float, left: ArrayLike) -> Estimate:
    """Return the jackknife's estimate. left: the values without each block."""
    left = np.asarray(left, np.float64)
    return Estimate(value, float(np.std(left) * np.sqrt(len(left) - 1)), tuple(left.tolist()))
