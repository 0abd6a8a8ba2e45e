"""Methods of several calls per step: DPM-Solver(++), SEEDS, DPM-Solver++ SDE, and their engine.

The state at each stage j of a step from i is, with r = sigma / alpha,

    x_j = alpha_j x0 + sigma_j d eps + scale sum_k w_jk (f_k - f_i) + sigma_j sqrt(1 - d^2) xi

where f_k is the prediction at the stage k, and scale is that of coefficients.py. A step that begins
or ends at pure signal (r = 0) or pure noise (r infinite) has no inner stages.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule, noise_ratio
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.ddim import ancestral_ratios
from diffusion_jax.tableau import Row, Symbols, Tableau, symbols, tabulate
from diffusion_jax.typing import Level, require

Weigh = Callable[[ndarray], Sequence[Sequence[float]] | ndarray]  # kappa of the stages -> w_jk
Places = Sequence[float] | ndarray
Scheme = Callable[[int], tuple[Places, Weigh]]  # step -> places of the inner stages, weights
Noise = Callable[[ndarray], tuple[ndarray, ndarray]]  # r of a step's levels -> d, and times


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
    r1: by default, 1/2 in order 2 and 1/3 in order 3; at most 1 in order 2.
    rule: how a stage of order 2 weights its difference, as in dpm_multistep; by default, as
    published, "bh2" in order 2 and "exact" in order 3.
    eta: that of euler_ancestral; 1 is k-diffusion's DPM2 ancestral or DPM-Solver++(2S) ancestral.
    """
    scheme = _chain(order, r1, r2, rule)
    return single_steps(schedule, grid, predict, order, scheme, ancestral=eta)


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
    eta: scale of the noise, above 0 and at most 10; 1 is the reverse SDE.
    order, rule, r1, r2: those of dpm_singlestep.
    """
    require(0 < eta <= 10, f"eta={eta}: it must be above 0 and at most 10")

    def noise(r: ndarray) -> tuple[ndarray, ndarray]:
        return (r[1:] / r[0]) ** eta, r ** (-2 * eta)

    return single_steps(schedule, grid, "x0", order, _chain(order, r1, r2, rule), noise)


def dpmpp_sde(schedule: NoiseSchedule, grid: Grid, eta: float = 1.0, r1: float = 1 / 2) -> Tableau:
    """k-diffusion's DPM-Solver++ SDE, a single-step method: 2 calls a step.

    Each of its stages is a step of euler_ancestral of this eta from the start of the step. Its
    noise is from one Brownian motion in r, as with k-diffusion's BrownianTreeNoiseSampler.
    r1: place of the inner stage, in units of h.
    """
    require(0 <= eta <= 1, f"eta={eta}: it must be in [0, 1]")
    scheme = _chain(2, r1, 1.0, "bh2")
    return single_steps(schedule, grid, "x0", 2, scheme, partial(_ancestral, eta))


def _ancestral(eta: float, r: ndarray) -> tuple[ndarray, ndarray]:
    """Return d of each stage, and the times of the Brownian motion that makes xi, start included.

    r: that of the start of a step and of its stages. The d are those of ancestral_ratios.
    """
    return np.sqrt(1 - eta**2 * (1 - (r[1:] / r[0]) ** 2)), -r


_no_noise = partial(_ancestral, 0.0)


def _chain(order: int, r1: float | None, r2: float, rule: str | None) -> Scheme:
    """Return the scheme of which each stage uses the difference of the stage before only."""
    require(order in (1, 2, 3), f"order={order}: it must be in 1..3")
    r1 = (1 / 2 if order == 2 else 1 / 3) if r1 is None else r1
    places = [*[r1, r2][: order - 1], 1.0]
    ascending = np.all(np.diff([0.0, *places]) > 0) or (order == 2 and r1 == 1)
    bounds = f"r1={r1}, r2={r2}: they must obey 0 < r1 < r2 < 1; r1=1 needs order=2"
    require(ascending, bounds)
    rules = ["", rule or ("exact" if order == 3 else "bh2"), "exact"]

    def weigh(kappa: ndarray) -> ndarray:
        weights = np.zeros((order, order - 1))
        for stage in range(1, order):
            node = np.array([places[stage - 1] / places[stage]])
            weights[stage, stage - 1] = exponential_weights(kappa[stage], node, rules[stage])[0]
        return weights

    return lambda step: (places[:-1], weigh)


def single_steps(
    schedule: NoiseSchedule,
    grid: Grid,
    predict: str,
    order: int,
    scheme: Scheme,
    noise: Noise = _no_noise,
    ancestral: float = 0.0,
) -> Tableau:
    """Return the tableau of steps with `noise` in the stages, or with ancestral noise after them.

    predict: f, "x0" or "eps". order: the most calls in a step.
    """
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    s = symbols(order - 1)
    rows: list[Row] = []
    whole: tuple[Places, Weigh] = [], lambda kappa: np.zeros((1, 0))  # without inner stages
    steps = zip(grid.levels[:-1], grid.levels[1:], *ancestral_ratios(grid, ancestral), strict=True)
    for step, (start, end, down, up) in enumerate(steps):
        first, last = grid.ratio[step], Level(end.t, end.alpha, end.alpha * down)
        places, weigh = scheme(step) if down > 0 and first < np.inf else whole
        ratios = zip(places, first * (down / first) ** np.array(places), strict=True)
        inner = [last if np.isclose(c, 1) else schedule.at_ratio(ratio) for c, ratio in ratios]
        rows += _single_step(s, [start, *inner, last], predict, weigh, noise, up)
    return tabulate(rows)


def _single_step(
    s: Symbols, levels: list[Level], predict: str, weigh: Weigh, noise: Noise, up: float
) -> list[Row]:
    """Return the rows of a step. The registers hold the known terms of the later stages.

    levels: of the start and of each stage. up: r of the noise after the step.
    """
    f = getattr(s, predict)
    _, alpha, sigma = np.array(levels, np.float64).T
    ratio = noise_ratio(alpha, sigma)
    with np.errstate(divide="ignore", invalid="ignore"):  # in steps that use no kappa
        kept, clock = noise(ratio)
        log = np.log(ratio[1:] / ratio[0])
        kappa, scale = (log, sigma) if predict == "eps" else (-log - np.log(kept), alpha)
    weights = scale[1:, None] * np.asarray(weigh(kappa))
    state = np.outer(alpha[1:], s.x0) + np.outer(sigma[1:] * kept, s.eps)
    state -= np.outer(weights.sum(1), f)
    share = np.ones((1, 1))  # of each row in the variance of xi at each stage
    if len(levels) > 2:
        share = np.diff(clock)[:, None] / (clock[1:] - clock[0])
    deviation = sigma[1:] * np.sqrt((1 - kept**2) * share)
    deviation[-1, -1] += alpha[-1] * up
    rows = []
    for call, level in enumerate(levels[:-1]):
        if call:
            state = np.stack(s.z[: len(weights) - call]) + np.outer(weights[call:, call - 1], f)
        later = state + np.outer(deviation[call, call:], s.xi)
        rows.append(Row(level, list(later), call == len(weights) - 1))
    return rows
