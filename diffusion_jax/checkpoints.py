"""A run on disk: config.json, and checkpoints under state/<step>/ by orbax.

A checkpoint has two items: the model, which sampling needs, and the training, which continuing
needs. averages/<step>/ holds averages of the weights, of which others are made afterwards.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax.typing import InputError, require

CONFIG = "config.json"
LARGEST = 2**20  # bytes of a configuration
ITEMS = ("model", "training")
AVERAGES = "averages"


def write_config(run: Path, values: dict[str, Any]) -> None:
    """Store a run's configuration, whole or not at all. Raises InputError if it cannot be."""
    partial = run / f"{CONFIG}.partial"
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(partial, run / CONFIG)
    except OSError as error:
        raise InputError(f"run={str(run)!r} cannot be written: {error.strerror}") from None


def read_config(run: Path) -> dict[str, Any]:
    """A run's stored configuration. Raises InputError if run is no run folder."""
    path = run / CONFIG
    if not os.path.isdir(run):
        raise InputError(f"run={str(run)!r}: there is no such folder")
    if not os.path.isfile(path):
        raise InputError(f"run={str(run)!r} is not a run: there is no {CONFIG} in it")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise InputError(f"{path} does not hold a configuration: it is too large")
        values = json.loads(text)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold a configuration")
    return values


def open_checkpoints(run: Path, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints of a run, to write; the newest keep are kept, or all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(run.absolute() / "state", options=options, item_names=ITEMS)


def save(
    checkpoints: ocp.CheckpointManager, step: int, model: Any, training: Any | None = None
) -> None:
    """Start to write a checkpoint in the background; call wait_until_finished before the end."""
    items = {"model": ocp.args.StandardSave(model)}
    if training is not None:
        items["training"] = ocp.args.StandardSave(training)
    checkpoints.save(step, args=ocp.args.Composite(**items), force=True)


def restore(checkpoints: ocp.CheckpointManager, step: int, **templates: Any) -> Any:
    """The items named by the templates, which are trees of jax.ShapeDtypeStruct.

    A template says where its arrays go, by its sharding: what was saved on other devices does not
    matter. Raises InputError if the checkpoint does not hold them.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in templates.items()}
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**args))
    except (ValueError, KeyError, OSError) as error:
        path = checkpoints.directory / str(step)
        items = ", ".join(templates)
        raise InputError(f"{path} does not hold this run's {items}: {error}") from None


def restore_model(run: Path, template: Any, step: int | None = None) -> Any:
    """The model of a run's newest checkpoint, or of a step. Raises InputError if there is none."""
    state = run.absolute() / "state"
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    if not state.is_dir():
        raise InputError(f"run={str(run)!r} has no checkpoint yet")
    with ocp.CheckpointManager(state, options=options, item_names=ITEMS) as checkpoints:
        steps = checkpoints.all_steps()
        if not steps:
            raise InputError(f"run={str(run)!r} has no checkpoint yet")
        if step is not None and step not in steps:
            raise InputError(f"step={step}: the checkpoints of {run} are {sorted(steps)}")
        step = max(steps) if step is None else step
        return restore(checkpoints, step, model=template)["model"]


def save_averages(run: Path, step: int, averages: Any) -> None:
    """Store the averages of a step, unless they are there: a continued run comes by again."""
    with _open_averages(run) as snapshots:
        if step not in snapshots.all_steps():
            items = {AVERAGES: ocp.args.StandardSave(averages)}
            snapshots.save(step, args=ocp.args.Composite(**items), force=True)


def restore_averages(run: Path, template: Any, until: int | None = None) -> Iterator[tuple]:
    """The stored averages (step, averages) of a run, in order, up to a step or all of them.

    Raises InputError if there are none, or none of that step.
    """
    require(
        (run / AVERAGES).is_dir(),
        f"run={str(run)!r} has no snapshots of averages: train it with --ema_snapshots",
    )
    with _open_averages(run, read_only=True, save_interval_steps=0) as snapshots:
        steps = sorted(snapshots.all_steps())
        require(steps, f"run={str(run)!r} has no snapshots of averages yet")
        require(until in (None, *steps), f"step={until}: the snapshots of {run} are {steps}")
        for step in steps:
            if until is None or step <= until:
                yield step, restore(snapshots, step, averages=template)[AVERAGES]


def _open_averages(run: Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        run.absolute() / AVERAGES,
        options=ocp.CheckpointManagerOptions(create=not options, **options),
        item_names=(AVERAGES,),
    )


def template(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and types of a tree of arrays (or of shapes), to be restored with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
