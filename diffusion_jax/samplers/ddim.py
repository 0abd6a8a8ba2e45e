"""Denoising diffusion implicit models: Song, Meng and Ermon 2020, arXiv:2010.02502."""

import numpy as np
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.tableau import Tableau, one_row_a_step
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import require


def ddim(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """Equation 12: x' = alpha_j x0 + sqrt(sigma_j^2 - s^2) eps + s xi, over the step i -> j.

    s = eta (sigma_j / sigma_i) sqrt(sigma_i^2 - (alpha_i / alpha_j)^2 sigma_j^2), which is
    equation 16 where alpha^2 + sigma^2 = 1. eta in [0, 1]: 0 is deterministic, 1 is DDPM with the
    posterior variance.
    """
    spread = check_eta(eta) * posterior_deviation(grid)
    kept = np.sqrt(np.maximum(grid.sigma[1:] ** 2 - spread**2, 0))
    return one_row_a_step(grid, x0=grid.alpha[1:], eps=kept, xi=spread)


def euler(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """Euler's method in y = x / alpha over r = sigma / alpha, where dy/dr = eps.

    (EDM, arXiv:2206.00364, algorithm 1 without the correction.) y' = y + (r_j - r_i) eps, and y is
    x0 + r_i eps, so that this is DDIM.
    """
    ratio = grid.sigma[1:] / grid.alpha[1:]
    return one_row_a_step(grid, x0=grid.alpha[1:], eps=grid.alpha[1:] * ratio)


def euler_ancestral(schedule: NoiseSchedule, grid: Grid, eta: float = 1.0) -> Tableau:
    """Euler's method down to r_down, then noise up to r_j, where r = sigma / alpha.

    r_up = eta (r_j / r_i) sqrt(r_i^2 - r_j^2), r_down^2 = r_j^2 - r_up^2, the ancestral step of
    Song et al. 2020 (arXiv:2011.13456, app. F) in y = x / alpha: DDIM with the same eta.
    """
    down, up = ancestral_ratios(grid, eta)
    alpha = grid.alpha[1:]
    return one_row_a_step(grid, x0=alpha, eps=alpha * down, xi=alpha * up)


def ddim_inversion(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """DDIM backwards, from an image to the noise that DDIM turns into it (section 4.3).

    The rows walk the grid from its end to its start. A step i -> j towards noise calls the
    denoiser at level j, as the step back does, so that no network is asked about clean data:
    x' = (alpha_j / alpha_i) x + (sigma_j - alpha_j sigma_i / alpha_i) eps.
    """
    grid = Grid(*(column[::-1] for column in grid))
    scale = grid.alpha[1:] / grid.alpha[:-1]
    called = Grid(*(np.append(column[1:], column[-1]) for column in grid))
    return one_row_a_step(called, x=scale, eps=grid.sigma[1:] - scale * grid.sigma[:-1])


def consistency(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """Multistep consistency sampling: Song et al. 2023, arXiv:2303.01469, algorithm 1.

    x' = alpha_j x0 + sigma_j xi: each step starts again from the predicted image.
    """
    return one_row_a_step(grid, x0=grid.alpha[1:], xi=grid.sigma[1:])


def check_eta(eta: float) -> float:
    """Return eta, the scale of an ancestral step's noise; raise InputError outside [0, 1]."""
    require(0 <= eta <= 1, f"eta={eta}: it must be in [0, 1]")
    return eta


def posterior_deviation(grid: Grid) -> ndarray:
    """The standard deviation of q(x_j | x_i, x_0) for every step i -> j."""
    return grid.sigma[1:] / grid.sigma[:-1] * np.sqrt(added_variance(grid))


def added_variance(grid: Grid) -> ndarray:
    """The variance of q(x_i | x_j) for every step i -> j."""
    kept = grid.alpha[:-1] / grid.alpha[1:]
    return grid.sigma[:-1] ** 2 - kept**2 * grid.sigma[1:] ** 2


def ancestral_ratios(grid: Grid, eta: float) -> tuple[ndarray, ndarray]:
    """(r_down, r_up) of every step: sigma / alpha to solve down to, and to add."""
    end = grid.ratio[1:]
    shrink = end / grid.ratio[:-1]
    up = check_eta(eta) * end * np.sqrt(1 - shrink**2)
    return np.sqrt(end**2 - up**2), up
