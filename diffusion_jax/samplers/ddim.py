"""Denoising diffusion implicit models: Song, Meng and Ermon 2020, arXiv:2010.02502."""

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.tableau import Tableau, one_row_a_step
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError


def ddim(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """Equation 12: x' = alpha_j x0 + sqrt(sigma_j^2 - s^2) eps + s xi, over the step i -> j.

    s = eta (sigma_j / sigma_i) sqrt(1 - alpha_i^2 / alpha_j^2) (equation 16). eta in [0, 1]: 0 is
    deterministic, 1 is DDPM with the posterior variance.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta}: it must be in [0, 1]")
    alpha, alpha_next = grid.alpha[:-1], grid.alpha[1:]
    sigma, sigma_next = grid.sigma[:-1], grid.sigma[1:]
    spread = eta * sigma_next / sigma * np.sqrt(1 - (alpha / alpha_next) ** 2)
    return one_row_a_step(grid, x0=alpha_next, eps=np.sqrt(sigma_next**2 - spread**2), xi=spread)
