"""Noise schedules: how much of the image and how much noise is left after t of T steps.

A schedule is a table in float64 on the host. x_t = alpha[t] x_0 + sigma[t] eps, where
alpha = sqrt(alpha_bar) in the notation of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.typing import InputError, Level, choose, require

Real: TypeAlias = float | ndarray
STEPS = 1_000_000  # the longest schedule


def variance_preserving(ratio: Real) -> Real:
    """alpha where sigma / alpha = ratio and alpha^2 + sigma^2 = 1."""
    return 1 / np.hypot(1, ratio)


def variance_exploding(ratio: Real) -> Real:
    """alpha where the image is never scaled: 1."""
    return np.ones_like(ratio)


def straight(ratio: Real) -> Real:
    """alpha where sigma / alpha = ratio and alpha + sigma = 1."""
    return 1 / (1 + ratio)


class NoiseSchedule(NamedTuple):
    """Float64 tables of T + 1 entries; index 0 is clean data.

    alpha, sigma: the parts of image and noise; alpha[T] may be 0.
    beta: the variance that each step of the forward process adds (DDPM, eq. 2); beta[0] is unused.
    alpha_at: the family of the schedule, alpha as a function of sigma / alpha.
    """

    alpha: Float64[ndarray, "T+1"]
    sigma: Float64[ndarray, "T+1"]
    beta: Float64[ndarray, "T+1"]
    alpha_at: Callable[[Real], Real] = variance_preserving

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.alpha) - 1

    @property
    def ratio(self) -> Float64[ndarray, "levels"]:
        """sigma / alpha, from 0 upwards; infinite where alpha is 0."""
        return noise_ratio(self.alpha, self.sigma)

    def level(self, t: Real) -> Level:
        """The levels at times t in [0, T], which may be fractional.

        Whole steps are the table's own entries. Between two of them log(alpha / sigma) is linear
        in t; where it would be infinite, sigma / alpha (from 0) or alpha / sigma (to 0) is.
        """
        t = np.asarray(t, np.float64)
        if not (np.all(t >= 0) and np.all(t <= self.steps)):
            raise InputError(f"t={t} lies outside the schedule: it must be in [0, {self.steps}]")
        below = np.minimum(t.astype(int), self.steps - 1)
        whole = t == np.rint(t)
        weight = np.where(whole, 0.5, t - below)
        ratio = _blend(weight, self.ratio[below], self.ratio[below + 1])
        return self._level(t, ratio, whole)

    def at_ratio(self, ratio: Real) -> Level:
        """The levels where sigma / alpha = ratio: the inverse of `level`, exact at whole steps."""
        ratio = np.asarray(ratio, np.float64)
        table = self.ratio
        if not (np.all(ratio >= 0) and np.all(ratio <= table[-1])):
            raise InputError(
                f"sigma / alpha = {ratio} lies outside the schedule: "
                f"it must be in [0, {table[-1]:.6g}]"
            )
        nearest = np.searchsorted(table, ratio)
        whole = table[nearest] == ratio
        below = np.maximum(nearest - 1, 0)
        inside = np.where(whole, _blend(0.5, table[below], table[below + 1]), ratio)
        t = below + _blend_weight(inside, table[below], table[below + 1])
        return self._level(np.where(whole, nearest, t), inside, whole)

    def _level(self, t: Real, ratio: Real, whole: bool | np.bool | ndarray) -> Level:
        index = np.rint(t).astype(int)
        alpha = self.alpha_at(ratio)
        return Level(
            t,
            np.where(whole, self.alpha[index], alpha),
            np.where(whole, self.sigma[index], alpha * ratio),
        )


def noise_ratio(alpha: ndarray, sigma: ndarray) -> ndarray:
    """sigma / alpha, infinite where alpha is 0: log-SNR is -2 log of it."""
    return np.divide(sigma, alpha, out=np.full_like(sigma, np.inf), where=alpha > 0)


def _blend(weight: Real, start: Real, end: Real) -> Real:
    """A ratio between two of the table; weight is strictly between 0 and 1."""
    low, high = np.where(start > 0, start, 1), np.where(end < np.inf, end, 1)
    return (
        np.where((start > 0) & (end < np.inf), low ** (1 - weight) * high**weight, 1)
        * np.where(start == 0, weight * high, 1)
        * np.where(end == np.inf, low / (1 - weight), 1)
    )


def _blend_weight(ratio: Real, start: Real, end: Real) -> Real:
    """The inverse of _blend in its first argument."""
    first, last = start == 0, end == np.inf
    low, high = np.where(first, 1, start), np.where(last, 1, end)
    spread = np.where(first | last, 1, np.log(high / low))
    return np.select(
        [first & last, first, last],
        [ratio / (1 + ratio), ratio / high, 1 - low / ratio],
        np.log(ratio / low) / spread,
    )


def from_levels(
    alpha: ndarray,
    sigma: ndarray,
    alpha_at: Callable[[Real], Real] = variance_preserving,
) -> NoiseSchedule:
    """The schedule of T + 1 levels, the first of them clean.

    beta_i = sigma_i^2 - (alpha_i / alpha_{i-1})^2 sigma_{i-1}^2 (Kingma et al. 2021,
    arXiv:2107.00630, app. A).
    """
    beta = sigma[1:] ** 2 - (alpha[1:] / alpha[:-1]) ** 2 * sigma[:-1] ** 2
    return NoiseSchedule(alpha, sigma, np.append(0.0, beta), alpha_at)


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


def scaled_linear(steps: int, beta_min: float = 8.5e-4, beta_max: float = 0.012) -> NoiseSchedule:
    """Latent diffusion's schedule (arXiv:2112.10752): the root of beta rises linearly."""
    _check(steps, beta_min, beta_max)
    root = np.linspace(np.sqrt(beta_min), np.sqrt(beta_max), steps)
    return from_betas(np.append(0.0, root**2))


