"""Editing images with a trained model: the same tableaus and loop, from a different start.

    SDEdit          runs any sampler on the tail of a grid, from the image with noise added
    inpainting      runs repaint from noise, with the known pixels put into every prediction
    inversion       runs samplers.ddim_inversion from an image; samplers.ddim goes back
    interpolation   takes slerp between two states of pure noise, then runs samplers.ddim

An entry of EDITS takes an Editor and returns rows of pictures, keyed by label. The last row is the
result.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from diffusion_jax.diffusion import grids
from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.files import load_npy
from diffusion_jax.samplers import Tableau, ddim, ddim_inversion
from diffusion_jax.sampling.draw import Start, initial_noise, sample
from diffusion_jax.spec import Spec, choose
from diffusion_jax.tableau import XI, check
from diffusion_jax.typing import check_seed, require

LONGEST = 100_000  # the most calls of the network on a walk or an inversion


def tail(schedule: NoiseSchedule, grid: Grid, strength: float) -> Grid:
    """Return the part of a grid with t <= strength T, up to rounding of the strength.

    SDEdit (Meng et al. 2021, arXiv:2108.01073) starts at its first level. Raise InputError if it
    has no step.
    """
    require(0 < strength <= 1, f"strength={strength}: it must be above 0 and at most 1")
    kept = grid.t <= strength * schedule.steps * (1 + 2e-6)  # because 0.29 * 100 < 29
    least = grid.t[-2] / schedule.steps
    require(
        kept[:-1].any(),
        f"strength={strength}: on this grid the last step starts at {least:.6g}: take more "
        "strength, or more steps",
    )
    return Grid(*(column[kept] for column in grid))


def noised(images: Float[ndarray, "n height width channel"], tableau: Tableau) -> Start:
    """Return a start at images with as much noise as the tableau's first level has."""
    return Start(images, float(tableau.alpha[0]), float(tableau.sigma[0]))


def repaint(schedule: NoiseSchedule, grid: Grid, jump: int = 10, repeats: int = 10) -> Tableau:
    """Build RePaint's walk (Lugmayr et al. 2022, arXiv:2201.09865, section 4.2): DDPM with jumps.

    After each `jump` steps, added noise returns the state to the level where they began, and the
    steps are taken again, `repeats` times in all. This fits the unknown pixels to the known ones.
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
    """Return points of the great circle between two states of noise, at places from 0 to 1.

    Points of a straight line would be too short for noise. The circle keeps their length
    (Shoemake 1985).
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
    """Return the peak signal-to-noise ratio of each pair of images in [-1, 1], in dB."""
    error = np.mean((np.asarray(images, np.float64) - others) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-20))


Rows = dict[str, Float[ndarray, "n height width channel"]]
GREY = 0.5  # the value of hidden pixels in pictures


class Editor(NamedTuple):
    """A model, the images in [-1, 1] that it edits, a context for each, and a sampler.

    options: further arguments of sample, such as guidance.
    """

    model: Model
    images: Float[ndarray, "n height width channel"]
    context: Float[ndarray, "n feature"]
    sampler: Spec
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def grid(self) -> Grid:
        """Return the grid of the sampler."""
        part, steps = self.sampler.options.get("grid"), self.sampler.options["steps"]
        return (part.bind() if part else grids.trailing)(self.model.schedule, steps)

    def sample(self, tableau: Tableau, start: Start | None, **given: Any) -> ndarray:
        """Run a tableau on all images at once."""
        options = {"start": start, "context": self.context} | dict(self.options) | given
        return sample(self.model, tableau, len(self.context), **options).images

    def invert(self, iterations: int) -> ndarray:
        """Return the noise that DDIM turns into the images. Guidance would distort it."""
        most = LONGEST // self.grid.steps
        tableau = ddim_inversion(
            self.model.schedule, self.grid, _bounded("iterations", iterations, 1, most)
        )
        return self.sample(tableau, Start(self.images), guidance=None, guide_model=None)

    def denoise(self, noise: ndarray) -> ndarray:
        """Return the images that DDIM draws from given noise."""
        return self.sample(ddim(self.model.schedule, self.grid), Start(noise))

    def noise(self, seed: int) -> ndarray:
        """Return the state in which sample starts the first image of a seed."""
        scale = ddim(self.model.schedule, self.grid).noise_scale
        return np.float32(scale) * initial_noise(self.model, 1, seed)


