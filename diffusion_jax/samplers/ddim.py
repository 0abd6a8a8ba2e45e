"""Denoising diffusion implicit models: Song, Meng and Ermon 2020, arXiv:2010.02502."""

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.tableau import (
    Row,
    Tableau,
    check_rows,
    one_row_a_step,
    symbols,
    tabulate,
)
from diffusion_jax.typing import require


def ddim(schedule: NoiseSchedule, grid: Grid, eta: float = 0.0) -> Tableau:
    """Denoising diffusion implicit models: Song et al. 2020, arXiv:2010.02502, eq. 12.

    With r = sigma / alpha, the step i -> j is

        x' = alpha_j x0 + sqrt(sigma_j^2 - s^2) eps + s xi,  s = eta sigma_j sqrt(1 - r_j^2 /
        r_i^2).

    If alpha^2 + sigma^2 = 1, s is that of equation 16. eta is in [0, 1]: 0 is deterministic, and is
    Euler's method for dy/dr = eps, where y = x / alpha (EDM, arXiv:2206.00364, algorithm 1 without
    the correction); 1 is DDPM with the posterior variance, and also Euler's ancestral step (Song et
    al. 2020, arXiv:2011.13456, app. F).
    """
    down, up = ancestral_ratios(grid, eta)
    alpha = grid.alpha[1:]
    return one_row_a_step(grid, x0=alpha, eps=alpha * down, xi=alpha * up)


def ddim_inversion(schedule: NoiseSchedule, grid: Grid, iterations: int = 1) -> Tableau:
    """Return the tableau that runs DDIM backwards, from an image to its noise (section 4.3).

    DDIM turns this noise into the image. A step i -> j towards noise calls the denoiser at level j,
    because the step back from j to i does so. The step back calls it on the result of the step,

        x' = (a_j / a_i) x + (s_j - a_j s_i / a_i) eps,

    which depends on the eps of that call: `iterations` calls approach it. a is alpha, s is sigma.
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

    Each step adds noise to the predicted image. With r = sigma / alpha, it is

        x' = alpha_j (x0 + sqrt(r_j^2 - r_min^2) xi).

    r_min is that of the schedule's step 1, the paper's epsilon. A consistency model predicts the
    image at r_min, so that only the noise above r_min is added. Use this sampler with consistency
    models: a denoiser predicts the mean of all images that x may come from, so its samples are
    blurred.
    """
    least = min(schedule.ratio[1], grid.ratio[-2])
    noise = np.sqrt(np.maximum(grid.ratio[1:] ** 2 - least**2, 0))
    return one_row_a_step(grid, x0=grid.alpha[1:], xi=grid.alpha[1:] * noise)


def ancestral_ratios(grid: Grid, eta: float) -> tuple[ndarray, ndarray]:
    """Return the sigma / alpha that each step solves down to, and the one that it adds as noise."""
    require(0 <= eta <= 1, f"eta={eta}: it must be in [0, 1]")
    end = grid.ratio[1:]
    up = eta * end * np.sqrt(1 - (end / grid.ratio[:-1]) ** 2)
    return np.sqrt(np.maximum(end**2 - up**2, 0)), up
