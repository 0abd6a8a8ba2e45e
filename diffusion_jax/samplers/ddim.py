"""Denoising diffusion implicit models: Song, Meng and Ermon 2020, arXiv:2010.02502."""

import numpy as np
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.tableau import (
    Row,
    Tableau,
    check_rows,
    one_row_a_step,
    symbols,
    tabulate,
)
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import require


def ddim(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """Equation 12: x' = alpha_j x0 + sqrt(sigma_j^2 - s^2) eps + s xi, over the step i -> j.

    s = eta sigma_j sqrt(1 - r_j^2 / r_i^2), r = sigma / alpha, which is equation 16 where
    alpha^2 + sigma^2 = 1. eta in [0, 1]: 0 is deterministic; 1 is DDPM with the posterior
    variance, and Euler's ancestral step (Song et al. 2020, arXiv:2011.13456, app. F).
    """
    down, up = ancestral_ratios(grid, eta)
    alpha = grid.alpha[1:]
    return one_row_a_step(grid, x0=alpha, eps=alpha * down, xi=alpha * up)


def euler(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """Euler's method in y = x / alpha over r = sigma / alpha, where dy/dr = eps.

    (EDM, arXiv:2206.00364, algorithm 1 without the correction.) y' = y + (r_j - r_i) eps, and y is
    x0 + r_i eps, so that this is DDIM.
    """
    ratio = grid.sigma[1:] / grid.alpha[1:]
    return one_row_a_step(grid, x0=grid.alpha[1:], eps=grid.alpha[1:] * ratio)


def ddim_inversion(schedule: NoiseSchedule, grid: Grid, iterations: int = 1) -> Tableau:
    """DDIM backwards, from an image to the noise that DDIM turns into it (section 4.3).

    A step i -> j towards noise calls the denoiser at level j, as the step back does, which calls it
    at x' = (a_j / a_i) x + (s_j - a_j s_i / a_i) eps, too: `iterations` calls approach that x'.
    """
    require(iterations >= 1, f"iterations={iterations}: it must be at least 1")
    check_rows(grid.steps * iterations)
    s, rows = symbols(1), []
    for start, end in zip(grid.levels[:0:-1], grid.levels[-2::-1], strict=True):
        scale = end.alpha / start.alpha
        change = (end.sigma - scale * start.sigma) * s.eps
        for call in range(iterations):
            held = s.z[0] if call else s.x
            rows.append(Row(end, [scale * held + change, held], call == iterations - 1))
    return tabulate(rows)


def consistency(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """Multistep consistency sampling: Song et al. 2023, arXiv:2303.01469, algorithm 1.

    x' = alpha_j (x0 + sqrt(r_j^2 - r_min^2) xi), r = sigma / alpha: each step adds noise to the
    predicted image. r_min is that of the schedule's step 1, the paper's epsilon, for which a
    consistency model predicts the image; noise above it is added. This is for consistency models.
    A denoiser's prediction is the mean of all images that x may come from: it gives blurs.
    """
    least = min(schedule.ratio[1], grid.ratio[-2])
    noise = np.sqrt(np.maximum(grid.ratio[1:] ** 2 - least**2, 0))
    return one_row_a_step(grid, x0=grid.alpha[1:], xi=grid.alpha[1:] * noise)


def ancestral_ratios(grid: Grid, eta: float) -> tuple[ndarray, ndarray]:
    """(r_down, r_up) of every step: sigma / alpha to solve down to, and to add as noise."""
    require(0 <= eta <= 1, f"eta={eta}: it must be in [0, 1]")
    end = grid.ratio[1:]
    up = eta * end * np.sqrt(1 - (end / grid.ratio[:-1]) ** 2)
    return np.sqrt(np.maximum(end**2 - up**2, 0)), up
