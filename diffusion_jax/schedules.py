"""Noise schedules: how much of the image and how much noise is left after t of T steps.

A schedule is a table in float64 on the host. x_t = alpha[t] x_0 + sigma[t] eps, where
alpha = sqrt(alpha_bar) in the notation of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.typing import InputError, Level, choose


class NoiseSchedule(NamedTuple):
    """Float64 tables of T + 1 entries; index 0 is clean data.

    alpha, sigma: the parts of image and noise, alpha^2 + sigma^2 = 1.
    beta: the variance that each step of the forward process adds (DDPM, eq. 2); beta[0] is unused.
    """

    alpha: Float64[ndarray, "T+1"]
    sigma: Float64[ndarray, "T+1"]
    beta: Float64[ndarray, "T+1"]

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.alpha) - 1

    def level(self, t: float | ndarray) -> Level:
        """The levels at times t in [0, T], which may be fractional.

        Whole steps are the table's own entries. Between two of them log(alpha / sigma) is linear
        in t; between 0 and 1, where it would be infinite, sigma / alpha is.
        """
        t = np.asarray(t, np.float64)
        if not (np.all(t >= 0) and np.all(t <= self.steps)):
            raise InputError(f"t={t} lies outside the schedule: it must be in [0, {self.steps}]")
        below = np.minimum(t.astype(int), self.steps - 1)
        weight = t - below
        ratio = self.sigma / self.alpha
        start, end = ratio[below], ratio[below + 1]
        first = start == 0
        between = np.where(
            first, weight * end, np.where(first, 1, start) ** (1 - weight) * end**weight
        )
        norm = np.hypot(1, between)
        whole = t == np.rint(t)
        index = np.rint(t).astype(int)
        return Level(
            t,
            np.where(whole, self.alpha[index], 1 / norm),
            np.where(whole, self.sigma[index], between / norm),
        )


def from_betas(beta: ndarray) -> NoiseSchedule:
    """The schedule of T + 1 betas (DDPM, eq. 4); beta[0] counts in the product."""
    alpha_bar = np.exp(np.cumsum(np.log(1 - beta)))
    alpha_bar[0] = 1
    return NoiseSchedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), beta)


def linear(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> NoiseSchedule:
    """DDPM's schedule (arXiv:2006.11239, section 4): beta rises from beta_min to beta_max."""
    _check(steps, beta_min, beta_max)
    return from_betas(np.concatenate([[0.0], np.linspace(beta_min, beta_max, steps)]))


def notes(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> NoiseSchedule:
    """The course notes' table, bit by bit in float64.

    It spreads the betas over T + 1 entries and keeps beta[0] in the product, so that
    alpha_bar[1] = (1 - beta[0]) (1 - beta[1]).
    """
    _check(steps, beta_min, beta_max)
    return from_betas((beta_max - beta_min) * np.linspace(0, 1, steps + 1) + beta_min)


def cosine(steps: int, offset: float = 0.008, beta_limit: float = 0.999) -> NoiseSchedule:
    """Nichol and Dhariwal's schedule (arXiv:2102.09672, eq. 17), with their limit on beta."""
    _check(steps)
    angle = (np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2
    alpha_bar = np.cos(angle) ** 2
    beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], beta_limit)
    return from_betas(np.concatenate([[0.0], beta]))


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "notes": notes,
    "cosine": cosine,
}


def build(name: str, steps: int, **options: float) -> NoiseSchedule:
    """The named schedule; options that it does not know (the betas of a cosine) are left out."""
    make = choose(SCHEDULES, "schedule", name)
    known = inspect.signature(make).parameters
    return make(steps, **{key: value for key, value in options.items() if key in known})


def _check(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> None:
    if steps < 1:
        raise InputError(f"a schedule of {steps} steps: it must have at least 1")
    if not 0 < beta_min <= beta_max < 1:
        raise InputError(
            f"beta_min={beta_min}, beta_max={beta_max}: they must obey 0 < beta_min <= beta_max < 1"
        )
