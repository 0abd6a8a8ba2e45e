"""The levels of a grid, and grids through levels that are given."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.diffusion.schedules import NoiseSchedule, noise_ratio
from diffusion_jax.files import open_file
from diffusion_jax.typing import InputError, Level, require

MOST_BYTES = 2**20  # bytes of a file of levels
GIVE = "grid=levels: give one of t=T1,T2,..., sigma=S1,S2,... and path=FILE"


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


def between(
    schedule: NoiseSchedule,
    n: int,
    sigma_min: float | None,
    sigma_max: float | None,
    to_zero: bool,
    spacing: Callable[[float, float, ndarray], ndarray],
) -> Grid:
    """Return the grid of n steps whose sigma / alpha is spacing(smallest, largest, place).

    place runs evenly from 1 to 0. The other options are those of grids.karras. Raise InputError
    unless sigma_min < sigma_max.
    """
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


def check_steps(schedule: NoiseSchedule, n: int) -> None:
    """Raise InputError unless a schedule has at least n steps."""
    if not 1 <= n <= schedule.steps:
        raise InputError(f"steps={n}: it must be in 1..{schedule.steps}, the schedule's steps")


def levels(
    schedule: NoiseSchedule,
    n: int,
    t: tuple[float, ...] = (),
    sigma: tuple[float, ...] = (),
    path: Path | None = None,
    unit: Literal["sigma", "t"] = "sigma",
) -> Grid:
    """Levels that you give by t, by sigma / alpha, or in a text file. The grid ends at clean data.

    n must be the number of levels, without a 0 at the end. unit: the meaning of the file's numbers.
    """
    require((bool(t), bool(sigma), path is not None).count(True) == 1, GIVE)
    given = read_levels(t, sigma, path)
    require(len(given) == n, f"grid=levels: {len(given)} levels are given for {n} steps")
    rise = np.flatnonzero(np.diff(given) >= 0)
    pair = f"{given[rise[0]]:g} comes before {given[rise[0] + 1]:g}" if len(rise) else ""
    require(not pair, f"grid=levels: {pair}: levels must fall strictly")
    return (at if t or (path and unit == "t") else at_ratio)(schedule, np.append(given, 0.0))


def read_levels(
    t: tuple[float, ...] = (), sigma: tuple[float, ...] = (), path: Path | None = None, **_: str
) -> ndarray:
    """Return the levels that the options of `levels` give, without a 0 at the end.

    Raise InputError if the file does not hold numbers.
    """
    given = list(t or sigma)
    if path is not None:
        try:
            with open_file(path) as file:
                words = file.read(MOST_BYTES).decode(errors="replace").replace(",", " ").split()
            given = [float(word) for word in words]
        except (OSError, ValueError) as error:
            raise InputError(f"path={path}: it must hold numbers, such as 14.6: {error}") from None
    require(given, GIVE)
    return np.array(given[:-1] if given[-1] == 0 else given)