def sdedit(editor: Editor, strength: float = 0.5) -> Rows:
    """Add noise up to the level t = strength T, and remove it by the sampler: arXiv:2108.01073."""
    grid = tail(editor.model.schedule, editor.grid, strength)
    given = {k: v for k, v in editor.sampler.options.items() if k not in ("steps", "grid")}
    tableau = editor.sampler.component(editor.model.schedule, grid, **given)
    start = noised(editor.images, tableau)
    noisy = editor.sample(tableau, start, rows=0)
    return {"image": editor.images, "noise": noisy, "edited": editor.sample(tableau, start)}


def inpaint(editor: Editor, mask: str = "left", jump: int = 10, repeats: int = 5) -> Rows:
    """Fill in what a mask hides, by RePaint.

    mask: the half that is known (left, right, top or bottom), or a .npy file that is 1 where
    pixels are known and 0 elsewhere. jump, repeats: as in repaint.
    """
    known = read_mask(mask, editor.images.shape[1:3])
    known = np.broadcast_to(known, (*editor.images.shape[:3], 1))
    tableau = repaint(editor.model.schedule, editor.grid, jump, repeats)
    filled = editor.sample(tableau, noised(known * editor.images, tableau), mask=known)
    shown = np.where(known == 1, editor.images, GREY)
    return {"image": editor.images, "known": shown, "inpainted": filled}


def reconstruct(editor: Editor, iterations: int = 5) -> Rows:
    """Turn images into noise and back by DDIM, and print the PSNR.

    iterations: network calls for each step of the inversion; more calls make it more exact.
    """
    noise = editor.invert(iterations)
    back = editor.denoise(noise)
    ratios = psnr(editor.images, np.clip(back, -1, 1))
    print(f"PSNR: {', '.join(f'{ratio:.1f}' for ratio in ratios)} dB")
    return {"image": editor.images, "as noise": noise / 2, "reconstructed": back}


def interpolate(
    editor: Editor, seeds: tuple[int, ...] = (), between: int = 10, iterations: int = 5
) -> Rows:
    """Interpolate between two images, or two seeds, and between their contexts.

    between: the number of images, the ends included. iterations: as in reconstruct.
    """
    places = np.linspace(0, 1, _bounded("between", between, 2))
    if seeds:
        require(len(seeds) == 2, f"seeds={seeds}: it must be two numbers")
        ends = np.concatenate([editor.noise(check_seed(seed, "seeds")) for seed in seeds])
    else:
        require(len(editor.images) == 2, f"{len(editor.images)} images: interpolate takes two")
        ends = editor.invert(iterations)
    row = editor._replace(context=_mixed(editor.context, places))
    return {"interpolated": row.denoise(slerp(ends[0], ends[1], places))}


def mix_contexts(editor: Editor, between: int = 10, seed: int = 0) -> Rows:
    """Interpolate between two contexts with fixed noise: one row for each of four seeds."""
    places = np.linspace(0, 1, _bounded("between", between, 2))
    row = editor._replace(context=_mixed(editor.context, places))
    noises = {f"seed {each}": editor.noise(check_seed(each)) for each in range(seed, seed + 4)}
    repeated = {label: np.repeat(noise, len(places), axis=0) for label, noise in noises.items()}
    return {label: row.denoise(noise) for label, noise in repeated.items()}


EDITS: dict[str, Callable[..., Rows]] = {
    "sdedit": sdedit,
    "inpaint": inpaint,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "contexts": mix_contexts,
}


def read_mask(mask: str, size: tuple[int, ...]) -> Float[ndarray, "height width 1"]:
    """Return the mask of a half of the images, or the mask in a .npy file."""
    known = np.zeros((*size, 1), np.float32)
    half = [length // 2 for length in size]
    halves = {
        **{"left": np.s_[:, : half[1]], "right": np.s_[:, half[1] :]},
        **{"top": np.s_[: half[0]], "bottom": np.s_[half[0] :]},
    }
    if not mask.endswith(".npy"):
        known[choose(halves, "mask", mask)] = 1
        return known
    given = load_npy(mask)
    fits = given.shape in (size, known.shape) and np.isin(given, (0, 1)).all()
    require(fits, f"mask={mask} has shape {given.shape}: it must be {size}, of 0 and 1")
    return given.reshape(known.shape).astype(np.float32)


def _mixed(ends: ndarray, places: ndarray) -> ndarray:
    """Return contexts on the straight line between the first and the last one."""
    return ((1 - places[:, None]) * ends[0] + places[:, None] * ends[-1]).astype(np.float32)


def _bounded(name: str, value: int, least: int, most: int = 1000) -> int:
    require(least <= value <= most, f"{name}={value}: it must be in {least}..{most}")
    return value
