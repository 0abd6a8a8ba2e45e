"""A run on disk: config.json, and checkpoints under state/<step>/ by orbax.

A checkpoint has two items: the model, which sampling needs, and the training, which continuing
needs; and a copy of config.json. Its last file is a manifest of checksums: a checkpoint is sound if
it fits its manifest. averages/<step>/ holds averages of the weights, of which others are made
afterwards, in the same form.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from diffusion_jax import manifests
from diffusion_jax.files import read_json, remove_partial, write_atomically
from diffusion_jax.typing import InputError, RunWarning, require

CONFIG = "config.json"
TRIES = 20  # times that a listing is read which training beside this changes
ITEMS = ("model", "training")
AVERAGES = "averages"
MOVABLE = ("images", "labels")  # fields of a configuration that say where files are


def write_config(run: Path, values: dict[str, Any]) -> None:
    """Store a run's configuration, whole or not at all. Raises InputError if it cannot be."""
    try:
        write_atomically(run / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
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
        values = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold a configuration")
    return values


def open_checkpoints(run: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, to write."""
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(run.absolute() / "state", options=options, item_names=ITEMS)


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    model: Any,
    training: Any | None = None,
    *,
    files: Iterable[Path] = (),
    keep: int | None = None,
) -> None:
    """Write a checkpoint, with copies of files, and seal it; then remove all but the newest keep.

    Raises OSError if it cannot be written, on a full disk say; the earlier ones then stand.
    """
    _write(checkpoints, step, {ITEMS[0]: model, ITEMS[1]: training}, files)
    if keep is not None and jax.process_index() == 0:
        _prune(Path(checkpoints.directory), keep)
    checkpoints.reload()


def _write(
    checkpoints: ocp.CheckpointManager, step: int, items: dict[str, Any], files: Iterable[Path] = ()
) -> None:
    """Write those items of a step that are not None, and seal them with copies of files."""
    folder = Path(checkpoints.directory) / str(step)
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree is not None}
    config = folder.parent.parent / CONFIG
    try:
        checkpoints.save(step, args=ocp.args.Composite(**args), force=True)
        if jax.process_index() == 0:
            for file in (*([config] if config.exists() else []), *files):
                shutil.copyfile(file, folder / file.name)
            manifests.seal(folder)
    except Exception as error:
        _remove_unfinished(folder.parent, step)
        checkpoints.reload()
        number, what = _reason(error)
        message = f"the checkpoint could not be written: {what}"
        raise OSError(number, message, str(folder)) from error


def _reason(error: Exception) -> tuple[int, str]:
    """The system's error number, and its meaning, of an error that may be tensorstore's report."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    return (number, os.strerror(number)) if number else (errno.EIO, str(error).split("\n")[0])


def _remove_unfinished(state: Path, step: int | None = None) -> None:
    for folder in state.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(folder, ignore_errors=True)
    if step is not None:
        shutil.rmtree(state / str(step), ignore_errors=True)


def _prune(state: Path, keep: int) -> None:
    """Remove all checkpoints but the newest; a RunWarning names one that cannot be removed."""
    sealed = [step for step in _steps(state) if manifests.is_sealed(state / str(step))]
    for step in set(_steps(state)) - set(sealed[-keep:]):
        try:
            (state / str(step) / manifests.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(state / str(step))
        except OSError as error:
            message = f"{state / str(step)} cannot be removed: {error.strerror}"
            warnings.warn(message, RunWarning, stacklevel=3)


def _steps(state: Path) -> list[int]:
    """The steps that have a folder, sound or not, in ascending order."""
    try:
        names = os.listdir(state)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{state}: {error.strerror}") from None
    return sorted(int(name) for name in names if name.isdecimal())


def newest(run: Path) -> int | None:
    """The step of the newest sound checkpoint of a run, None if there is none.

    A RunWarning names those that it passes over. Raises InputError at one that the system does not
    let it read.
    """
    state = run.absolute() / "state"
    faults: dict[int, str] = {}
    found = None
    for _ in range(TRIES):
        faults, found = {}, None
        steps = _steps(state)
        for step in reversed(steps):
            fault = manifests.fault(state / str(step))
            if fault is None:
                found = step
                break
            faults[step] = fault
        if not faults or steps == _steps(state):  # else it was removed meanwhile
            break
    for step, fault in faults.items():
        _warn(state / str(step), fault)
    return found


def _warn(folder: Path, fault: str) -> None:
    warnings.warn(f"{folder} is passed over: {fault}", RunWarning, stacklevel=3)


def set_aside(run: Path, step: int | None) -> None:
    """Clear the way for training to go on from a step, or from none.

    What newer, damaged checkpoints there are move to damaged/<step>; unfinished ones go.
    Raises InputError if there are checkpoints, but none to go on from.
    """
    state = run.absolute() / "state"
    steps = _steps(state)
    never_saved = len(steps) < 2 and not any(manifests.is_sealed(state / str(s)) for s in steps)
    require(
        step is not None or never_saved,
        f"run={str(run)!r} has no sound checkpoint, only damaged ones: {steps}. "
        f"To begin anew, move {state} away",
    )
    _remove_unfinished(state)
    remove_partial(run)
    for damaged in steps:
        if step is None or damaged > step:
            place = run / "damaged" / str(damaged)
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            (state / str(damaged)).rename(place)


def restore(checkpoints: ocp.CheckpointManager, step: int, **templates: Any) -> Any:
    """The items named by the templates, which are trees of jax.ShapeDtypeStruct.

    A template says where its arrays go, by its sharding: what was saved on other devices does not
    matter. Raises InputError if the checkpoint does not hold them.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in templates.items()}
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # orbax raises plain ones
        path = checkpoints.directory / str(step)
        items = ", ".join(templates)
        what = str(error).split("\n")[0]
        raise InputError(f"{path} does not hold this run's {items}: {what}") from None


def restore_model(run: Path, template: Any, step: int | None = None) -> Any:
    """The model of a run's newest sound checkpoint, or of a step.

    Raises InputError if there is none, if the step's is damaged, or if the run's configuration is
    no longer the one that it was saved with; a RunWarning names damaged ones that are newer.
    """
    state = run.absolute() / "state"
    for _ in range(TRIES):
        folder = state / str(_choose(run, step))
        with tempfile.TemporaryDirectory() as place:
            try:
                _check_config(run, folder)
                if jax.process_count() > 1:  # they read it together
                    return _read_model(folder, template)
                copy = Path(place) / folder.name
                shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(ITEMS[1]))
                if manifests.is_sealed(folder):  # else training beside this removed it meanwhile
                    return _read_model(copy, template)
            except (OSError, InputError) as error:
                if manifests.is_sealed(folder):
                    raise InputError(str(error).replace(place, str(state))) from error
    raise InputError(f"run={str(run)!r} removes each checkpoint before it is read: keep more")


def _read_model(folder: Path, template: Any) -> Any:
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    with ocp.CheckpointManager(folder.parent, options=options, item_names=ITEMS) as checkpoints:
        return restore(checkpoints, int(folder.name), model=template)[ITEMS[0]]


def _choose(run: Path, step: int | None) -> int:
    """The newest sound checkpoint, or that of a step. Raises InputError if there is none."""
    state = run.absolute() / "state"
    steps = _steps(state)
    if not steps:
        raise InputError(f"run={str(run)!r} has no checkpoint yet")
    if step is None:
        step = newest(run)
        require(
            step is not None,
            f"run={str(run)!r} has no sound checkpoint, only damaged ones: {steps}",
        )
    elif step not in steps:
        raise InputError(f"step={step}: the checkpoints of {run} are {steps}")
    elif fault := manifests.fault(state / str(step)):
        raise InputError(f"step={step}: {state / str(step)} is damaged: {fault}")
    return cast(int, step)


def _check_config(run: Path, checkpoint: Path) -> None:
    """Raise InputError unless the run's configuration holds what a checkpoint's copy does."""
    if not os.path.lexists(checkpoint / CONFIG):
        return
    ours, theirs = read_config(run), read_config(checkpoint)
    changed = [
        name
        for group, fields in theirs.items()
        if isinstance(fields, dict) and isinstance(ours.get(group), dict)
        for name, value in fields.items()
        if name not in MOVABLE and ours[group].get(name) != value
    ]
    require(
        not changed,
        f"{run / CONFIG} has another {', '.join(changed)} than when the checkpoint was saved: "
        f"put {checkpoint / CONFIG} in its place",
    )


def save_averages(run: Path, step: int, averages: Any) -> None:
    """Store the averages of a step, unless they are there: a continued run comes by again.

    Raises OSError if they cannot be written.
    """
    folder = run.absolute() / AVERAGES / str(step)
    if jax.process_index() == 0 and folder.exists() and manifests.fault(folder):
        shutil.rmtree(folder)
    with _open_averages(run) as snapshots:
        if step not in snapshots.all_steps():
            _write(snapshots, step, {AVERAGES: averages})


def restore_averages(run: Path, template: Any, until: int | None = None) -> Iterator[tuple]:
    """The stored averages (step, averages) of a run, in order, up to a step or all of them.

    A RunWarning names damaged ones, which are left out. Raises InputError if there are none, or
    none of that step.
    """
    folder = run.absolute() / AVERAGES
    steps = _steps(folder)
    require(steps, f"run={str(run)!r} has no snapshots of averages: train it with --ema_snapshots")
    faults = {step: manifests.fault(folder / str(step)) for step in steps}
    for step, fault in faults.items():
        if fault:
            _warn(folder / str(step), fault)
    sound = [step for step in steps if not faults[step]]
    require(sound, f"run={str(run)!r} has no sound snapshot, only damaged ones: {steps}")
    require(until in (None, *sound), f"step={until}: the snapshots of {run} are {sound}")
    with _open_averages(run, read_only=True, save_interval_steps=0) as snapshots:
        for step in sound:
            if until is None or step <= until:
                yield step, restore(snapshots, step, averages=template)[AVERAGES]


def _open_averages(run: Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        run.absolute() / AVERAGES,
        options=ocp.CheckpointManagerOptions(
            create=not options, enable_async_checkpointing=False, **options
        ),
        item_names=(AVERAGES,),
    )


def template(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and types of a tree of arrays (or of shapes), to be restored with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
