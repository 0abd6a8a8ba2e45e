"""Noise schedules: how much image and how much noise x_t contains after t of T steps.

A schedule is a table in float64 on the host: x_t = alpha[t] x_0 + sigma[t] eps, where alpha =
sqrt(alpha_bar) in the notation of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax import spec
from diffusion_jax.typing import InputError, Level, require

Values: TypeAlias = float | ndarray
STEPS = 1_000_000  # the longest schedule


def variance_preserving(ratio: Values) -> Values:
    """Return the alpha for which sigma / alpha = ratio and alpha^2 + sigma^2 = 1."""
    return 1 / np.hypot(1, ratio)


def variance_exploding(ratio: Values) -> Values:
    """Return 1, which is alpha if the image is never scaled."""
    return np.ones_like(ratio)


def straight(ratio: Values) -> Values:
    """Return the alpha for which sigma / alpha = ratio and alpha + sigma = 1."""
    return 1 / (1 + ratio)


class NoiseSchedule(NamedTuple):
    """A noise schedule: float64 tables of T + 1 entries, of which entry 0 is clean data.

    alpha, sigma: the factors of the image and of the noise; alpha[T] may be 0.
    beta: the variance that each step of the forward process adds (DDPM, eq. 2); beta[0] is unused.
    alpha_at: alpha as a function of sigma / alpha, which defines the family of the schedule.
    """

    alpha: Float64[ndarray, "T+1"]
    sigma: Float64[ndarray, "T+1"]
    beta: Float64[ndarray, "T+1"]
    alpha_at: Callable[[Values], Values] = variance_preserving

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return len(self.alpha) - 1

    @property
    def ratio(self) -> Float64[ndarray, "levels"]:
        """sigma / alpha, which rises from 0 and is infinite where alpha is 0."""
        return noise_ratio(self.alpha, self.sigma)

    def level(self, t: Values) -> Level:
        """Return the levels at times t in [0, T], which may be fractional.

        At whole steps, the levels are the table's own entries. Between two steps, log(alpha /
        sigma) is linear in t. If it is infinite at one of them, sigma / alpha (next to clean data)
        or alpha / sigma (next to pure noise) is linear instead. Raise InputError if t lies outside
        [0, T].
        """
        t = np.asarray(t, np.float64)
        if not (np.all(t >= 0) and np.all(t <= self.steps)):
            raise InputError(f"t={t} lies outside the schedule: it must be in [0, {self.steps}]")
        below = np.minimum(t.astype(int), self.steps - 1)
        whole = t == np.rint(t)
        weight = np.where(whole, 0.5, t - below)
        ratio = _blend(weight, self.ratio[below], self.ratio[below + 1])
        return self._level(t, ratio, whole)

    def at_ratio(self, ratio: Values) -> Level:
        """Return the levels at which sigma / alpha = ratio. At whole steps they are exact.

        This is the inverse of `level`. Raise InputError if the ratio lies outside the schedule.
        """
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

    def _level(self, t: Values, ratio: Values, whole: bool | np.bool | ndarray) -> Level:
        index = np.rint(t).astype(int)
        alpha = self.alpha_at(ratio)
        return Level(
            t,
            np.where(whole, self.alpha[index], alpha),
            np.where(whole, self.sigma[index], alpha * ratio),
        )


def noise_ratio(alpha: ndarray, sigma: ndarray) -> ndarray:
    """Return sigma / alpha, infinite where alpha is 0. The log-SNR is -2 log of it."""
    return np.divide(sigma, alpha, out=np.full_like(sigma, np.inf), where=alpha > 0)


def _blend(weight: Values, start: Values, end: Values) -> Values:
    """Interpolate between two ratios of the table. weight is strictly between 0 and 1."""
    low, high = np.where(start > 0, start, 1), np.where(end < np.inf, end, 1)
    return (
        np.where((start > 0) & (end < np.inf), low ** (1 - weight) * high**weight, 1)
        * np.where(start == 0, weight * high, 1)
        * np.where(end == np.inf, low / (1 - weight), 1)
    )


def _blend_weight(ratio: Values, start: Values, end: Values) -> Values:
    """Return the weight with which _blend gives this ratio."""
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
    alpha_at: Callable[[Values], Values] = variance_preserving,
) -> NoiseSchedule:
    """Return the schedule of T + 1 levels, of which the first is clean.

    beta_i = sigma_i^2 - (alpha_i / alpha_{i-1})^2 sigma_{i-1}^2 (Kingma et al. 2021,
    arXiv:2107.00630, app. A).
    """
    beta = sigma[1:] ** 2 - (alpha[1:] / alpha[:-1]) ** 2 * sigma[:-1] ** 2
    return NoiseSchedule(alpha, sigma, np.append(0.0, beta), alpha_at)


def from_betas(beta: ndarray, zero_snr: bool = False) -> NoiseSchedule:
    """Return the schedule of T + 1 betas (DDPM, eq. 4). beta[0] is part of the product.

    zero_snr: whether to apply rescale_zero_terminal_snr.
    """
    alpha_bar = np.exp(np.cumsum(np.log(1 - beta)))
    alpha_bar[0] = 1
    schedule = NoiseSchedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), beta)
    return rescale_zero_terminal_snr(schedule) if zero_snr else schedule


def linear(
    steps: int = 500, beta_min: float = 1e-4, beta_max: float = 0.02, zero_snr: bool = False
) -> NoiseSchedule:
    """DDPM's schedule (arXiv:2006.11239, section 4): beta rises linearly.

    beta rises from beta_min to beta_max.
    """
    _check(steps, beta_min, beta_max)
    return from_betas(np.append(0.0, np.linspace(beta_min, beta_max, steps)), zero_snr)


def course(
    steps: int = 500, beta_min: float = 1e-4, beta_max: float = 0.02, zero_snr: bool = False
) -> NoiseSchedule:
    """The course's schedule: its table, bit for bit in float64.

    The betas are spread over T + 1 entries and beta[0] is part of the product:
    alpha_bar[1] = (1 - beta[0]) (1 - beta[1]).
    """
    _check(steps, beta_min, beta_max)
    betas = (beta_max - beta_min) * np.linspace(0, 1, steps + 1) + beta_min
    return from_betas(betas, zero_snr)


def scaled_linear(
    steps: int = 500, beta_min: float = 8.5e-4, beta_max: float = 0.012, zero_snr: bool = False
) -> NoiseSchedule:
    """Latent diffusion's schedule (arXiv:2112.10752): sqrt(beta) rises linearly."""
    _check(steps, beta_min, beta_max)
    root = np.linspace(np.sqrt(beta_min), np.sqrt(beta_max), steps)
    return from_betas(np.append(0.0, root**2), zero_snr)


