"""Moving averages of the weights, and other averages that are made from them after a run.

A power-function average of t steps (Karras et al. 2023, arXiv:2312.02696, section 3.1) weights step
s in proportion to s^gamma. sigma_rel is the standard deviation of these weights divided by t. The
weight of step s is the integral of the profile (gamma + 1) s^gamma / t^(gamma + 1) over (s - 1, s].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int
from numpy import ndarray

from diffusion_jax import spec
from diffusion_jax.typing import require

SIGMA_RELS = (0.05, 0.10)  # the widths of the averages whose snapshots are stored
WIDEST = 12**-0.5  # sigma_rel of the plain mean of all steps, gamma = 0


class Profile(NamedTuple):
    """A power-function average at the end of step `step`. Steps count from 1."""

    step: int
    sigma_rel: float


class Combination(NamedTuple):
    """A weighted sum of averages that approximates a target average.

    error: the relative L2 error of its profile.
    """

    coefficients: Float64[ndarray, "profiles"]
    error: float


class Average(NamedTuple):
    """A moving average of the weights.

    rate: the share of the newest weights in the average after each step; steps count from 0.
    snapshots: how often two power averages are stored during a run; 0 means never. Other averages
    can be made from them after the run (experiments.convert).
    """

    rate: Callable[[Int[Array, ""]], Float[Array, ""]]
    snapshots: int = 0


def none() -> Average:
    """No average: the last weights are used for sampling."""
    return Average(lambda step: jnp.ones(()))


def exponential(decay: float = 0.999, snapshots: int = 0) -> Average:
    """Exponential average, shorter at the start so that the initial weights fade."""
    require(0 <= decay < 1, f"decay={decay}: it must be in [0, 1)")
    _check_snapshots(snapshots)
    return Average(lambda step: 1 - jnp.minimum(decay, (1 + step) / (10 + step)), snapshots)


def power(sigma_rel: float = 0.1, snapshots: int = 0) -> Average:
    """Power-function average: Karras et al. 2023, arXiv:2312.02696, section 3.1.

    sigma_rel: the width of the average as a part of the run so far, up to 0.28.
    """
    gamma = power_of(sigma_rel)
    _check_snapshots(snapshots)
    # This is 1 - (1 - 1 / t)^(gamma + 1), t = step + 1, in a form that is accurate in float32.
    return Average(lambda step: -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1))), snapshots)


AVERAGES: dict[str, Callable[..., Average]] = {
    "none": none,
    "exponential": exponential,
    "power": power,
}


def build(text: str) -> Average:
    """Return the average that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, AVERAGES, "ema")


def _check_snapshots(snapshots: int) -> None:
    require(0 <= snapshots <= 1024, f"snapshots={snapshots}: it must be in 0..1024")


def power_of(sigma_rel: float) -> float:
    """Return the gamma of a given sigma_rel.

    sigma_rel^2 is the variance of s / t, which is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Raise
    InputError if no power-function average has this relative width.
    """
    fits = 0 < sigma_rel < WIDEST
    require(fits, f"sigma_rel={sigma_rel}: it must be above 0 and below {WIDEST:.4f}")
    inverse = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


def snapshot_steps(steps: int, count: int) -> set[int]:
    """Return the ends of `count` equal parts of a run, rounded up to whole steps."""
    return {-(-steps * part // count) for part in range(1, count + 1)}


def combine(profiles: Sequence[Profile], target: Profile) -> Combination:
    """Return the sum of averages whose profile is nearest to the target's, by least squares.

    See Karras et al. 2023, app. C. The coefficients are then divided by their sum, as in EDM2's
    code, so that a weight that never changes keeps its value. Raise InputError if a sigma_rel is
    invalid.
    """
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
    return steps, np.array([power_of(profile.sigma_rel) for profile in profiles])


def _inner(t: ndarray, gamma: ndarray, u: ndarray, delta: ndarray) -> ndarray:
    """Return the integrals of the products of the profiles (t, gamma) and (u, delta)."""
    shorter, longer = np.minimum(t, u), np.maximum(t, u)
    overlap = (shorter / t) ** gamma * (shorter / u) ** delta
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * overlap / longer
