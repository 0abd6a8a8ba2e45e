"""A number with its standard error."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A measured value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """Both, to as many places as the error is known to."""
        places = int(np.clip(1 - np.floor(np.log10(self.error)), 0, 7)) if self.error > 0 else 4
        return f"{self.value:.{places}f} +- {self.error:.{places}f}"


def mean(values: ArrayLike) -> Estimate:
    """The mean of independent values, and its standard error."""
    values = np.asarray(values, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
