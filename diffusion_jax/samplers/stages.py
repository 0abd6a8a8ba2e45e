"""Heun's method, and methods that go back up in noise between the steps of a single-step method.

Heun's method solves dy/dr = eps, where y = x / alpha and r = sigma / alpha. A step that begins or
ends at pure signal (r = 0) or pure noise (r infinite) is Euler's. It takes one row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import numpy as np

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.runge_kutta import runge_kutta
from diffusion_jax.samplers.singlestep import dpm_singlestep
from diffusion_jax.tableau import XI, Row, Tableau, check, check_rows, symbols, tabulate
from diffusion_jax.typing import Level, require


def heun(schedule: NoiseSchedule, grid: Grid, space: str = "ratio") -> Tableau:
    """Heun's method: EDM, Karras et al. 2022, arXiv:2206.00364, algorithm 1; 2 calls a step.

    It is the trapezoidal rule, whose second call follows an Euler step.
    space: "ratio" solves dy = eps dr, as in EDM. "levels" solves the same ODE in the form
    dx = x0 dalpha + eps dsigma, which in rectified flow is Heun in t.
    """
    require(space in ("ratio", "levels"), f"space={space!r}: it must be ratio or levels")
    if space == "ratio":
        return runge_kutta(schedule, grid, order=2)
    s = symbols(1)
    rows: list[Row] = []
    for start, end in _steps(grid):
        euler = end.alpha * s.x0 + end.sigma * s.eps
        change = (end.alpha - start.alpha) * s.x0 + (end.sigma - start.sigma) * s.eps
        if end.sigma == 0:
            rows.append(Row(start, [euler]))
            continue
        rows.append(Row(start, [euler, euler - change / 2], ends_step=False))  # half of the slope
        rows.append(Row(end, [s.z[0] + change / 2]))  # and half of that at the end
    return tabulate(rows)


BASES: dict[str, Callable[..., Tableau]] = {  # methods that remember nothing from step to step
    "heun": heun,
    "euler": ddim,
    "dpm_solver": dpm_singlestep,
    "dpmpp": partial(dpm_singlestep, predict="x0"),
}
Base = Annotated[Callable[..., Tableau], BASES]


def edm(
    schedule: NoiseSchedule,
    grid: Grid,
    s_churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.0,
    churn: tuple[float, ...] = (),
    base: Base = heun,
) -> Tableau:
    """EDM's stochastic sampler, Heun with churn: arXiv:2206.00364, algorithm 2.

    Before each step, noise raises r to (1 + g) r, but not beyond the schedule's largest r. g is
    min(s_churn / N, sqrt(2) - 1) if s_min <= r <= s_max, and otherwise 0.
    s_noise scales this noise, except in the first step: if r is raised there, sampling starts from
    pure noise of (1 + g) r, where the algorithm adds noise to pure noise of r.
    The defaults are those of table 5 for ImageNet-64, except s_noise.
    churn: the g of each step, instead. AdaSDE (Wang et al. 2025, arXiv:2510.23285) learns them.
    base: the method of the steps.
    """
    for name, value in {"s_churn": s_churn, "s_min": s_min, "s_noise": s_noise}.items():
        require(0 <= value < np.inf, f"{name}={value}: it must be 0 or more")
    require(s_max >= s_min, f"s_max={s_max}: it must be at least s_min, {s_min}")
    ratio = grid.ratio[:-1]
    growth = min(s_churn / grid.steps, np.sqrt(2) - 1) * ((s_min <= ratio) & (ratio <= s_max))
    if churn:
        valid = len(churn) == grid.steps and all(0 <= g < np.inf for g in churn)
        require(valid, f"churn={churn}: it must be {grid.steps} numbers, one a step, 0 or more")
        growth = np.array(churn)
    raised = np.minimum(ratio * (1 + growth), schedule.ratio[-1])
    steps = [
        (schedule.at_ratio(r) if r > low else start, end)
        for r, low, (start, end) in zip(raised, ratio, _steps(grid), strict=True)
    ]
    return _walk(steps, partial(base, schedule), s_noise)


def restart(
    schedule: NoiseSchedule,
    grid: Grid,
    repeats: int = 2,
    restart_min: float = 0.1,
    restart_max: float = 2.0,
    base: Base = heun,
) -> Tableau:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878), with Heun's method or a different base.

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
    steps = [*steps[:last], *steps[first:last] * repeats, *steps[last:]]
    return _walk(steps, partial(base, schedule))


def _steps(grid: Grid) -> list[tuple[Level, Level]]:
    """Return the steps of a grid as pairs of levels (start, end)."""
    return list(zip(grid.levels[:-1], grid.levels[1:], strict=True))


def _walk(
    steps: Sequence[tuple[Level, Level]], base: Callable[[Grid], Tableau], s_noise: float = 1.0
) -> Tableau:
    """Return the tableau of steps of a base. Add noise where one starts above the previous end.

    The noise is that of algorithm 2, line 6, of EDM.
    """
    tables = [base(Grid(*np.array(step).T)) for step in steps]
    for tableau, (_, end), (start, _) in zip(tables, steps, steps[1:], strict=False):
        if start != end:
            scale = start.alpha / end.alpha
            tableau.mix[-1, 0] *= scale
            tableau.mix[-1, 0, XI] += s_noise * np.sqrt(start.sigma**2 - (scale * end.sigma) ** 2)
    return check(Tableau(*map(np.concatenate, zip(*tables, strict=True))))
