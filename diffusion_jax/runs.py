"""A run folder as what it holds: a configuration and a trained model."""

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax import averages, checkpoints, parallel
from diffusion_jax.averages import Profile
from diffusion_jax.config import Config
from diffusion_jax.files import PARTIAL
from diffusion_jax.locks import check_writable
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, Variables


class Model(NamedTuple):
    """A network with its weights, and the forward process that it was trained on."""

    config: Config
    network: nn.Module
    schedule: NoiseSchedule
    variables: Variables


def load_model(run: str | Path, step: int | None = None) -> Model:
    """The model of a run folder: of its newest checkpoint, or of one step.

    Raises InputError if run is no run folder, or holds no such checkpoint.
    """
    run = Path(run)
    config = load_config(run)
    network = config.network.build()
    here = parallel.replicate(0, parallel.first_devices(1)).sharding
    shapes = checkpoints.template(variable_shapes(network), here)
    variables = checkpoints.restore_model(run, shapes, step)
    return Model(config, network, config.diffusion.build(), variables)


class Reconstruction(NamedTuple):
    """A run's weights under another average, at a step; error as in averages.combine."""

    step: int
    variables: Variables
    error: float


def reconstruct(run: str | Path, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """The power-function average of a run, of any relative width, from its snapshots.

    step: that of a snapshot; the newest by default. Sums are formed in float64.
    Raises InputError if the run has no snapshots, or for a sigma_rel that cannot be.
    """
    run = Path(run)
    averages.check(sigma_rel)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = checkpoints.template(variable_shapes(load_config(run).network.build()), here)
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
    """The configuration of a run folder. Raises InputError if it is none of this version's."""
    return Config.from_dict(checkpoints.read_config(run), str(run / checkpoints.CONFIG))


def save_model(run: str | Path, config: Config, variables: Variables) -> None:
    """Make a run folder of a model that was trained elsewhere, whole or not at all.

    Raises InputError if it exists.
    """
    run = Path(run)
    check_new(run)
    partial = run.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        checkpoints.write_config(partial, config.to_dict())
        with checkpoints.open_checkpoints(partial) as manager:
            checkpoints.save(manager, 0, variables)
        partial.rename(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(run: str | Path) -> None:
    """Raise InputError unless a new run can be made in a folder."""
    run = Path(run)
    if run.exists() and not run.is_dir():
        raise InputError(f"run={str(run)!r} is not a folder: name a new one")
    check_writable(run, "run")
    if run.exists() and any(run.iterdir()):
        raise InputError(f"run={str(run)!r} is not empty: name a new folder")


def variable_shapes(network: Any) -> Any:
    """The shapes of a network's variables, by which a checkpoint is read."""
    with jax.enable_x64(False):
        return jax.eval_shape(_init(network), 0)


def init_variables(network: Any, seed: int) -> Variables:
    """A network's initial variables."""
    # It runs once: without optimisation it compiles several times faster.
    options = {"xla_backend_optimization_level": 0}
    with jax.enable_x64(False):
        return jax.jit(_init(network), compiler_options=options)(seed)


def _init(network: Any) -> Callable[[Any], Variables]:
    def init(seed: Any) -> Variables:
        x = jnp.zeros((1, *network.image_shape))
        return network.init(jax.random.key(seed), x, jnp.zeros(()))

    return init
