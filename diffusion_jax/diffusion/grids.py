"""Grids: the levels that a sampler visits, from noise to data, usually ending at clean data.

The names leading, trailing and linspace are those of Lin et al. 2023 (arXiv:2305.08891, table 2).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax import spec
from diffusion_jax.diffusion.schedules import NoiseSchedule, noise_ratio, warp
from diffusion_jax.typing import InputError, Level, require


class Grid(NamedTuple):
    """The N + 1 levels of N sampling steps, in float64. t falls from at most T, usually to 0."""

    t: Float64[ndarray, "N+1"]
    alpha: Float64[ndarray, "N+1"]
    sigma: Float64[ndarray, "N+1"]

    @property
    def steps(self) -> int:
        """The number of steps N."""
        return len(self.t) - 1

    @property
    def ratio(self) -> Float64[ndarray, "levels"]:
        """sigma / alpha; infinite where alpha is 0."""
        return noise_ratio(self.alpha, self.sigma)

    @property
    def half_log_snr(self) -> Float64[ndarray, "levels"]:
        """log(alpha / sigma), half of the log-SNR; infinite at clean data."""
        with np.errstate(divide="ignore"):
            return -np.log(self.ratio)

    @property
    def levels(self) -> list[Level]:
        """The levels as a list."""
        return [Level(*level) for level in zip(*self, strict=True)]


def check(grid: Grid) -> Grid:
    """Return the grid. Raise InputError unless its levels fall strictly."""
    if grid.steps < 1 or not (np.all(np.diff(grid.t) < 0) and np.all(grid.ratio[1:] < np.inf)):
        raise InputError(f"a grid of times {grid.t}: they must fall strictly from at most T to 0")
    if not np.all(np.diff(grid.half_log_snr) > 0):
        raise InputError(f"a grid of sigma / alpha {grid.ratio}: it must fall strictly")
    return grid


def at(schedule: NoiseSchedule, t: ndarray, end: float = 0.0) -> Grid:
    """Return the grid through given times. Raise InputError unless they fall strictly to `end`."""
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or len(t) < 2 or t[-1] != end:
        raise InputError(f"a grid of times {t}: they must fall strictly from at most T to {end:g}")
    return check(Grid(*schedule.level(t)))


def at_ratio(schedule: NoiseSchedule, ratio: ndarray) -> Grid:
    """Return the grid through given sigma / alpha. Raise InputError unless they fall strictly."""
    return check(Grid(*schedule.at_ratio(ratio)))


def course(schedule: NoiseSchedule, n: int) -> Grid:
    """The course's levels T, T - s, ..., s, 0 with stride s = T / n.

    If n does not divide T, levels are rounded up to whole steps. (The course walks past 0.)
    """
    _check(schedule, n)
    return at(schedule, schedule.steps - np.arange(n + 1) * schedule.steps // n)


def leading(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step 1 upwards with stride T // n: arXiv:2305.08891, table 2.

    The first level that is visited is below T unless n is T.
    """
    _check(schedule, n)
    return at(schedule, np.append(1 + np.arange(n)[::-1] * (schedule.steps // n), 0))


def trailing(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T downwards with stride T / n, rounded: arXiv:2305.08891, table 2.

    Levels are rounded to whole steps.
    """
    _check(schedule, n)
    return at(schedule, np.append(np.rint(schedule.steps - np.arange(n) * (schedule.steps / n)), 0))


def linspace(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels evenly from step T to step 1, both included, rounded: arXiv:2305.08891, table 2.

    Levels are rounded to whole steps.
    """
    _check(schedule, n)
    return at(schedule, np.append(np.rint(np.linspace(schedule.steps, 1, n)), 0))


def quadratic(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T to step 1, evenly in sqrt(t): DDIM, arXiv:2010.02502, app. D.2.

    Levels are not rounded, so that they are distinct for every n up to T.
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
    """EDM's n levels of sigma / alpha, from the largest down: arXiv:2206.00364, eq. 5.

    sigma_min, sigma_max: the smallest and the largest sigma / alpha; by default, those of steps 1
    and T.
    to_zero: whether the last of the n steps goes from sigma_min to 0; otherwise it ends at
    sigma_min.
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
    """n levels with log(sigma / alpha) linear in place^rho: k-diffusion's polyexponential.

    The place of a level runs evenly from 1 to 0. The other options are those of karras.
    """
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
    """n levels evenly in log-SNR, as in DPM-Solver (arXiv:2206.00927); options as in karras."""
    return exponential(schedule, n, 1.0, sigma_min, sigma_max, to_zero)


def levels(
    schedule: NoiseSchedule, n: int, t: tuple[float, ...] = (), ratio: tuple[float, ...] = ()
) -> Grid:
    """Levels that you give, by t or by sigma / alpha; clean data is added at the end.

    n must be the number of levels given.
    """
    require(bool(t) != bool(ratio), "grid=levels: give t=T1,T2,... or ratio=R1,R2,...")
    given = np.array(t or ratio, np.float64)
    require(len(given) == n, f"grid=levels: {len(given)} levels are given for {n} steps")
    return (at if t else at_ratio)(schedule, np.append(given, 0.0))


GRIDS: dict[str, Callable[..., Grid]] = {
    "course": course,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
    "uniform_logsnr": uniform_logsnr,
    "exponential": exponential,
    "karras": karras,
    "levels": levels,
}


def build(text: str, schedule: NoiseSchedule, n: int) -> Grid:
    """Return the grid of n steps that a spec describes. Raise InputError as spec.parse does."""
    return spec.parse(text, GRIDS, "grid", ("n",)).bind()(schedule, n)


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
        ratio[-1] = low  # without rounding
    return at_ratio(schedule, np.append(ratio, 0.0) if to_zero else ratio)


def _check(schedule: NoiseSchedule, n: int) -> None:
    if not 1 <= n <= schedule.steps:
        raise InputError(f"steps={n}: it must be in 1..{schedule.steps}, the schedule's steps")


def _check_rho(rho: float) -> None:
    if not 0 < rho < np.inf:
        raise InputError(f"rho={rho}: it must be above 0")
