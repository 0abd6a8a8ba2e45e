"""The exact error of any tableau on Gaussian data, in float64, without sampling.

For independent x_0 ~ N(mean, variance) the exact denoiser is affine in x (Karras et al. 2022,
arXiv:2206.00364, app. B). Every row is then affine too, so that the state and the registers stay
Gaussian. Their mean and covariance follow from the table.
"""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray

from diffusion_jax.tableau import XI, Tableau
from diffusion_jax.typing import Level, RunWarning

CLEAN = Level(0.0, 1.0, 0.0)
FAR = 4.0  # a tableau is unstable if its samples have this many times the data's deviation


class Gaussian(NamedTuple):
    """A Gaussian distribution with independent coordinates: their means and variances."""

    mean: Float64[ndarray, "D"]
    variance: Float64[ndarray, "D"]

    def at(self, level: Level) -> "Gaussian":
        """Return the distribution of alpha x + sigma xi, where xi ~ N(0, I)."""
        variance = level.alpha**2 * self.variance + level.sigma**2
        return Gaussian(level.alpha * self.mean, variance)


def spectrum(data: Float[ndarray, "N D"]) -> Gaussian:
    """Return the Gaussian with the mean and covariance of data, in principal coordinates.

    These coordinates are independent, and a sampler treats all coordinates in the same way. So its
    errors are those on the Gaussian with the whole covariance.
    """
    variance, directions = np.linalg.eigh(np.atleast_2d(np.cov(data, rowvar=False)))
    return Gaussian(data.mean(0, dtype=np.float64) @ directions, np.maximum(variance, 0))


def push(tableau: Tableau, data: Gaussian, start: Gaussian | None = None) -> Gaussian:
    """Return the exact distribution of the samples if the denoiser is exact for the data.

    start: the distribution before the first row; by default, that of the data at the first level.
    """
    outputs = tableau.mix.shape[1]
    if start is None:
        start = data.at(Level(tableau.t[0], tableau.alpha[0], tableau.sigma[0]))
    mean = np.zeros((len(data.mean), outputs))
    covariance = np.zeros((len(data.mean), outputs, outputs))
    mean[:, 0], covariance[:, 0, 0] = start
    for alpha, sigma, mix in zip(tableau.alpha, tableau.sigma, tableau.mix, strict=True):
        total = alpha**2 * data.variance + sigma**2
        slope = np.stack([np.ones_like(total), alpha * data.variance / total, sigma / total], 1)
        offset = np.stack([0 * total, sigma**2 / total, -alpha * sigma / total], 1)
        held = np.broadcast_to(mix[:, XI + 1 :], (len(total), outputs, outputs - 1))
        linear = np.concatenate([(slope @ mix[:, :XI].T)[:, :, None], held], 2)
        mean = (linear @ mean[:, :, None])[:, :, 0] + offset @ mix[:, :XI].T * data.mean[:, None]
        covariance = linear @ covariance @ linear.transpose(0, 2, 1)
        covariance += np.outer(mix[:, XI], mix[:, XI])
    return Gaussian(mean[:, 0], covariance[:, 0, 0])


def wasserstein(one: Gaussian, other: Gaussian) -> float:
    """Return the 2-Wasserstein distance of two distributions."""
    spread = np.sqrt(one.variance) - np.sqrt(other.variance)
    return float(np.sqrt(np.sum((one.mean - other.mean) ** 2 + spread**2)))


def error(tableau: Tableau, data: Gaussian, end: Level = CLEAN) -> float:
    """Return the 2-Wasserstein distance of samples and data at the level where the tableau ends."""
    return wasserstein(push(tableau, data), data.at(end))


def warn_if_unstable(tableau: Tableau, name: str) -> None:
    """Issue a RunWarning if the samples of N(0, 1) data are spread far too widely.

    Tableaux of more than 1,000 rows are not checked, because their steps are small.
    """
    if tableau.rows > 1000:
        return
    with np.errstate(all="ignore"):
        deviation = np.sqrt(push(tableau, Gaussian(np.zeros(1), np.ones(1))).variance[0])
    if not deviation < FAR:
        what = f"{name} with {int(tableau.ends_step.sum())} steps on this grid is unstable"
        spread = f"its samples of data of standard deviation 1 have {deviation:.3g}"
        warnings.warn(f"{what}: {spread}; take more steps", RunWarning, stacklevel=3)


def fit_order(steps: ndarray, errors: ndarray) -> float:
    """Return the order p of errors that fall as steps^-p, from their slope in logarithms."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
