"""Grids: the levels that a sampler visits, from noise to data, ending at clean data.

leading, trailing and linspace are named as in Lin et al. 2023 (arXiv:2305.08891, table 2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.schedules import NoiseSchedule, noise_ratio, warp
from diffusion_jax.typing import InputError, Level, check_kind, choose, options_of, require


class Grid(NamedTuple):
    """The N + 1 levels of N sampling steps, float64: t falls, from at most T, mostly to 0."""

    t: Float64[ndarray, "N+1"]
    alpha: Float64[ndarray, "N+1"]
    sigma: Float64[ndarray, "N+1"]

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.t) - 1

    @property
    def ratio(self) -> Float64[ndarray, "levels"]:
        """sigma / alpha; infinite where alpha is 0."""
        return noise_ratio(self.alpha, self.sigma)

    @property
    def log_snr(self) -> Float64[ndarray, "levels"]:
        """log(alpha / sigma), half of the logarithm of the SNR; infinite at clean data."""
        with np.errstate(divide="ignore"):
            return -np.log(self.ratio)

    @property
    def levels(self) -> list[Level]:
        """The levels one by one."""
        return [Level(*level) for level in zip(*self, strict=True)]


def check(grid: Grid) -> Grid:
    """Return the grid if it is one. Raises InputError unless its levels fall strictly."""
    if grid.steps < 1 or not (np.all(np.diff(grid.t) < 0) and np.all(grid.ratio[1:] < np.inf)):
        raise InputError(f"a grid of times {grid.t}: they must fall strictly from at most T to 0")
    if not np.all(np.diff(grid.log_snr) > 0):
        raise InputError(f"a grid of sigma / alpha {grid.ratio}: it must fall strictly")
    return grid


def at(schedule: NoiseSchedule, t: ndarray, end: float = 0.0) -> Grid:
    """The grid through given times. Raises InputError unless they fall strictly to `end`."""
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or len(t) < 2 or t[-1] != end:
        raise InputError(f"a grid of times {t}: they must fall strictly from at most T to {end:g}")
    return check(Grid(*schedule.level(t)))


def at_ratio(schedule: NoiseSchedule, ratio: ndarray) -> Grid:
    """The grid through given sigma / alpha. Raises InputError unless they fall strictly."""
    return check(Grid(*schedule.at_ratio(ratio)))


def notes(schedule: NoiseSchedule, n: int) -> Grid:
    """The course notes' walk T, T - s, ..., s, 0 with stride s = T / n.

    Where n does not divide T the levels are rounded up to whole steps (the notes walk past 0).
    """
    _check(schedule, n)
    return at(schedule, schedule.steps - np.arange(n + 1) * schedule.steps // n)


def leading(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step 1 upwards with stride T // n: 1, 1 + s, ...; it starts below T."""
    _check(schedule, n)
    return at(schedule, np.append(1 + np.arange(n)[::-1] * (schedule.steps // n), 0))


def trailing(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T downwards with stride T / n, rounded to whole steps."""
    _check(schedule, n)
    return at(schedule, np.append(np.rint(schedule.steps - np.arange(n) * (schedule.steps / n)), 0))


def linspace(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T to step 1, both included, rounded to whole steps."""
    _check(schedule, n)
    return at(schedule, np.append(np.rint(np.linspace(schedule.steps, 1, n)), 0))


def quadratic(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T to step 1, evenly in the root of t (DDIM, arXiv:2010.02502, app. D.2).

    They are not rounded, so that every n up to T has n different levels.
    """
    _check(schedule, n)
    root = np.linspace(np.sqrt(schedule.steps), 1, n)
    return at(schedule, np.append(np.append(schedule.steps, root[1:] ** 2), 0))


def karras(
    schedule: NoiseSchedule,
    n: int,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Grid:
    """EDM's levels of sigma / alpha (arXiv:2206.00364, eq. 5): n from the largest to the least.

    sigma_min, sigma_max: the ends, of sigma / alpha; by default those of steps 1 and T.
    to_zero: end with a step from sigma_min to 0; otherwise the last of n steps ends at sigma_min.
    """
    _check(schedule, n)
    _check_rho(rho)
    spacing = partial(warp, rho=rho)
    return _between(schedule, n, sigma_min, sigma_max, to_zero, spacing)


def exponential(
    schedule: NoiseSchedule,
    n: int,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Grid:
    """n levels whose log(sigma / alpha) is even in the power rho of the place; else as karras."""
    _check(schedule, n)
    _check_rho(rho)

    def spacing(low: float, high: float, place: ndarray) -> ndarray:
        return low * (high / low) ** (place**rho)

    return _between(schedule, n, sigma_min, sigma_max, to_zero, spacing)


def uniform_logsnr(
    schedule: NoiseSchedule,
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Grid:
    """n levels even in log-SNR, DPM-Solver's (arXiv:2206.00927); else as karras."""
    return exponential(schedule, n, 1.0, sigma_min, sigma_max, to_zero)


GRIDS: dict[str, Callable[..., Grid]] = {
    "notes": notes,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
    "uniform_logsnr": uniform_logsnr,
    "exponential": exponential,
    "karras": karras,
}


def build(name: str, schedule: NoiseSchedule, steps: int, **options: Any) -> Grid:
    """The named grid of so many steps. Raises InputError for an unknown name or option."""
    make = choose(GRIDS, "grid", name)
    kinds = options_of(make)
    takes = ", ".join(kinds) or "none"
    for option, value in options.items():
        require(option in kinds, f"grid {name} takes no {option}: it takes {takes}")
        check_kind(option, value, kinds[option])
    return make(schedule, steps, **options)


def _between(
    schedule: NoiseSchedule,
    n: int,
    sigma_min: float | None,
    sigma_max: float | None,
    to_zero: bool,
    spacing: Callable[[float, float, ndarray], ndarray],
) -> Grid:
    low = schedule.ratio[1] if sigma_min is None else sigma_min
    high = schedule.ratio[-1] if sigma_max is None else sigma_max
    single = to_zero and n == 1
    if not 0 < low < np.inf or not (low < high or single) or not high < np.inf:
        raise InputError(
            f"sigma_min={low}, sigma_max={high}: this grid needs 0 < sigma_min < sigma_max, finite"
        )
    ratio = spacing(low, high, np.linspace(1, 0, n if to_zero else n + 1))
    ratio[0] = high
    if not single:
        ratio[-1] = low  # free of rounding
    return at_ratio(schedule, np.append(ratio, 0.0) if to_zero else ratio)


def _check(schedule: NoiseSchedule, n: int) -> None:
    if not 1 <= n <= schedule.steps:
        raise InputError(f"steps={n}: it must be in 1..{schedule.steps}, the schedule's steps")


def _check_rho(rho: float) -> None:
    if not 0 < rho < np.inf:
        raise InputError(f"rho={rho}: it must be above 0")
