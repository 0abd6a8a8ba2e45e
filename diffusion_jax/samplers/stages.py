"""Single-step methods of several stages: Heun's, the midpoint method and DPM-Solver.

They solve dy/dr = eps, where y = x / alpha and r = sigma / alpha. A step that begins or ends at
pure signal (r = 0) or pure noise (r infinite) is Euler's. It takes one row and equals DDIM.
"""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.ddim import ancestral_ratios
from diffusion_jax.samplers.tableau import Row, Symbols, Tableau, check_rows, symbols, tabulate
from diffusion_jax.typing import Level, require


def heun(schedule: NoiseSchedule, grid: Grid, space: str = "ratio") -> Tableau:
    """Heun's method: EDM, Karras et al. 2022, arXiv:2206.00364, algorithm 1; 2 calls a step.

    It is the trapezoidal rule, whose second call follows an Euler step.
    space: "ratio" solves dy = eps dr, as in EDM. "levels" solves the same ODE in the form
    dx = x0 dalpha + eps dsigma, which in rectified flow is Heun in t.
    """
    require(space in ("ratio", "levels"), f"space={space!r}: it must be ratio or levels")
    return _walk(_steps(grid), space=space)


def edm(
    schedule: NoiseSchedule,
    grid: Grid,
    s_churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.0,
) -> Tableau:
    """EDM's stochastic sampler, Heun with churn: arXiv:2206.00364, algorithm 2.

    Before each step, noise raises r to (1 + g) r, but not beyond the schedule's largest r. g is
    min(s_churn / N, sqrt(2) - 1) if s_min <= r <= s_max, and otherwise 0.
    s_noise scales this noise, except in the first step: if r is raised there, sampling starts from
    pure noise of (1 + g) r, where the algorithm adds noise to pure noise of r.
    The defaults are those of table 5 for ImageNet-64, except s_noise.
    """
    for name, value in {"s_churn": s_churn, "s_min": s_min, "s_noise": s_noise}.items():
        require(0 <= value < np.inf, f"{name}={value}: it must be 0 or more")
    require(s_max >= s_min, f"s_max={s_max}: it must be at least s_min, {s_min}")
    ratio = grid.ratio[:-1]
    growth = min(s_churn / grid.steps, np.sqrt(2) - 1) * ((s_min <= ratio) & (ratio <= s_max))
    raised = np.minimum(ratio * (1 + growth), schedule.ratio[-1])
    steps = [
        (schedule.at_ratio(r) if r > low else start, end)
        for r, low, (start, end) in zip(raised, ratio, _steps(grid), strict=True)
    ]
    return _walk(steps, s_noise)


def restart(
    schedule: NoiseSchedule,
    grid: Grid,
    repeats: int = 2,
    restart_min: float = 0.1,
    restart_max: float = 2.0,
) -> Tableau:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878) with Heun's method.

    When the grid has passed its levels with restart_min <= sigma / alpha <= restart_max, noise
    raises the state back to the first of them, and the steps between them are repeated. This
    happens `repeats` times.
    """
    require(repeats >= 0, f"repeats={repeats}: it must be 0 or more")
    bounds = f"restart_min={restart_min}, restart_max={restart_max}: they must obey 0 < min < max"
    require(0 < restart_min < restart_max < np.inf, bounds)
    steps = _steps(grid)
    inside = np.flatnonzero((restart_min <= grid.ratio) & (grid.ratio <= restart_max))
    first, last = (inside[0], inside[-1]) if len(inside) else (0, 0)
    check_rows(2 * (grid.steps + int(last - first) * repeats))
    return _walk([*steps[:last], *steps[first:last] * repeats, *steps[last:]])


def _steps(grid: Grid) -> list[tuple[Level, Level]]:
    """Return the steps of a grid as pairs of levels (start, end)."""
    return list(zip(grid.levels[:-1], grid.levels[1:], strict=True))


def _walk(
    steps: Sequence[tuple[Level, Level]], s_noise: float = 1.0, space: str = "ratio"
) -> Tableau:
    """Return the tableau of Heun's steps. Add noise where a step starts above the previous end."""
    rows: list[Row] = []
    for step, (start, end) in enumerate(steps):
        rows += _heun_step(start, end, space)
        following = steps[step + 1][0] if step + 1 < len(steps) else end
        if following != end:
            rows[-1] = _lifted(rows[-1], end, following, s_noise)
    return tabulate(rows)


