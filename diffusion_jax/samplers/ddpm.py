"""Ancestral sampling: Ho, Jain and Abbeel 2020, arXiv:2006.11239."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule, variance_preserving
from diffusion_jax.spec import choose
from diffusion_jax.tableau import Tableau, one_row_a_step
from diffusion_jax.typing import require


def ddpm(
    schedule: NoiseSchedule, grid: Grid, variance: str | Sequence[float] | ndarray = "beta"
) -> Tableau:
    """Ancestral sampling: DDPM, Ho et al. 2020, arXiv:2006.11239, algorithm 2.

    With a = alpha_i / alpha_j and b = sigma_i^2 - a^2 sigma_j^2, the step i -> j is

        x' = (x - (b / sigma_i) eps) / a + s xi.

    If the step is one of the schedule's, b is beta_i. variance chooses s: "beta" is s^2 = b,
    without noise in the last step. "posterior" is s^2 = b (sigma_j / sigma_i)^2. They are the upper
    and the lower bound of section 3.2. It can also be a list with s^2 of each step.
    """
    beta = _beta(schedule, grid)
    sigma, sigma_next = grid.sigma[:-1], grid.sigma[1:]
    retained = grid.alpha[:-1] / grid.alpha[1:]
    if schedule.alpha_at is variance_preserving:
        retained = np.sqrt(1 - beta)  # the course's beta[1] differs from its alphas
    spread = np.sqrt(_variance(variance, beta, sigma, sigma_next))
    signal = retained > 0  # where x is pure noise, x' comes from x0
    inverse = np.divide(1, retained, out=np.zeros_like(retained), where=signal)
    x0 = np.where(signal, 0, grid.alpha[1:])
    return one_row_a_step(grid, x=inverse, x0=x0, eps=-beta / sigma * inverse, xi=spread)


def _variance(
    variance: str | Sequence[float] | ndarray, beta: ndarray, sigma: ndarray, sigma_next: ndarray
) -> ndarray:
    bounds = {"beta": beta * (sigma_next > 0), "posterior": beta * (sigma_next / sigma) ** 2}
    if isinstance(variance, str):
        return choose(bounds, "variance", variance)
    given = np.asarray(variance, np.float64)
    valid = given.shape == beta.shape and np.all((given >= 0) & (given < np.inf))
    require(valid, f"variance={given}: it must be {len(beta)} numbers, one a step, 0 or more")
    return given


def _beta(schedule: NoiseSchedule, grid: Grid) -> ndarray:
    """Return the variance that the forward process adds in each step.

    It is the table's own beta if the step is one of the schedule's.
    """
    start, end = grid.t[:-1], grid.t[1:]
    own = (start == np.rint(start)) & (start - end == 1)
    table = schedule.beta[np.rint(start).astype(int)]
    kept = grid.alpha[:-1] / grid.alpha[1:]
    return np.where(own, table, grid.sigma[:-1] ** 2 - kept**2 * grid.sigma[1:] ** 2)
