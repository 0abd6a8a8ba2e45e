"""Samplers: pure functions (schedule, grid, **options) -> Tableau, one family a file."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusion_jax.grids import GRIDS, Grid, check
from diffusion_jax.samplers.adams import lms, pndm
from diffusion_jax.samplers.analysis import warn_if_unstable
from diffusion_jax.samplers.ddim import consistency, ddim, euler
from diffusion_jax.samplers.ddim import ddim_inversion as ddim_inversion
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.exponential import deis, dpm_multistep, sa_solver, unipc
from diffusion_jax.samplers.solve import row_noise as row_noise
from diffusion_jax.samplers.solve import sample_keys as sample_keys
from diffusion_jax.samplers.solve import solve as solve
from diffusion_jax.samplers.stages import dpm2, dpm_singlestep, edm, heun, restart
from diffusion_jax.samplers.tableau import Tableau
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import check_kind, choose, options_of, require

SAMPLERS: dict[str, Callable[..., Tableau]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": partial(ddim, eta=1.0),
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


def build(
    name: str, schedule: NoiseSchedule, steps: int, grid: str | Grid = "trailing", **options: Any
) -> Tableau:
    """The tableau of a named sampler over a grid, named or given.

    options go to the sampler, or to the named grid. Raises InputError for what is unknown; warns of
    tables that are unstable on Gaussian data, such as pndm's in few steps.
    """
    make = choose(SAMPLERS, "sampler", name)
    own_kinds = options_of(make)
    make_grid = choose(GRIDS, "grid", grid) if isinstance(grid, str) else partial(_given, grid)
    of_grid = {key: kind for key, kind in options_of(make_grid).items() if key not in own_kinds}
    kinds = own_kinds | of_grid
    takes = ", ".join(kinds) or "none"
    for option, value in options.items():
        require(option in kinds, f"sampler {name} takes no {option}: it takes {takes}")
        check_kind(option, value, kinds[option])
    own = {key: options.pop(key) for key in of_grid if key in options}
    tableau = make(schedule, make_grid(schedule, steps, **own), **options)
    warn_if_unstable(tableau, name)
    return tableau


def _given(grid: Grid, schedule: NoiseSchedule, steps: int) -> Grid:
    require(grid.steps == steps, f"steps={steps}: the grid that is given has {grid.steps}")
    return check(grid)
