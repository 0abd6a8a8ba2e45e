"""Editing images with a trained model: the same tables and the same loop, from another start.

An edit is a table, a Start and perhaps a mask for sampling.sample; see experiments/edit.py:

    SDEdit          any sampler on the tail of a grid, from the image with that much noise
    inpainting      repaint, from noise, the known pixels put into every prediction
    inversion       samplers.ddim_inversion from an image; the way back is samplers.ddim
    interpolation   slerp between two states of pure noise, then samplers.ddim
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.samplers import Tableau, ddim
from diffusion_jax.samplers.tableau import XI, check
from diffusion_jax.sampling import Start
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import require

LONGEST = 100_000  # the most calls of the network on a walk or an inversion


def tail(schedule: NoiseSchedule, grid: Grid, strength: float) -> Grid:
    """Return the part of a grid with t <= strength T, up to rounding of the strength.

    SDEdit (Meng et al. 2021, arXiv:2108.01073) starts there. Raises InputError if no step is left.
    """
    require(0 < strength <= 1, f"strength={strength}: it must be above 0 and at most 1")
    kept = grid.t <= strength * schedule.steps * (1 + 2e-6)  # 0.29 * 100 < 29
    least = grid.t[-2] / schedule.steps
    require(
        kept[:-1].any(),
        f"strength={strength}: on this grid the last step starts at {least:.6g}: take more "
        "strength, or more steps",
    )
    return Grid(*(column[kept] for column in grid))


def noised(images: Float[ndarray, "n height width channel"], tableau: Tableau) -> Start:
    """Images with as much noise as the table's first level has."""
    return Start(images, float(tableau.alpha[0]), float(tableau.sigma[0]))


def repaint(schedule: NoiseSchedule, grid: Grid, jump: int = 10, repeats: int = 10) -> Tableau:
    """RePaint's walk (Lugmayr et al. 2022, arXiv:2201.09865, section 4.2): DDPM with jumps.

    After each `jump` steps, noise lifts the state back to where they began, and they are taken
    again, `repeats` times in all, so that unknown pixels come to fit the known ones.
    """
    require(jump >= 1, f"jump={jump}: it must be at least 1")
    most = max(1, LONGEST // grid.steps)
    require(repeats >= 1, f"repeats={repeats}: it must be at least 1")
    require(repeats <= most, f"repeats={repeats}: it must be at most {most} for {grid.steps} steps")
    parts = np.split(np.arange(grid.steps), range(jump, grid.steps, jump))
    walk = np.concatenate([np.tile(part, repeats) for part in parts])
    table = ddim(schedule, grid, eta=1.0)
    ends, following = walk + 1, np.append(walk[1:], grid.steps)
    scale = grid.alpha[following] / grid.alpha[ends]
    lift = np.where(following < ends, grid.sigma[following] ** 2, 0)
    lift = lift - np.where(following < ends, (scale * grid.sigma[ends]) ** 2, 0)
    mix = table.mix[walk] * scale[:, None, None]
    mix[:, 0, XI] = np.sqrt(mix[:, 0, XI] ** 2 + lift)
    t, alpha, sigma = (column[walk] for column in grid)
    return check(Tableau(t, alpha, sigma, mix, following >= ends))


def slerp(
    start: Float[ndarray, "height width channel"],
    end: Float[ndarray, "height width channel"],
    places: Float[ndarray, "n"],
) -> Float[ndarray, "n height width channel"]:
    """The great circle from one state of noise to another, at places from 0 to 1.

    In between a straight line would be too short for noise; this keeps the length (Shoemake 1985).
    """
    a, b = (np.asarray(state, np.float64) for state in (start, end))
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    places = np.asarray(places, np.float64)[:, None, None, None]
    if np.sin(angle) < 1e-6:
        return np.asarray((1 - places) * a + places * b, np.float32)
    weights = np.sin((1 - places) * angle), np.sin(places * angle)
    return np.asarray((weights[0] * a + weights[1] * b) / np.sin(angle), np.float32)


def psnr(
    images: Float[ndarray, "n height width channel"],
    others: Float[ndarray, "n height width channel"],
) -> Float[ndarray, "n"]:
    """The peak signal-to-noise ratio of each pair of images in [-1, 1], in dB."""
    error = np.mean((np.asarray(images, np.float64) - others) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-20))
