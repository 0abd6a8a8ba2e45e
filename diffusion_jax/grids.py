"""Grids: the levels that a sampler visits, from noise to data, ending at clean data.

The first three are named as in Lin et al. 2023 (arXiv:2305.08891, table 2).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError


class Grid(NamedTuple):
    """The N + 1 levels of N sampling steps, float64: t falls from at most T to 0."""

    t: Float64[ndarray, "N+1"]
    alpha: Float64[ndarray, "N+1"]
    sigma: Float64[ndarray, "N+1"]

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.t) - 1


def at(schedule: NoiseSchedule, t: ndarray) -> Grid:
    """The grid through given times. Raises InputError unless they fall strictly, and end at 0."""
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or len(t) < 2 or t[-1] != 0 or not np.all(np.diff(t) < 0):
        raise InputError(f"a grid of times {t}: they must fall strictly from at most T to 0")
    level = schedule.level(t)
    return Grid(level.t, level.alpha, level.sigma)


def notes(schedule: NoiseSchedule, n: int) -> Grid:
    """The course notes' walk T, T - s, ..., s, 0 with stride s = T / n.

    Where n does not divide T the levels are rounded up to whole steps (the notes walk past 0).
    """
    _check(schedule, n)
    return at(schedule, schedule.steps - np.arange(n + 1) * schedule.steps // n)


def leading(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step 1 upwards with stride T // n: 1, 1 + s, ...; it starts below T."""
    _check(schedule, n)
    return at(schedule, _to_zero(1 + np.arange(n)[::-1] * (schedule.steps // n)))


def trailing(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T downwards with stride T / n, rounded to whole steps."""
    _check(schedule, n)
    return at(schedule, _to_zero(np.rint(schedule.steps - np.arange(n) * (schedule.steps / n))))


def linspace(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T to step 1, both included, rounded to whole steps."""
    _check(schedule, n)
    return at(schedule, _to_zero(np.rint(np.linspace(schedule.steps, 1, n))))


GRIDS: dict[str, Callable[[NoiseSchedule, int], Grid]] = {
    "notes": notes,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}


def _to_zero(t: ndarray) -> ndarray:
    return np.append(t, 0)


def _check(schedule: NoiseSchedule, n: int) -> None:
    if not 1 <= n <= schedule.steps:
        raise InputError(f"steps={n}: it must be in 1..{schedule.steps}, the schedule's steps")
