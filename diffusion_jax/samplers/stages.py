"""Single-step methods of two stages in y = x / alpha over r = sigma / alpha, where dy/dr = eps.

A step from or to pure signal or pure noise (r = 0, infinite) is Euler's, one row, which is DDIM.
"""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.ddim import ancestral_ratios
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, Level


def heun(schedule: NoiseSchedule, grid: Grid, space: str = "ratio") -> Tableau:
    """Heun's method, the trapezoidal rule whose second call is made after an Euler step.

    space: "ratio", dy = eps dr (EDM, Karras et al. 2022, arXiv:2206.00364, algorithm 1); or
    "levels", the same ODE as dx = x0 dalpha + eps dsigma, which in rectified flow is Heun in t.
    """
    if space not in ("ratio", "levels"):
        raise InputError(f"space={space!r} is unknown: choose from ratio, levels")
    return _heun(list(zip(grid.levels[:-1], grid.levels[1:], strict=True)), space=space)


def edm(
    schedule: NoiseSchedule,
    grid: Grid,
    s_churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.0,
) -> Tableau:
    """EDM's stochastic sampler (algorithm 2): before each Heun step, noise lifts r to (1 + g) r.

    g = min(s_churn / N, sqrt(2) - 1) where s_min <= r <= s_max, else 0, and never beyond the
    schedule's largest r. s_noise scales the noise. Defaults: table 5, ImageNet-64.
    """
    for name, value in {"s_churn": s_churn, "s_min": s_min, "s_noise": s_noise}.items():
        if not 0 <= value < np.inf:
            raise InputError(f"{name}={value}: it must be 0 or more")
    if not s_max >= s_min:
        raise InputError(f"s_max={s_max}: it must be at least s_min, {s_min}")
    ratio = grid.ratio[:-1]
    growth = min(s_churn / grid.steps, np.sqrt(2) - 1) * ((s_min <= ratio) & (ratio <= s_max))
    raised = np.minimum(ratio * (1 + growth), schedule.ratio[-1])
    lifted = zip(raised > ratio, raised, grid.levels[:-1], strict=True)
    starts = [schedule.at_ratio(r) if lift else level for lift, r, level in lifted]
    return _heun(list(zip(starts, grid.levels[1:], strict=True)), s_noise)


def restart(
    schedule: NoiseSchedule,
    grid: Grid,
    repeats: int = 2,
    restart_min: float = 0.1,
    restart_max: float = 2.0,
) -> Tableau:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878, algorithm 1) with Heun's method.

    When the grid has walked through its levels with restart_min <= sigma / alpha <= restart_max,
    noise lifts the state back to the first of them, and they are walked again: `repeats` times.
    """
    if repeats < 0:
        raise InputError(f"repeats={repeats}: it must be 0 or more")
    if not 0 < restart_min < restart_max < np.inf:
        raise InputError(
            f"restart_min={restart_min}, restart_max={restart_max}: they must obey "
            "0 < restart_min < restart_max"
        )
    steps = list(zip(grid.levels[:-1], grid.levels[1:], strict=True))
    inside = np.flatnonzero((restart_min <= grid.ratio) & (grid.ratio <= restart_max))
    if not len(inside):
        return _heun(steps)
    first, last = inside[0], inside[-1]
    return _heun([*steps[:last], *steps[first:last] * repeats, *steps[last:]])


def _heun(
    steps: Sequence[tuple[Level, Level]], s_noise: float = 1.0, space: str = "ratio"
) -> Tableau:
    """Heun's method over steps (start, end). Noise lifts a state to where the next step starts."""
    x, x0, eps, xi, z = symbols(1)
    rows = []
    for step, (start, end) in enumerate(steps):
        lifted = steps[step + 1][0] if step + 1 < len(steps) else end
        scale = lifted.alpha / end.alpha
        noise = s_noise * np.sqrt(max(lifted.sigma**2 - (scale * end.sigma) ** 2, 0)) * xi
        if lifted == end:
            scale, noise = 1, 0 * xi
        euler = end.alpha * x0 + end.sigma * eps
        if _is_pure(start, end) and (space == "ratio" or end.sigma == 0):
            rows.append(Row(start, [scale * euler + noise]))
            continue
        slope = (end.alpha - start.alpha) * x0 + (end.sigma - start.sigma) * eps
        if space == "ratio":
            slope = (end.sigma - end.alpha * start.sigma / start.alpha) * eps
        rows.append(Row(start, [euler, euler - slope / 2], ends_step=False))
        rows.append(Row(end, [scale * (z + slope / 2) + noise]))
    return tabulate(rows)


def dpm2(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """The midpoint method, with the midpoint in log r (k-diffusion's DPM2): 2 calls a step.

    y' = y + (r_down - r_i) eps(r_mid) + r_up xi, r_mid = sqrt(r_i r_down); eta as in
    euler_ancestral: 0 is deterministic.
    """
    x, x0, eps, xi, z = symbols(1)
    rows = []
    levels = zip(grid.levels[:-1], grid.levels[1:], *ancestral_ratios(grid, eta), strict=True)
    for start, end, down, up in levels:
        noise = end.alpha * up * xi
        if _is_pure(start, end) or down == 0:
            rows.append(Row(start, [end.alpha * (x0 + down * eps) + noise]))
            continue
        begin = start.sigma / start.alpha
        middle = schedule.at_ratio(np.sqrt(begin * down))
        inner = middle.alpha * x0 + middle.sigma * eps
        rows.append(Row(start, [inner, end.alpha * (x0 + begin * eps)], ends_step=False))
        rows.append(Row(middle, [z + end.alpha * (down - begin) * eps + noise]))
    return tabulate(rows)


def _is_pure(start: Level, end: Level) -> bool:
    return start.alpha == 0 or end.sigma == 0
