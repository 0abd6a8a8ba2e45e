"""Single-step methods of several stages: Heun's and the midpoint method.

They solve dy/dr = eps, where y = x / alpha and r = sigma / alpha. A step that begins or ends at
pure signal (r = 0) or pure noise (r infinite) is Euler's. It takes one row and equals DDIM.
"""

import numpy as np

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.ddim import ancestral_ratios
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import Level, require


def heun(schedule: NoiseSchedule, grid: Grid, space: str = "ratio") -> Tableau:
    """Heun's method: EDM, Karras et al. 2022, arXiv:2206.00364, algorithm 1; 2 calls a step.

    It is the trapezoidal rule, whose second call follows an Euler step.
    space: "ratio" solves dy = eps dr, as in EDM. "levels" solves the same ODE in the form
    dx = x0 dalpha + eps dsigma, which in rectified flow is Heun in t.
    """
    require(space in ("ratio", "levels"), f"space={space!r}: it must be ratio or levels")
    steps = zip(grid.levels[:-1], grid.levels[1:], strict=True)
    return tabulate([row for step in steps for row in _heun_step(*step, space)])


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
