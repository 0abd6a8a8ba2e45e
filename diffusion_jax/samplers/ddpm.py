"""Ancestral sampling: Ho, Jain and Abbeel 2020, arXiv:2006.11239."""

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.tableau import Tableau, one_row_a_step
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError


def ddpm(schedule: NoiseSchedule, grid: Grid, variance: str = "beta") -> Tableau:
    """Algorithm 2: x' = (x - (1 - a) / sigma_i eps) / sqrt(a) + s xi, over the step i -> j.

    a = alpha_bar_i / alpha_bar_j, which is 1 - beta_i where the step is one of the schedule's.
    variance: "beta", s^2 = 1 - a, without noise in the last step; or "posterior",
    s^2 = (1 - a) sigma_j^2 / sigma_i^2 (section 3.2, the upper and the lower bound).
    """
    if variance not in ("beta", "posterior"):
        raise InputError(f"variance={variance!r} is unknown: choose from beta, posterior")
    beta = _beta(schedule, grid)
    sigma, sigma_next = grid.sigma[:-1], grid.sigma[1:]
    spread = np.sqrt(beta) * (sigma_next > 0 if variance == "beta" else sigma_next / sigma)
    retained = np.sqrt(1 - beta)
    return one_row_a_step(grid, x=1 / retained, eps=-beta / (sigma * retained), xi=spread)


def _beta(schedule: NoiseSchedule, grid: Grid) -> np.ndarray:
    """1 - a of every step. The table's own beta where it has one: the notes' beta[1] differs."""
    start, end = grid.t[:-1], grid.t[1:]
    own = (start == np.rint(start)) & (start - end == 1)
    table = schedule.beta[np.rint(start).astype(int)]
    return np.where(own, table, 1 - (grid.alpha[:-1] / grid.alpha[1:]) ** 2)
