"""Exponential single-step methods of several stages: DPM-Solver(++), SEEDS and DPM-Solver++ SDE.

In the notation of coefficients.py, the state at each stage j of a step from i is

    x_j = alpha_j x0 + sigma_j d eps + scale c (f - f_i) + sigma_j sqrt(1 - d^2) xi

where f is the prediction at the previous stage. A step that begins or ends at pure signal (r = 0)
or pure noise (r infinite) has no inner stages. r is sigma / alpha.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule, noise_ratio
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.ddim import ancestral_ratios
from diffusion_jax.samplers.tableau import Row, Symbols, Tableau, symbols, tabulate
from diffusion_jax.typing import Level, require


def dpm_singlestep(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int = 2,
    predict: str = "eps",
    rule: str | None = None,
    r1: float | None = None,
    r2: float = 2 / 3,
    eta: float = 0.0,
) -> Tableau:
    """DPM-Solver, single-step: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2.

    predict: "eps", which in order 2 is also k-diffusion's DPM2; or "x0", which in order 2 is
    DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1).
    order: number of calls per step, 1 to 3, at log(alpha / sigma) = l_i, l_i + r1 h and l_i + r2 h.
    r1: by default, 1/2 in order 2 and 1/3 in order 3.
    rule: how a stage of order 2 weights its difference, as in dpm_multistep; by default, as
    published, "bh2" in order 2 and "exact" in order 3.
    eta: that of euler_ancestral; 1 is k-diffusion's DPM2 ancestral or DPM-Solver++(2S) ancestral.
    """
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    inner, noise = _stages(order, r1, r2), partial(_ancestral, 0.0)
    return _single_steps(schedule, grid, inner, predict, rule, noise, eta)


def seeds(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int = 2,
    eta: float = 1.0,
    rule: str | None = None,
    r1: float | None = None,
    r2: float = 2 / 3,
) -> Tableau:
    """SEEDS-1 to 3 in data prediction: Gonzalez et al. 2023, arXiv:2305.14267.

    They solve the SDE of coefficients.py; the noise of all stages of a step is from one path.
    eta: scale of the noise, above 0; 1 is the reverse SDE.
    order, rule, r1, r2: those of dpm_singlestep.
    """
    require(0 < eta < np.inf, f"eta={eta}: it must be above 0")

    def noise(r: ndarray) -> tuple[ndarray, ndarray]:
        return (r[1:] / r[0]) ** eta, r ** (-2 * eta)

    return _single_steps(schedule, grid, _stages(order, r1, r2), "x0", rule, noise)


def dpmpp_sde(schedule: NoiseSchedule, grid: Grid, eta: float = 1.0, r1: float = 1 / 2) -> Tableau:
    """k-diffusion's DPM-Solver++ SDE, a single-step method: 2 calls a step.

    Each of its stages is a step of euler_ancestral of this eta from the start of the step. Its
    noise is from one Brownian motion in r, as with k-diffusion's BrownianTreeNoiseSampler.
    r1: place of the inner stage, in units of h.
    """
    require(0 <= eta <= 1, f"eta={eta}: it must be in [0, 1]")
    noise = partial(_ancestral, eta)
    return _single_steps(schedule, grid, _stages(2, r1, 1.0), "x0", "bh2", noise)


def _ancestral(eta: float, r: ndarray) -> tuple[ndarray, ndarray]:
    """Return d of each stage, and the times of the Brownian motion that makes xi, start included.

    r: that of the start of a step and of its stages. The d are those of ancestral_ratios.
    """
    return np.sqrt(1 - eta**2 * (1 - (r[1:] / r[0]) ** 2)), -r


def _stages(order: int, r1: float | None, r2: float) -> list[float]:
    """Return the places of the inner stages in a step, in units of h."""
    require(order in (1, 2, 3), f"order={order}: it must be in 1..3")
    r1 = (1 / 2 if order == 2 else 1 / 3) if r1 is None else r1
    inner = [r1, r2][: order - 1]
    ascending = np.all(np.diff([0.0, *inner, 1.0]) > 0)
    require(ascending, f"r1={r1}, r2={r2}: they must obey 0 < r1 < r2 < 1")
    return inner


def _single_steps(
    schedule: NoiseSchedule,
    grid: Grid,
    inner: list[float],
    predict: str,
    rule: str | None,
    noise: Callable[[ndarray], tuple[ndarray, ndarray]],
    ancestral: float = 0.0,
) -> Tableau:
    """Return the tableau of steps with stages at `inner` and with noise in or, ancestral, after."""
    rule = ("exact" if len(inner) == 2 else "bh2") if rule is None else rule
    s, rows = symbols(len(inner)), []
    steps = zip(grid.levels[:-1], grid.levels[1:], *ancestral_ratios(grid, ancestral), strict=True)
    for step, (start, end, down, up) in enumerate(steps):
        first = grid.ratio[step]
        places = [*(inner if down > 0 and first < np.inf else []), 1.0]
        stages = [schedule.at_ratio(first * (down / first) ** place) for place in places[:-1]]
        levels = [start, *stages, Level(end.t, end.alpha, end.alpha * down)]
        *before, last = _single_step(s, levels, places, predict, rule, noise)
        x_next = last.outputs[0] + end.alpha * up * s.xi
        rows += [*before, last._replace(outputs=[x_next, *last.outputs[1:]])]
    return tabulate(rows)


def _single_step(
    s: Symbols,
    levels: list[Level],
    places: list[float],
    predict: str,
    rule: str,
    noise: Callable[[ndarray], tuple[ndarray, ndarray]],
) -> list[Row]:
    """Return the rows of a step. The registers hold the known terms of the later stages.

    places: positions of levels[1:] in the step, in units of h.
    """
    f = getattr(s, predict)
    _, alpha, sigma = np.array(levels, np.float64).T
    ratio = noise_ratio(alpha, sigma)
    with np.errstate(divide="ignore"):
        kept, clock = noise(ratio)
    weights = [0.0]
    for stage in range(1, len(places)):
        kappa, scale = np.log(ratio[stage + 1] / ratio[0]), sigma[stage + 1]
        if predict == "x0":
            kappa, scale = -kappa - np.log(kept[stage]), alpha[stage + 1]
        node = np.array([places[stage - 1] / places[stage]])
        weights += list(scale * exponential_weights(kappa, node, "exact" if stage == 2 else rule))
    known = [
        a * s.x0 + b * d * s.eps - c * f
        for a, b, d, c in zip(alpha[1:], sigma[1:], kept, weights, strict=True)
    ]
    share = np.ones((1, 1))  # of each row in the variance of xi at each stage
    if len(places) > 1:
        share = np.diff(clock)[:, None] / (clock[1:] - clock[0])
    deviation = sigma[1:] * np.sqrt((1 - kept**2) * share)
    rows = []
    for stage, c in enumerate(weights):
        later = known if stage == 0 else [s.z[0] + c * f, *s.z[1 : len(places) - stage]]
        spread = deviation[stage, stage:, None] * s.xi
        rows.append(Row(levels[stage], list(later + spread), stage == len(places) - 1))
    return rows
