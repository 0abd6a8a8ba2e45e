"""Samplers: pure functions (schedule, grid, **options) -> Tableau, one family a file."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from diffusion_jax.grids import GRIDS, Grid, check
from diffusion_jax.samplers.adams import lms, pndm
from diffusion_jax.samplers.ddim import consistency, ddim, ddim_inversion, euler, euler_ancestral
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.deis import deis
from diffusion_jax.samplers.dpm_solver import dpm_multistep, dpm_singlestep
from diffusion_jax.samplers.sa_solver import sa_solver
from diffusion_jax.samplers.solve import row_noise, sample_keys, solve
from diffusion_jax.samplers.stages import dpm2, edm, heun, restart
from diffusion_jax.samplers.tableau import Tableau
from diffusion_jax.samplers.unipc import unipc
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, choose

SAMPLERS: dict[str, Callable[..., Tableau]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": partial(dpm2, eta=1.0),
    "lms": lms,
    "pndm": pndm,
    "dpm_solver": dpm_singlestep,
    "dpm_solver_multistep": partial(dpm_multistep, predict="eps"),
    "dpmpp": partial(dpm_singlestep, predict="x0"),
    "dpmpp_multistep": dpm_multistep,
    "dpmpp_sde": partial(dpm_multistep, eta=1.0),
    "deis": deis,
    "unipc": unipc,
    "sa_solver": sa_solver,
    "edm": edm,
    "restart": restart,
    "consistency": consistency,
}

__all__ = [
    "SAMPLERS",
    "Tableau",
    "build",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm2",
    "dpm_multistep",
    "dpm_singlestep",
    "edm",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "pndm",
    "restart",
    "row_noise",
    "sa_solver",
    "sample_keys",
    "solve",
    "unipc",
]


def build(
    name: str, schedule: NoiseSchedule, steps: int, grid: str | Grid = "trailing", **options: Any
) -> Tableau:
    """The tableau of a named sampler over a grid, named or given.

    options go to the sampler, or to the named grid. Raises InputError for what is unknown.
    """
    make = choose(SAMPLERS, "sampler", name)
    known = _options(make)
    if isinstance(grid, str):
        make_grid = choose(GRIDS, "grid", grid)
        of_grid = [option for option in _options(make_grid) if option not in known]
        own = {key: options.pop(key) for key in of_grid if key in options}
        levels = make_grid(schedule, steps, **own)
    else:
        of_grid, levels = [], check(grid)
        if levels.steps != steps:
            raise InputError(f"steps={steps}: the grid that is given has {levels.steps}")
    for option in options:
        if option not in known:
            takes = ", ".join(known + of_grid) or "none"
            raise InputError(f"sampler {name} takes no {option}: it takes {takes}")
    return make(schedule, levels, **options)


def _options(make: Callable[..., Any]) -> list[str]:
    """The options of a sampler or of a grid, which come after its two arguments."""
    return list(inspect.signature(make).parameters)[2:]
