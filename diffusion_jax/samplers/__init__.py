"""Samplers: pure functions (schedule, grid, **options) -> Tableau, with one family per file."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from diffusion_jax import spec
from diffusion_jax.diffusion import grids
from diffusion_jax.diffusion.grids import GRIDS, Grid, check, trailing
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.adams import deis, gradient_estimation, pndm
from diffusion_jax.samplers.ddim import consistency, ddim
from diffusion_jax.samplers.ddim import ddim_inversion as ddim_inversion
from diffusion_jax.samplers.ddpm import ddpm
from diffusion_jax.samplers.exponential import dpm_multistep, dpmpp_3m_sde, sa_solver, unipc
from diffusion_jax.samplers.extended import er_sde
from diffusion_jax.samplers.runge_kutta import etdrk, heunpp, res, runge_kutta
from diffusion_jax.samplers.singlestep import dpm_singlestep, dpmpp_sde, seeds
from diffusion_jax.samplers.stages import edm, heun, restart
from diffusion_jax.samplers.stork import stork
from diffusion_jax.spec import Spec
from diffusion_jax.tableau import Tableau, interchange
from diffusion_jax.tableau.analysis import warn_if_unstable
from diffusion_jax.tableau.solve import row_noise as row_noise
from diffusion_jax.tableau.solve import sample_keys as sample_keys
from diffusion_jax.tableau.solve import solve as solve
from diffusion_jax.typing import require

SAMPLERS: dict[str, Callable[..., Tableau]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": ddim,
    "euler_ancestral": partial(ddim, eta=1.0),
    "heun": heun,
    "dpm2": dpm_singlestep,
    "dpm2_ancestral": partial(dpm_singlestep, eta=1.0),
    "lms": partial(deis, space="ratio", to_clean=True),
    "pndm": pndm,
    "ipndm": partial(pndm, improved=True),
    "ipndm_v": partial(deis, space="ratio"),
    "gradient_estimation": gradient_estimation,
    "runge_kutta": runge_kutta,
    "heunpp": heunpp,
    "res": res,
    "etdrk": etdrk,
    "dpm_solver": dpm_singlestep,
    "dpm_solver_multistep": partial(dpm_multistep, predict="eps"),
    "dpmpp": partial(dpm_singlestep, predict="x0"),
    "dpmpp_multistep": dpm_multistep,
    "dpmpp_2m_sde": partial(dpm_multistep, eta=1.0),
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_2s_ancestral": partial(dpm_singlestep, predict="x0", eta=1.0),
    "dpmpp_sde": dpmpp_sde,
    "seeds": seeds,
    "deis": deis,
    "stork": stork,
    "unipc": unipc,
    "sa_solver": sa_solver,
    "er_sde": er_sde,
    "edm": edm,
    "restart": restart,
    "consistency": consistency,
}
FILES: dict[str, Callable[..., Tableau]] = {"file": interchange.file}  # with levels of their own

STEPS = {"ddpm": 500, "sa_solver": 10}  # the default numbers of steps that are not 25


def on_grid(
    steps: int | None = None, grid: Annotated[Callable[..., Grid], GRIDS] = trailing
) -> None:
    """Declare the options of every sampler: the number of steps, and the grid that it visits."""


def parse(text: str, schedule: NoiseSchedule | None = None) -> Spec:
    """Return the spec of a sampler and its grid, such as "unipc:10:order=3:grid=karras:rho=5".

    With a schedule, fill in what the text leaves out: the number of steps, which is the number of
    given levels or the default, and the digest of a file. Raise InputError as spec.parse does.
    """
    if text.partition(":")[0] in FILES:
        chosen = spec.parse(text, FILES, "sampler", ("schedule",))
        if schedule is not None:
            found = interchange.digest_of(chosen.bind()(schedule))
            chosen.options["digest"] = found[:12]
        return chosen
    chosen = spec.parse(text, SAMPLERS, "sampler", ("schedule", "grid", "n"), on_grid)
    if schedule is not None and chosen.options.get("steps") is None:
        given = grids.given_steps(chosen.options.get("grid"))
        chosen.options["steps"] = given or min(STEPS.get(chosen.name, 25), schedule.steps)
    return chosen


def split(texts: str) -> list[str]:
    """Split a list such as "ddpm:500,ddim:25" at each comma before the name of a sampler."""
    return re.split(rf",\s*(?=(?:{'|'.join(SAMPLERS | FILES)})(?:[:,]|$))", texts)


def build(
    sampler: str | Spec,
    schedule: NoiseSchedule,
    steps: int | None = None,
    grid: str | Grid | None = None,
    **options: Any,
) -> Tableau:
    """Return the tableau of a sampler. steps, grid and options override those in its text.

    Raise InputError if a name is unknown, or if the sampler or the grid refuses a value. Warn if
    the tableau is unstable on Gaussian data, as pndm is with few steps.
    """
    chosen = parse(sampler, schedule) if isinstance(sampler, str) else sampler
    own = {**chosen.options, **options}
    in_text, n = own.pop("grid", None), own.pop("steps", None)
    own = {key: part.bind() if isinstance(part, Spec) else part for key, part in own.items()}
    spec.check(chosen.component, own, chosen.name, ("schedule", "grid"))
    n = n if steps is None else steps
    if chosen.name in FILES:
        given = f"steps={steps}, grid={grid}: a file has levels of its own: leave them out"
        require(steps is None and grid is None, given)
        tableau = chosen.component(schedule, **own)
    else:
        if isinstance(grid, str):
            grid = grids.build(grid, schedule, n)
        elif grid is None:
            grid = (in_text.bind() if in_text else trailing)(schedule, n)
        require(steps in (None, grid.steps), f"steps={steps}: the grid given has {grid.steps}")
        tableau = chosen.component(schedule, check(grid), **own)
    warn_if_unstable(tableau, chosen.name)
    return tableau


def spread(text: str, schedule: NoiseSchedule, budgets: Sequence[int]) -> list[Spec]:
    """Return specs of a sampler: for each budget, the one with the most steps that it allows.

    If the text gives the number of steps or a file, return only its own spec. budgets: numbers of
    network evaluations; a budget that is too small for any number of steps is skipped. Raise
    InputError as build does.
    """
    chosen = parse(text)
    if chosen.name in FILES or chosen.options.get("steps") is not None:
        return [parse(text, schedule)]
    found = []
    for budget in budgets:
        for steps in range(min(budget, schedule.steps), 0, -1):
            each = chosen._replace(options={**chosen.options, "steps": steps})
            if build(each, schedule).rows <= budget:
                found.append(each)
                break
    return found
