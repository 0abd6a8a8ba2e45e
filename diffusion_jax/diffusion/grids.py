"""Grids: the levels that a sampler visits, from noise to data, usually ending at clean data.

The names leading, trailing and linspace are those of Lin et al. 2023 (arXiv:2305.08891, table 2).
"""

import tomllib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from scipy.special import betaincinv

from diffusion_jax import spec
from diffusion_jax.diffusion.levels import Grid as Grid
from diffusion_jax.diffusion.levels import at, at_ratio, between, check_steps, levels, read_levels
from diffusion_jax.diffusion.levels import check as check
from diffusion_jax.diffusion.schedules import NoiseSchedule, warp
from diffusion_jax.spec import Spec
from diffusion_jax.typing import InputError, require

PUBLISHED = Path(__file__).with_name("published_levels.toml")


def course(schedule: NoiseSchedule, n: int) -> Grid:
    """The course's levels T, T - s, ..., s, 0 with stride s = T / n.

    If n does not divide T, levels are rounded up to whole steps. (The course walks past 0.)
    """
    check_steps(schedule, n)
    return at(schedule, schedule.steps - np.arange(n + 1) * schedule.steps // n)


def leading(schedule: NoiseSchedule, n: int, first: int = 1) -> Grid:
    """n levels from step `first` upwards with stride T // n: arXiv:2305.08891, table 2.

    The first level that is visited is below T unless n is T. Stable Diffusion's first is 2, because
    diffusers counts from 0 and has steps_offset=1.
    """
    check_steps(schedule, n)
    require(first >= 1, f"first={first}: it must be at least 1")
    return at(schedule, np.append(first + np.arange(n)[::-1] * (schedule.steps // n), 0))


def trailing(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T downwards with stride T / n, rounded: arXiv:2305.08891, table 2.

    Levels are rounded to whole steps.
    """
    check_steps(schedule, n)
    return at(schedule, np.append(np.rint(schedule.steps - np.arange(n) * (schedule.steps / n)), 0))


def linspace(schedule: NoiseSchedule, n: int, whole: bool = True) -> Grid:
    """n levels evenly from step T to step 1, both included: arXiv:2305.08891, table 2.

    whole: whether levels are rounded to whole steps.
    """
    check_steps(schedule, n)
    t = np.linspace(schedule.steps, 1, n)
    return at(schedule, np.append(np.rint(t) if whole else t, 0))


def quadratic(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels from step T to step 1, evenly in sqrt(t): DDIM, arXiv:2010.02502, app. D.2.

    Levels are not rounded, so that they are distinct for every n up to T.
    """
    check_steps(schedule, n)
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
    check_steps(schedule, n)
    _check_rho(rho)
    spacing = partial(warp, rho=rho)
    return between(schedule, n, sigma_min, sigma_max, to_zero, spacing)


def exponential(
    schedule: NoiseSchedule,
    n: int,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Grid:
    """n levels with log(sigma / alpha) linear in place^rho: k-diffusion's polyexponential.

    The place of a level runs evenly from 1 to 0. With rho=1, the levels are even in log-SNR, as in
    DPM-Solver (arXiv:2206.00927). The other options are those of karras.
    """
    check_steps(schedule, n)
    _check_rho(rho)

    def spacing(low: float, high: float, place: ndarray) -> ndarray:
        return low * (high / low) ** (place**rho)

    return between(schedule, n, sigma_min, sigma_max, to_zero, spacing)


def kl_optimal(
    schedule: NoiseSchedule,
    n: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    to_zero: bool = True,
) -> Grid:
    """n levels evenly in arctan(sigma / alpha): Align Your Steps, arXiv:2404.14507.

    They minimise the KL divergence for Gaussian data of unit variance. Options as in karras.
    """
    check_steps(schedule, n)

    def spacing(low: float, high: float, place: ndarray) -> ndarray:
        return np.tan(np.arctan(low) + place * (np.arctan(high) - np.arctan(low)))

    return between(schedule, n, sigma_min, sigma_max, to_zero, spacing)


def ays(schedule: NoiseSchedule, n: int, model: Literal["sd1", "sdxl", "svd"] = "sd1") -> Grid:
    """Align Your Steps' published levels: Sabour et al. 2024, arXiv:2404.14507.

    They were optimised for 10 steps of the model; other numbers of steps interpolate log(sigma)
    linearly. If the schedule's largest sigma / alpha is below the first levels, it replaces them.
    """
    return _published(schedule, n, _read_published()["ays"][model])


def gits(schedule: NoiseSchedule, n: int, coefficient: float = 1.2) -> Grid:
    """GITS' published levels for Stable Diffusion 1: Chen et al. 2024, arXiv:2405.11326.

    There are lists for 2 to 20 steps. Other numbers of steps interpolate the nearest list as in
    ays.
    coefficient: 0.8, 0.85, ... or 1.5. The larger it is, the more steps are at low noise.
    """
    lists = {float(key): value for key, value in _read_published()["gits"].items()}
    known = ", ".join(map(str, lists))
    require(coefficient in lists, f"coefficient={coefficient}: it must be one of {known}")
    return _published(schedule, n, lists[coefficient][min(max(n, 2), 20) - 2])


def beta(
    schedule: NoiseSchedule,
    n: int,
    a: float = 0.6,
    b: float = 0.6,
    unit: Literal["t", "sigma"] = "t",
) -> Grid:
    """n levels at the quantiles of Beta(a, b) from step T towards step 1: arXiv:2407.12173.

    They are dense at both ends, and not rounded to whole steps, so that they are distinct.
    unit: "t", as in ComfyUI; "sigma" takes quantiles between the sigma / alpha of steps 1 and T,
    both included, as diffusers and AUTOMATIC1111 do.
    """
    check_steps(schedule, n)
    require(0 < a < np.inf and 0 < b < np.inf, f"a={a}, b={b}: they must be above 0")
    if unit == "sigma":

        def spacing(low: float, high: float, place: ndarray) -> ndarray:
            return low + betaincinv(a, b, place) * (high - low)

        return between(schedule, n, None, None, True, spacing)
    quantiles = betaincinv(a, b, 1 - np.arange(n) / n)
    return at(schedule, np.append(1 + quantiles * (schedule.steps - 1), 0))


def sgm_uniform(schedule: NoiseSchedule, n: int) -> Grid:
    """n levels evenly from step T to step 1 without step 1, as in Stability's sgm; not rounded."""
    check_steps(schedule, n)
    return at(schedule, np.append(np.linspace(schedule.steps, 1, n + 1)[:-1], 0))


def linear_quadratic(
    schedule: NoiseSchedule, n: int, threshold: float = 0.025, linear_steps: int | None = None
) -> Grid:
    """Mochi's and Movie Gen's levels (arXiv:2410.13720): small equal steps, then growing ones.

    The noise of a rectified flow falls by `threshold` in linear_steps equal steps (half of the n
    steps by default), and then quadratically. On a schedule that does not end in pure noise,
    sigma / alpha falls in this way, as in ComfyUI.
    """
    check_steps(schedule, n)
    first = n // 2 if linear_steps is None else linear_steps
    require(0 < threshold < 1, f"threshold={threshold}: it must be in (0, 1)")
    fits = 0 < first < n or n == 1
    require(fits, f"linear_steps={linear_steps}: it must be in 1..{n - 1}")
    i, slope = np.arange(n + 1), threshold / max(first, 1)
    curve = (1 - slope * n) / (n - first) ** 2
    noise = 1 - (slope * i + curve * np.maximum(i - first, 0) ** 2)
    noise[-1] = 0
    falls = f"threshold={threshold}: it is too large for {first} of {n} steps"
    require(np.all(np.diff(noise) < 0), falls)
    largest = schedule.ratio[-1]
    return _from_top(schedule, noise[1:] * largest if largest < np.inf else _flow_ratio(noise[1:]))


def shifted(schedule: NoiseSchedule, n: int, shift: float = 3.0, tokens: int | None = None) -> Grid:
    """Even steps of a rectified flow with the SNR shifted: Esser et al. 2024, arXiv:2403.03206.

    sigma / alpha = shift v / (1 - v), where v falls evenly from its value at step T to 0 (section
    5.3.2). 3 is Stable Diffusion 3's shift at 1024x1024.
    tokens: the length of the image's sequence, (height / 16) (width / 16) in FLUX.1. It gives the
    shift exp(mu), where mu rises linearly from 0.5 at 256 tokens to 1.15 at 4096.
    """
    check_steps(schedule, n)
    require(0 < shift < np.inf, f"shift={shift}: it must be above 0")
    if tokens is not None:
        require(0 < tokens <= 65536, f"tokens={tokens}: it must be in 1..65536")
        shift = float(np.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)))
    largest = schedule.ratio[-1] / shift
    top = 1.0 if largest == np.inf else largest / (1 + largest)
    return _from_top(schedule, shift * _flow_ratio(np.linspace(top, 0, n + 1)[1:]))


GRIDS: dict[str, Callable[..., Grid]] = {
    "course": course,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
    "uniform_logsnr": exponential,
    "exponential": exponential,
    "polyexponential": exponential,
    "karras": karras,
    "kl_optimal": kl_optimal,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
    "linear_quadratic": linear_quadratic,
    "shifted": shifted,
    "ays": ays,
    "gits": gits,
    "levels": levels,
}


def build(text: str, schedule: NoiseSchedule, n: int) -> Grid:
    """Return the grid of n steps that a spec describes. Raise InputError as spec.parse does."""
    return spec.parse(text, GRIDS, "grid", ("n",)).bind()(schedule, n)


def given_steps(grid: Spec | None) -> int | None:
    """Return the number of steps of a grid whose levels are given in its spec, or None."""
    return len(read_levels(**grid.options)) if grid and grid.name == "levels" else None


@cache
def _read_published() -> dict[str, Any]:
    return tomllib.loads(PUBLISHED.read_text())


def _published(schedule: NoiseSchedule, n: int, sigma: Sequence[float]) -> Grid:
    """Return n steps along a list of levels, between which log(sigma) is linear."""
    check_steps(schedule, n)
    largest = min(sigma[0], schedule.ratio[-1])
    given = np.append(largest, [each for each in sigma if each < largest])
    place = np.linspace(0, len(given) - 1, n + 1)
    ratio = np.exp(np.interp(place, np.arange(len(given)), np.log(given)))
    ratio[[0, -1]] = largest, 0
    return at_ratio(schedule, ratio)


def _from_top(schedule: NoiseSchedule, ratio: ndarray) -> Grid:
    """Return the grid from step T through given sigma / alpha."""
    return at_ratio(schedule, np.append(schedule.ratio[-1], ratio))


def _flow_ratio(noise: ndarray) -> ndarray:
    """Return sigma / alpha of a rectified flow whose sigma is given, below 1."""
    return noise / (1 - noise)


def _check_rho(rho: float) -> None:
    if not 0 < rho < np.inf:
        raise InputError(f"rho={rho}: it must be above 0")
