"""A run folder as what it holds: a configuration and a trained model."""

import os
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax import parallel
from diffusion_jax.diffusion import predictions
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.files import PARTIAL
from diffusion_jax.networks import Network, init_variables, variable_shapes
from diffusion_jax.runs import checkpoints
from diffusion_jax.runs.config import Config
from diffusion_jax.runs.locks import check_writable
from diffusion_jax.training import averages
from diffusion_jax.training.averages import Profile
from diffusion_jax.typing import Variables, require

SHIPPED = Path("checkpoints/sprites")  # the model that comes with the project
ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or site-packages


def load_model(run: str | Path = SHIPPED, step: int | None = None) -> Model:
    """Return the model of a run folder: of its newest checkpoint, or of one step.

    run: by default the model that comes with the project, which any folder can load by this name.
    A run without context has no class_names.
    Raise InputError if run is not a run folder, or has no such checkpoint.
    """
    run = find_run(run)
    config = load_config(run)
    network = config.build_network()
    here = parallel.replicate(0, parallel.first_devices(1)).sharding
    shapes = checkpoints.template(variable_shapes(network), here)
    return model_of(config, network, checkpoints.restore_model(run, shapes, step))


def find_run(run: str | Path) -> Path:
    """Return where a run is read: that of SHIPPED beside this package, unless it is a run here."""
    run = Path(run)
    here = run != SHIPPED or os.path.lexists(run / checkpoints.CONFIG)
    return run if here else ROOT / SHIPPED


def untrained(config: Config) -> Model:
    """Return the model of a configuration with its initial weights."""
    network = config.build_network()
    return model_of(config, network, init_variables(network, config.seed))


def model_of(config: Config, network: Network, variables: Variables) -> Model:
    """Return a configuration's model with these weights."""
    names = () if config.null_context else config.class_names
    parts = config.build_schedule(), predictions.build(config.prediction)
    return Model(network, variables, *parts, names)


class Reconstruction(NamedTuple):
    """A run's weights under a different average, at a step; error as in averages.combine."""

    step: int
    variables: Variables
    error: float


def reconstruct(run: str | Path, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """Return a run's power-function average of any relative width, from its snapshots.

    step: that of a snapshot; the newest by default. Sums are formed in float64.
    Raise InputError if the run has no snapshots, or if sigma_rel is invalid.
    """
    run = find_run(run)
    averages.power_of(sigma_rel)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = checkpoints.template(variable_shapes(load_config(run).build_network()), here)
    stored = list(checkpoints.restore_averages(run, (shapes,) * len(averages.SIGMA_RELS), step))
    step = stored[-1][0]
    found = averages.combine(
        [Profile(at, width) for at, _ in stored for width in averages.SIGMA_RELS],
        Profile(step, sigma_rel),
    )
    trees = [tree for _, pair in stored for tree in pair]

    def total(*leaves: Array) -> Array:
        parts = zip(found.coefficients, leaves, strict=True)
        exact = sum(part * np.asarray(leaf, np.float64) for part, leaf in parts)
        return jnp.asarray(exact, leaves[0].dtype)

    return Reconstruction(step, jax.tree.map(total, *trees), found.error)


def load_config(run: Path) -> Config:
    """Return a run folder's configuration. Raise InputError if this version cannot read it."""
    run = find_run(run)
    return Config.from_dict(checkpoints.read_config(run), str(run / checkpoints.CONFIG))


def save_model(run: str | Path, config: Config, variables: Variables) -> None:
    """Make a run folder of a model that was trained elsewhere, whole or not at all.

    Raise InputError if the folder exists and is not empty.
    """
    run = Path(run)
    check_new(run)
    partial = run.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        checkpoints.write_config(partial, config.to_dict())
        checkpoints.save(partial, 0, variables)
        partial.rename(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(run: str | Path) -> None:
    """Raise InputError unless a new run can be made in a folder."""
    run = Path(run)
    folder = run.is_dir() or not os.path.exists(run)
    require(folder, f"run={str(run)!r} is not a folder: name a new one")
    check_writable(run, "run")
    empty = not os.path.exists(run) or not any(run.iterdir())
    require(empty, f"run={str(run)!r} is not empty: name a new folder")
