"""Runge-Kutta methods in r = sigma / alpha, and exponential ones in log(alpha / sigma).

Every stage is DDIM's from the start of the step, plus sum_k w_k (f_k - f_0), where f_k is x0 or eps
at the stage k. A step that begins at pure noise or ends at clean data is DDIM's, in one row.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import phi
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import Level, require

CLASSICAL = {  # the places of the stages in a step, and the weights of f_1, f_2, ...
    1: ([1.0], [[]]),
    2: ([1.0, 1.0], [[0.0], [1 / 2]]),
    3: ([1 / 2, 1.0, 1.0], [[0.0, 0.0], [2.0, 0.0], [2 / 3, 1 / 6]]),
    4: ([1 / 2, 1 / 2, 1.0, 1.0], [[0, 0, 0], [1 / 2, 0, 0], [0, 1, 0], [1 / 3, 1 / 3, 1 / 6]]),
}


def runge_kutta(schedule: NoiseSchedule, grid: Grid, order: int = 3) -> Tableau:
    """rhoRK of DEIS (Zhang and Chen 2022, arXiv:2204.13902): Runge-Kutta methods for dy/dr = eps.

    y is x / alpha. order, 1 to 4, is also the number of calls per step: Euler's method, Heun's,
    Kutta's, and the classical one.
    """
    require(order in CLASSICAL, f"order={order}: it must be in 1..4")
    places, weights = CLASSICAL[order]
    change_of = np.diff(grid.ratio)

    def stages(step: int) -> tuple[list[Level], ndarray]:
        start, change, end = grid.ratio[step], change_of[step], grid.levels[step + 1]
        levels = [end if c == 1 else schedule.at_ratio(start + c * change) for c in places]
        alpha = np.array([level.alpha for level in levels])
        return levels, change * alpha[:, None] * np.array(weights)

    return _in_stages(grid, "eps", order, stages)


def heunpp(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """Heun++, as ComfyUI has it under the name heunpp2: 3 calls per step; order 1.

    Euler's method goes over this step and the next one. The slope of the step is then the mean of
    the three slopes. The later two have the weight r / (3 r_0), at their r, where r_0 is that of
    the first level. The last step but one has two slopes and r / (2 r_0); the last step has one.
    """
    ratio, change = grid.ratio, np.diff(grid.ratio)
    first = ratio[np.isfinite(ratio)][0]

    def stages(step: int) -> tuple[list[Level], ndarray]:
        calls = min(3, grid.steps - step)
        ahead = np.arange(step + 1, step + calls)
        ends = [*ahead, step + 1]
        weights = np.zeros((calls, calls - 1))
        weights[-1] = ratio[ahead] / (calls * first) * change[step]
        if calls == 3:
            weights[1, 0] = change[step + 1]
        return [grid.levels[end] for end in ends], grid.alpha[ends, None] * weights

    return _in_stages(grid, "eps", 3, stages)


def res(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int = 2,
    predict: str = "x0",
    c2: float = 1 / 2,
    c3: float = 1.0,
) -> Tableau:
    """RES, single-step: Zhang et al. 2023, arXiv:2308.02157; order, 2 or 3, is the number of calls.

    These are the exponential Runge-Kutta methods of Hochbruck and Ostermann 2005 (SIAM Journal on
    Numerical Analysis 43). With order=2 it is dpmpp with rule=exact. Multistep RES is
    dpmpp_multistep with rule=exact.
    predict: f, "x0" or "eps". c2, c3: the places of the later calls in the step, in log-SNR.
    """
    require(order in (2, 3), f"order={order}: it must be 2 or 3")
    valid = 0 < c2 <= 1 and 0 < c3 <= 1 and (order == 2 or abs(c2 - 2 / 3) > 1e-6)
    require(valid, f"c2={c2}, c3={c3}: they must be above 0 and at most 1; c2=2/3 needs order=2")
    gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2)) if order == 3 else 0.0

    def weigh(kappa: float) -> list[list[float]]:
        if order == 2:
            return [[0], [phi(2, -kappa) / c2]]
        inner = gamma * c2 * phi(2, -c2 * kappa) + c3**2 / c2 * phi(2, -c3 * kappa)
        last = phi(2, -kappa) / (gamma * c2 + c3)
        return [[0, 0], [inner, 0], [gamma * last, last]]

    return _exponential(schedule, grid, predict, [c2, c3][: order - 1], weigh)


def etdrk(schedule: NoiseSchedule, grid: Grid, order: int = 3, predict: str = "x0") -> Tableau:
    """ETDRK, exponential time differencing: Cox and Matthews 2002 (J. Comput. Phys. 176).

    order: the number of calls per step, 2 to 4. predict: f, "x0" or "eps".
    """
    require(order in (2, 3, 4), f"order={order}: it must be in 2..4")

    def weigh(kappa: float) -> list[list[float]]:
        if order == 2:
            return [[0], [phi(2, -kappa)]]
        middle, last = 4 * phi(2, -kappa) - 8 * phi(3, -kappa), 4 * phi(3, -kappa) - phi(2, -kappa)
        if order == 3:
            return [[0, 0], [2 * phi(1, -kappa), 0], [middle, last]]
        half = phi(1, -kappa / 2) / 2
        return [[0, 0, 0], [half, 0, 0], [0, 2 * half, 0], [middle / 2, middle / 2, last]]

    places = {2: [1.0], 3: [1 / 2, 1.0], 4: [1 / 2, 1 / 2, 1.0]}[order]
    return _exponential(schedule, grid, predict, places, weigh)


def _exponential(
    schedule: NoiseSchedule,
    grid: Grid,
    predict: str,
    places: list[float],
    weigh: Callable[[float], Sequence[Sequence[float]]],
) -> Tableau:
    """Return the tableau of an exponential method, in the notation of coefficients.py.

    places: those of the calls after the first, in units of h. weigh(kappa): the w / (scale kappa).
    """
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    h = np.diff(grid.half_log_snr)

    def stages(step: int) -> tuple[list[Level], ndarray]:
        end = grid.levels[step + 1]
        ratios = grid.ratio[step] * np.exp(-h[step] * np.array(places))
        inner = zip(places, ratios, strict=True)
        levels = [end if place == 1 else schedule.at_ratio(ratio) for place, ratio in inner]
        levels.append(end)
        scale = [level.alpha if predict == "x0" else level.sigma for level in levels]
        kappa = h[step] if predict == "x0" else -h[step]
        return levels, kappa * np.array(scale)[:, None] * np.array(weigh(kappa))

    return _in_stages(grid, predict, len(places) + 1, stages)


def _in_stages(
    grid: Grid, predict: str, most: int, stages: Callable[[int], tuple[list[Level], ndarray]]
) -> Tableau:
    """Return the tableau of a Runge-Kutta method with at most `most` calls per step.

    stages(step): the level of each stage, of which the last is the end of the step, and the weights
    w of f_1, f_2, ... in each stage. The registers hold the known terms of the later stages.
    """
    s, rows = symbols(most - 1), []
    f = getattr(s, predict)
    for step, start in enumerate(grid.levels[:-1]):
        levels, weights = [grid.levels[step + 1]], np.zeros((1, 0))
        if start.alpha > 0 and grid.sigma[step + 1] > 0:
            levels, weights = stages(step)
        outputs = [
            level.alpha * s.x0 + level.sigma * s.eps - total * f
            for level, total in zip(levels, weights.sum(1), strict=True)
        ]
        rows.append(Row(start, outputs, ends_step=len(levels) == 1))
        for call, level in enumerate(levels[:-1]):
            left = len(levels) - 1 - call
            outputs = [z + w * f for z, w in zip(s.z[:left], weights[-left:, call], strict=True)]
            rows.append(Row(level, outputs, ends_step=left == 1))
    return tabulate(rows)
