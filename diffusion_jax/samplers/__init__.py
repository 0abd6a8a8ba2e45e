"""Samplers: pure functions (schedule, grid, **options) -> Tableau, one family a file."""

import inspect
from collections.abc import Callable
from typing import Any

from diffusion_jax.grids import GRIDS
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.solve import row_noise, sample_keys, solve
from diffusion_jax.samplers.tableau import Tableau
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, choose

SAMPLERS: dict[str, Callable[..., Tableau]] = {"ddpm": ddpm, "ddim": ddim}

__all__ = ["SAMPLERS", "Tableau", "build", "ddim", "ddpm", "row_noise", "sample_keys", "solve"]


def build(
    name: str, schedule: NoiseSchedule, steps: int, grid: str = "trailing", **options: Any
) -> Tableau:
    """The tableau of a named sampler over a named grid. Raises InputError for what is unknown."""
    make = choose(SAMPLERS, "sampler", name)
    known = list(inspect.signature(make).parameters)[2:]
    for option in options:
        if option not in known:
            raise InputError(f"sampler {name} takes no {option}: it takes {', '.join(known)}")
    return make(schedule, choose(GRIDS, "grid", grid)(schedule, steps), **options)