def _heun_step(start: Level, end: Level, space: str) -> list[Row]:
    """Return a step of EDM's algorithm 1: an Euler step, then the mean of both ends' slopes."""
    s = symbols(1)
    euler = end.alpha * s.x0 + end.sigma * s.eps  # lines 4 and 5
    if end.sigma == 0 or (start.alpha == 0 and space == "ratio"):
        return [Row(start, [euler])]
    if space == "ratio":
        change = (end.sigma - end.alpha * start.sigma / start.alpha) * s.eps  # slope times step
    else:
        change = (end.alpha - start.alpha) * s.x0 + (end.sigma - start.sigma) * s.eps
    return [
        Row(start, [euler, euler - change / 2], ends_step=False),  # keeps half of the first slope
        Row(end, [s.z[0] + change / 2]),  # lines 7 and 8, with half of the second slope
    ]


def _lifted(row: Row, start: Level, end: Level, s_noise: float) -> Row:
    """Return the row with noise added to its state, up to a noisier level: algorithm 2, line 6."""
    scale = end.alpha / start.alpha
    deviation = np.sqrt(end.sigma**2 - (scale * start.sigma) ** 2)
    state = scale * row.outputs[0] + s_noise * deviation * symbols(1).xi
    return row._replace(outputs=[state, *row.outputs[1:]])


def dpm2(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """The midpoint method, with the midpoint in log r: k-diffusion's DPM2; 2 calls a step.

    y' = y + (r_down - r_i) eps(r_mid) + r_up xi, where r_mid = sqrt(r_i r_down). eta is that of
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
    """DPM-Solver, single-step: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2.

    predict: "eps"; or "x0", which in order 2 is DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1).
    order: number of calls per step, 1 to 3, at log(alpha / sigma) = l_i, l_i + r1 h and l_i + r2 h.
    r1: by default, 1/2 in order 2 and 1/3 in order 3.
    rule: how a stage of order 2 weights its difference, as in dpm_multistep; by default, as
    published, "bh2" in order 2 and "exact" in order 3.
    """
    require(order in (1, 2, 3), f"order={order}: it must be in 1..3")
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    rule = ("exact" if order == 3 else "bh2") if rule is None else rule
    r1 = (1 / 2 if order == 2 else 1 / 3) if r1 is None else r1
    inner = [r1, r2][: order - 1]
    ascending = np.all(np.diff([0.0, *inner, 1.0]) > 0)
    require(ascending, f"r1={r1}, r2={r2}: they must obey 0 < r1 < r2 < 1")
    finite = np.isfinite(grid.half_log_snr)
    rows: list[Row] = []
    for step, (start, end) in enumerate(zip(grid.levels[:-1], grid.levels[1:], strict=True)):
        stages = inner if finite[step] and finite[step + 1] else []
        h = grid.half_log_snr[step + 1] - grid.half_log_snr[step]
        levels = [schedule.at_ratio(grid.ratio[step] * np.exp(-r * h)) for r in stages]
        s = symbols(order - 1)
        rows += _single_step(s, [start, *levels, end], [*stages, 1.0], h, predict, rule)
    return tabulate(rows)


def _single_step(
    s: Symbols, levels: list[Level], places: list[float], h: float, predict: str, rule: str
) -> list[Row]:
    """Return the rows of a step: each stage is DDIM from the start, plus c (f - f_0).

    f is the prediction at the previous stage. The registers hold the known terms of the later
    stages.
    places: positions of levels[1:] in the step, in units of h.
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
