"""Single-step methods of several stages: Heun's, the midpoint's, and DPM-Solver's.

They solve dy/dr = eps, for y = x / alpha and r = sigma / alpha. A step from or to pure signal or
pure noise (r = 0, infinite) is Euler's, one row, which is DDIM.
"""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.ddim import ancestral_ratios
from diffusion_jax.samplers.tableau import Row, Symbols, Tableau, check_rows, symbols, tabulate
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import Level, require


def heun(schedule: NoiseSchedule, grid: Grid, space: str = "ratio") -> Tableau:
    """Heun's method, the trapezoidal rule whose second call is made after an Euler step.

    space: "ratio", dy = eps dr (EDM, Karras et al. 2022, arXiv:2206.00364, algorithm 1); or
    "levels", the same ODE as dx = x0 dalpha + eps dsigma, which in rectified flow is Heun in t.
    """
    require(space in ("ratio", "levels"), f"space={space!r}: it must be ratio or levels")
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
    schedule's largest r. s_noise scales the noise, but for a first step that is lifted: it starts
    from pure noise of (1 + g) r, where the algorithm adds noise to pure noise of r.
    Defaults: table 5, ImageNet-64, but s_noise.
    """
    for name, value in {"s_churn": s_churn, "s_min": s_min, "s_noise": s_noise}.items():
        require(0 <= value < np.inf, f"{name}={value}: it must be 0 or more")
    require(s_max >= s_min, f"s_max={s_max}: it must be at least s_min, {s_min}")
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
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878) with Heun's method.

    When the grid has walked through its levels with restart_min <= sigma / alpha <= restart_max,
    noise lifts the state back to the first of them, and they are walked again: `repeats` times.
    """
    require(repeats >= 0, f"repeats={repeats}: it must be 0 or more")
    bounds = f"restart_min={restart_min}, restart_max={restart_max}: they must obey 0 < min < max"
    require(0 < restart_min < restart_max < np.inf, bounds)
    steps = list(zip(grid.levels[:-1], grid.levels[1:], strict=True))
    inside = np.flatnonzero((restart_min <= grid.ratio) & (grid.ratio <= restart_max))
    first, last = (inside[0], inside[-1]) if len(inside) else (0, 0)
    check_rows(2 * (grid.steps + int(last - first) * repeats))
    return _heun([*steps[:last], *steps[first:last] * repeats, *steps[last:]])


def _heun(
    steps: Sequence[tuple[Level, Level]], s_noise: float = 1.0, space: str = "ratio"
) -> Tableau:
    """Heun's method over steps (start, end). Noise lifts a state to where the next step starts."""
    s = symbols(1)
    rows = []
    for (start, end), (lifted, _) in zip(steps, [*steps[1:], steps[-1][::-1]], strict=True):
        scale = lifted.alpha / end.alpha
        variance = lifted.sigma**2 - (scale * end.sigma) ** 2 if lifted != end else 0.0
        noise = s_noise * np.sqrt(variance) * s.xi
        euler = end.alpha * s.x0 + end.sigma * s.eps
        if end.sigma == 0 or (start.alpha == 0 and space == "ratio"):
            rows.append(Row(start, [scale * euler + noise]))
            continue
        change = (end.alpha - start.alpha) * s.x0 + (end.sigma - start.sigma) * s.eps
        if space == "ratio":
            change = (end.sigma - end.alpha * start.sigma / start.alpha) * s.eps
        rows.append(Row(start, [euler, euler - change / 2], ends_step=False))
        rows.append(Row(end, [scale * (s.z[0] + change / 2) + noise]))
    return tabulate(rows)


def dpm2(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """The midpoint method, with the midpoint in log r (k-diffusion's DPM2): 2 calls a step.

    y' = y + (r_down - r_i) eps(r_mid) + r_up xi, r_mid = sqrt(r_i r_down); eta as in
    euler_ancestral: 0 is deterministic.
    """
    s = symbols(1)
    rows = []
    levels = zip(grid.levels[:-1], grid.levels[1:], *ancestral_ratios(grid, eta), strict=True)
    for start, end, down, up in levels:
        noise = end.alpha * up * s.xi
        if start.alpha == 0 or down == 0:
            rows.append(Row(start, [end.alpha * (s.x0 + down * s.eps) + noise]))
            continue
        begin = start.sigma / start.alpha
        middle = schedule.at_ratio(np.sqrt(begin * down))
        inner = middle.alpha * s.x0 + middle.sigma * s.eps
        rows.append(Row(start, [inner, end.alpha * (s.x0 + begin * s.eps)], ends_step=False))
        rows.append(Row(middle, [s.z[0] + end.alpha * (down - begin) * s.eps + noise]))
    return tabulate(rows)


def dpm_singlestep(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int = 2,
    predict: str = "eps",
    rule: str | None = None,
    r1: float | None = None,
    r2: float = 2 / 3,
) -> Tableau:
    """DPM-Solver-2 and -3: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2.

    predict: "eps"; or "x0", which is DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1) in order 2.
    order: the calls a step, at log-SNR l_i, l_i + r1 h and l_i + r2 h. r1: 1/2 of order 2, 1/3 of
    order 3. rule: how a stage of order 2 weights its difference, as in dpm_multistep; as
    published it is "bh2" in order 2, "exact" in order 3.
    """
    require(order in (1, 2, 3), f"order={order}: it must be in 1..3")
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    rule = ("exact" if order == 3 else "bh2") if rule is None else rule
    r1 = (1 / 2 if order == 2 else 1 / 3) if r1 is None else r1
    inner = [r1, r2][: order - 1]
    ascending = np.all(np.diff([0.0, *inner, 1.0]) > 0)
    require(ascending, f"r1={r1}, r2={r2}: they must obey 0 < r1 < r2 < 1")
    finite = np.isfinite(grid.log_snr)
    rows: list[Row] = []
    for step, (start, end) in enumerate(zip(grid.levels[:-1], grid.levels[1:], strict=True)):
        stages = inner if finite[step] and finite[step + 1] else []
        h = grid.log_snr[step + 1] - grid.log_snr[step]
        levels = [schedule.at_ratio(grid.ratio[step] * np.exp(-r * h)) for r in stages]
        s = symbols(order - 1)
        rows += _single_step(s, [start, *levels, end], [*stages, 1.0], h, predict, rule)
    return tabulate(rows)


def _single_step(
    s: Symbols, levels: list[Level], places: list[float], h: float, predict: str, rule: str
) -> list[Row]:
    """Each stage is DDIM from the start, plus c (f - f_0) with the f of the stage before.

    The registers hold what is known of the later stages. places: of levels[1:], in units of h.
    """
    f = getattr(s, predict)
    weights = [0.0]
    for stage in range(1, len(places)):
        place, level = places[stage], levels[stage + 1]
        kappa, scale = (place * h, level.alpha) if predict == "x0" else (-place * h, level.sigma)
        node = np.array([places[stage - 1] / place])
        weights += list(scale * exponential_weights(kappa, node, "exact" if stage == 2 else rule))
    known = [
        level.alpha * s.x0 + level.sigma * s.eps - c * f
        for level, c in zip(levels[1:], weights, strict=True)
    ]
    rows = [Row(levels[0], known, ends_step=len(places) == 1)]
    for stage, c in enumerate(weights[1:], 1):
        outputs = [s.z[0] + c * f, *s.z[1:]]
        rows.append(Row(levels[stage], outputs, ends_step=stage == len(places) - 1))
    return rows