def cosine(
    steps: int = 500, offset: float = 0.008, beta_limit: float = 0.999, zero_snr: bool = False
) -> NoiseSchedule:
    """Nichol and Dhariwal's cosine schedule (arXiv:2102.09672, eq. 17) with their limit on beta."""
    _check(steps)
    require(0 <= offset < np.inf, f"offset={offset}: it must be 0 or more")
    angle = (np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2
    return _from_alpha_bar(np.cos(angle) ** 2, beta_limit, zero_snr)


def sigmoid(
    steps: int = 500,
    start: float = -3.0,
    end: float = 3.0,
    temperature: float = 1.0,
    beta_limit: float = 0.999,
    zero_snr: bool = False,
) -> NoiseSchedule:
    """Jabri, Fleet and Chen's schedule (arXiv:2212.11972): alpha_bar falls along a sigmoid."""
    _check(steps)
    require(
        start < end and temperature > 0,
        f"start={start}, end={end}, temperature={temperature}: they must obey "
        "start < end, temperature > 0",
    )
    points = start + (end - start) * np.arange(steps + 1) / steps
    fall = 1 / (1 + np.exp(points / temperature))
    return _from_alpha_bar(fall - fall[-1], beta_limit, zero_snr)


def karras(
    steps: int = 500, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseSchedule:
    """EDM's levels (Karras et al. 2022, arXiv:2206.00364, eq. 5): x_t = x_0 + sigma eps.

    sigma_min is the sigma of step 1, and sigma_max that of step T.
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
    """Interpolate from low (place 0) to high (place 1) evenly in the power 1 / rho (EDM, eq. 5)."""
    return (low ** (1 / rho) + place * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def flow(steps: int = 500) -> NoiseSchedule:
    """Rectified flow (Liu et al. 2022, arXiv:2209.03003): x_t = (1 - t / T) x_0 + (t / T) eps."""
    _check(steps)
    sigma = np.arange(steps + 1) / steps
    return from_levels(1 - sigma, sigma, straight)


def rescale_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Return a schedule that ends in pure noise: Lin et al. 2023, arXiv:2305.08891, algorithm 1.

    alpha is shifted to 0 at T, and scaled so that it keeps its value at step 1. Raise InputError
    unless the schedule is variance preserving and has at least 2 steps.
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
    "course": course,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "karras": karras,
    "flow": flow,
}


def build(text: str) -> NoiseSchedule:
    """Return the schedule that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, SCHEDULES, "schedule")


def _from_alpha_bar(alpha_bar: ndarray, beta_limit: float, zero_snr: bool) -> NoiseSchedule:
    require(0 < beta_limit < 1, f"beta_limit={beta_limit}: it must be in (0, 1)")
    beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], beta_limit)
    return from_betas(np.append(0.0, beta), zero_snr)


def _check(steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> None:
    require(1 <= steps <= STEPS, f"steps={steps}: a schedule must have 1 to {STEPS} steps")
    require(
        0 < beta_min <= beta_max < 1,
        f"beta_min={beta_min}, beta_max={beta_max}: they must obey 0 < beta_min <= beta_max < 1",
    )