def cosine(steps: int, offset: float = 0.008, beta_limit: float = 0.999) -> NoiseSchedule:
    """Nichol and Dhariwal's schedule (arXiv:2102.09672, eq. 17), with their limit on beta."""
    _check(steps)
    angle = (np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2
    return _from_alpha_bar(np.cos(angle) ** 2, beta_limit)


def sigmoid(
    steps: int,
    start: float = -3.0,
    end: float = 3.0,
    temperature: float = 1.0,
    beta_limit: float = 0.999,
) -> NoiseSchedule:
    """Jabri, Fleet and Chen's schedule (arXiv:2212.11972): alpha_bar falls along a sigmoid."""
    _check(steps)
    if not (start < end and temperature > 0):
        raise InputError(
            f"start={start}, end={end}, temperature={temperature}: they must obey "
            "start < end, temperature > 0"
        )
    points = start + (end - start) * np.arange(steps + 1) / steps
    fall = 1 / (1 + np.exp(points / temperature))
    return _from_alpha_bar(fall - fall[-1], beta_limit)


def karras(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseSchedule:
    """EDM's levels (Karras et al. 2022, arXiv:2206.00364, eq. 5): x_t = x_0 + sigma eps.

    sigma_min is that of step 1, sigma_max that of step T.
    """
    _check(steps)
    if not (0 < sigma_min < sigma_max < np.inf and rho > 0):
        raise InputError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: they must obey "
            "0 < sigma_min < sigma_max, rho > 0"
        )
    sigma = np.append(0.0, warp(sigma_min, sigma_max, np.linspace(1, 0, steps)[::-1], rho))
    return from_levels(np.ones(steps + 1), sigma, variance_exploding)


def warp(low: float, high: float, place: ndarray, rho: float) -> ndarray:
    """From low (place 0) to high (place 1), evenly in the power 1 / rho (EDM, eq. 5)."""
    return (low ** (1 / rho) + place * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def flow(steps: int) -> NoiseSchedule:
    """Rectified flow (Liu et al. 2022, arXiv:2209.03003): x_t = (1 - t / T) x_0 + (t / T) eps."""
    _check(steps)
    sigma = np.arange(steps + 1) / steps
    return from_levels(1 - sigma, sigma, straight)


def rescale_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """A schedule whose last level is noise alone: Lin et al. 2023, arXiv:2305.08891, algorithm 1.

    alpha is shifted to 0 at T and scaled so that it stays what it was at step 1.
    """
    if schedule.alpha_at is not variance_preserving or schedule.steps < 2:
        raise InputError(
            "rescale_zero_terminal_snr takes variance preserving schedules of 2 steps or more"
        )
    first, last = schedule.alpha[1], schedule.alpha[-1]
    alpha = np.append(1.0, (schedule.alpha[1:] - last) * (first / (first - last)))
    return from_levels(alpha, np.sqrt(1 - alpha**2))


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "notes": notes,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "karras": karras,
    "flow": flow,
}


def build(name: str, steps: int, **options: float) -> NoiseSchedule:
    """Build the named schedule. Raises InputError for options that it does not take."""
    make = choose(SCHEDULES, "schedule", name)
    known = list(inspect.signature(make).parameters)[1:]
    for option, value in options.items():
        takes = ", ".join(known) or "none"
        require(option in known, f"{option}={value}: schedule {name} takes {takes}")
    return make(steps, **options)


def _from_alpha_bar(alpha_bar: ndarray, beta_limit: float) -> NoiseSchedule:
    if not 0 < beta_limit < 1:
        raise InputError(f"beta_limit={beta_limit}: it must be in (0, 1)")
    beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], beta_limit)
    return from_betas(np.append(0.0, beta))


def _check(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> None:
    if not 1 <= steps <= STEPS:
        raise InputError(f"a schedule of {steps} steps: it must have at least 1, at most {STEPS}")
    if not 0 < beta_min <= beta_max < 1:
        raise InputError(
            f"beta_min={beta_min}, beta_max={beta_max}: they must obey 0 < beta_min <= beta_max < 1"
        )
