"""Moving averages of the weights: how fast they follow, and others made of them afterwards.

A power-function average of t steps (Karras et al. 2023, arXiv:2312.02696, section 3.1) weighs step
s by s^gamma; sigma_rel is the standard deviation of those weights as a part of t. Step s holds
exactly the weight of the interval (s - 1, s] under the profile (gamma + 1) s^gamma / t^(gamma + 1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int
from numpy import ndarray

from diffusion_jax.typing import require

SIGMA_RELS = (0.05, 0.10)  # of the averages whose snapshots are stored
LARGEST = 12**-0.5  # sigma_rel of the plain mean of all steps, gamma = 0


class Profile(NamedTuple):
    """A power-function average at the end of step `step`, which counts from 1."""

    step: int
    sigma_rel: float


class Combination(NamedTuple):
    """A sum of averages that stands for another; error: its profile's, relative, in L2."""

    coefficients: Float64[ndarray, "profiles"]
    error: float


def check(sigma_rel: float, name: str = "sigma_rel") -> None:
    """Raise InputError unless there is a power-function average of that relative width."""
    require(
        0 < sigma_rel < LARGEST, f"{name}={sigma_rel}: it must be above 0 and below {LARGEST:.4f}"
    )


def power(sigma_rel: float) -> float:
    """gamma: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of s / t."""
    inverse = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def _exponential(step: Array, decay: float, sigma_rel: float) -> Array:
    # Shorter averages at the start, so that the initial weights fade.
    return 1 - jnp.minimum(decay, (1 + step) / (10 + step))


def _power(step: Array, decay: float, sigma_rel: float) -> Array:
    # 1 - (1 - 1 / t)^(gamma + 1) with t = step + 1, which float32 cannot form so.
    return -jnp.expm1((power(sigma_rel) + 1) * jnp.log1p(-1 / (step + 1)))


# (step, counted from 0; decay; sigma_rel) -> the part of the average that the new weights get.
EMA_PROFILES: dict[str, Callable[[Int[Array, ""], float, float], Float[Array, ""]]] = {
    "exponential": _exponential,
    "power": _power,
}


def snapshot_steps(steps: int, count: int) -> set[int]:
    """The ends of count equal parts of a run, in whole steps."""
    return {-(-steps * part // count) for part in range(1, count + 1)}


def combine(profiles: Sequence[Profile], target: Profile) -> Combination:
    """Return the sum of averages whose profile is nearest to the target's, by least squares.

    The coefficients are then divided by their sum, as in EDM2's code: a weight that never changes
    keeps its value. Karras et al. 2023, app. C. Raises InputError for an invalid sigma_rel.
    """
    for profile in (*profiles, target):
        check(profile.sigma_rel)
    steps, powers = _parameters(profiles)
    end, gamma = _parameters([target])
    between = _inner(steps[:, None], powers[:, None], steps, powers)
    aim = _inner(steps, powers, end, gamma)
    square = _inner(end, gamma, end, gamma)[0]
    coefficients = np.linalg.lstsq(between, aim, rcond=None)[0]
    coefficients /= coefficients.sum()
    left = square - 2 * coefficients @ aim + coefficients @ between @ coefficients
    return Combination(coefficients, float(np.sqrt(max(left, 0) / square)))


def _parameters(profiles: Sequence[Profile]) -> tuple[ndarray, ndarray]:
    steps = np.array([profile.step for profile in profiles], np.float64)
    return steps, np.array([power(profile.sigma_rel) for profile in profiles])


def _inner(t: ndarray, gamma: ndarray, u: ndarray, delta: ndarray) -> ndarray:
    """The integrals of the products of the profiles (t, gamma) and (u, delta)."""
    shorter, longer = np.minimum(t, u), np.maximum(t, u)
    overlap = (shorter / t) ** gamma * (shorter / u) ** delta
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * overlap / longer
