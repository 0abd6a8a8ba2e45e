"""Explicit linear multistep methods for dy/dr = eps, where y = x / alpha and r = sigma / alpha."""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import adams_weights
from diffusion_jax.samplers.multistep import resolve_order
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate


def lms(schedule: NoiseSchedule, grid: Grid, order: int | None = None) -> Tableau:
    """Adams-Bashforth with weights that are exact on the grid: k-diffusion's LMS; order 1 to 4.

    The first steps have lower orders, as far as their history reaches. order: by default, 4 or the
    number of steps if that is smaller.
    """
    ratio = grid.ratio

    def nodes(step: int, count: int) -> ndarray:
        history = ratio[step - count : step][::-1]
        return (history - ratio[step]) / (ratio[step + 1] - ratio[step])

    return tabulate(_rows(grid, resolve_order(order, 4, 4, grid), nodes))


def pndm(schedule: NoiseSchedule, grid: Grid, order: int | None = None) -> Tableau:
    """PNDM's linear multistep method, PLMS: Liu et al. 2022, arXiv:2202.09778, section 3.

    It uses the Adams-Bashforth weights of an evenly spaced grid on every grid. With few large steps
    it is unstable, and samplers.build warns. The first step is Heun's and takes two calls, as in
    latent diffusion's PLMS. order: as in lms.
    """
    order = resolve_order(order, 4, 4, grid)
    rows = _rows(grid, order, lambda step, count: -np.arange(1.0, count + 1))
    if order == 1 or grid.alpha[0] == 0:
        return tabulate(rows)
    s = symbols(order - 1)
    predict = rows[0]._replace(ends_step=False)
    correct = Row(grid.levels[1], [s.x + _span(grid, 0) / 2 * (s.eps - s.z[0]), s.z[0]])
    return tabulate([predict, correct, *rows[1:]])


def _rows(grid: Grid, order: int, nodes: Callable[[int, int], ndarray]) -> list[Row]:
    """Return the rows of DDIM + span * sum_k c_k (eps_k - eps).

    nodes(step, count): where the last `count` eps were computed, from 0 at the start of the step to
    1 at its end.
    """
    s = symbols(order - 1)
    rows = []
    for step in range(grid.steps):
        x_next = grid.alpha[step + 1] * s.x0 + grid.sigma[step + 1] * s.eps
        count = min(order - 1, int(np.sum(grid.alpha[:step] > 0)))
        if count:
            weights = _span(grid, step) * adams_weights(nodes(step, count))
            x_next = x_next + weights @ (np.stack(s.z[:count]) - s.eps)
        rows.append(Row(grid.levels[step], [x_next, s.eps, *s.z][:order]))
    return rows


def _span(grid: Grid, step: int) -> float:
    """Return alpha_j (r_j - r_i) for the step i -> j."""
    return grid.sigma[step + 1] - grid.alpha[step + 1] / grid.alpha[step] * grid.sigma[step]
