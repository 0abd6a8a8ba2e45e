"""The folder of a run: config.json, and the checkpoints state/<step>/, which orbax writes.

A checkpoint has two items: the model, which sampling needs, and the training, which a continued run
needs; and a copy of config.json. Its last file is a manifest of checksums: a checkpoint is sound if
it matches its manifest. averages/<step>/ holds averages of the weights in the same form.
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
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax import parallel
from diffusion_jax.files import PARTIAL, read_json, remove_partial, write_atomically
from diffusion_jax.runs import manifests
from diffusion_jax.typing import InputError, RunWarning, require

CONFIG = "config.json"
STATE, AVERAGES, DAMAGED = "state", "averages", "damaged"  # they hold a folder for each step
MODEL, TRAINING = "model", "training"  # the items of a checkpoint
MOVABLE = ("data",)  # fields of a configuration that may change, because they name files
TRIES = 20  # checkpoints that training may remove before sampling gives up


def write_config(run: Path, values: dict[str, Any]) -> None:
    """Store a run's configuration, whole or not at all. Raise InputError if the system refuses."""
    try:
        write_atomically(run / CONFIG, (json.dumps(values, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"run={str(run)!r} cannot be written: {error.strerror}") from None


def read_config(run: Path) -> dict[str, Any]:
    """Return a run's stored configuration. Raise InputError if run is not a run folder."""
    path = run / CONFIG
    require(os.path.isdir(run), f"run={str(run)!r}: there is no such folder")
    require(os.path.isfile(path), f"run={str(run)!r} is not a run: there is no {CONFIG} in it")
    try:
        values = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    require(isinstance(values, dict), f"{path} does not hold a configuration")
    return values


def save(
    run: Path,
    step: int,
    model: Any,
    training: Any | None = None,
    *,
    files: Iterable[Path] = (),
    keep: int | None = None,
) -> None:
    """Write a checkpoint with copies of files; then remove all but the newest keep.

    Raise OSError if it cannot be written, for example on a full disk; older ones then remain.
    """
    state = run.absolute() / STATE
    items = {MODEL: model} if training is None else {MODEL: model, TRAINING: training}
    config = run / CONFIG
    _write(state / str(step), items, (*([config] if config.exists() else []), *files))
    if keep is not None and parallel.is_first():
        _prune(state, keep)


def _write(folder: Path, items: dict[str, Any], files: Iterable[Path] = ()) -> None:
    """Write items with copies of files and a manifest into a new folder, whole or not at all."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            for name, tree in items.items():
                writer.save(partial / name, args=ocp.args.StandardSave(tree))
        if parallel.is_first():
            for name in items:
                _check_merged(partial / name)
            for file in files:
                shutil.copyfile(file, partial / file.name)
            manifests.seal(partial)
            partial.rename(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        number, reason = _reason(error)
        message = f"the checkpoint could not be written: {reason}"
        raise OSError(number, message, str(folder)) from error
    parallel.wait_for_all()


def _check_merged(item: Path) -> None:
    """Raise OSError if orbax left a part of each process, but not the whole that it reads.

    If it cannot list the folder, it skips merging the parts without an error.
    """
    names = os.listdir(item)
    if any(name.startswith("ocdbt.process_") for name in names) and "manifest.ocdbt" not in names:
        raise OSError(errno.EIO, "its parts were not merged", str(item))


def _reason(error: Exception) -> tuple[int, str]:
    """Return the system's error number and its meaning, also from a report by tensorstore."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    return (number, os.strerror(number)) if number else (errno.EIO, str(error).split("\n")[0])


def _prune(state: Path, keep: int) -> None:
    """Remove all but the newest sealed checkpoints; warn of those that cannot be removed."""
    found = [state / str(step) for step in _steps(state)]
    kept = [folder for folder in found if manifests.is_sealed(folder)][-keep:]
    for folder in set(found) - set(kept):
        partial = folder.with_name(f".{folder.name}{PARTIAL}")
        try:
            shutil.rmtree(folder.rename(partial))  # so that nobody reads a part of it
        except OSError as error:
            message = f"{folder} cannot be removed: {error.strerror}"
            warnings.warn(message, RunWarning, stacklevel=3)


def latest(run: Path) -> int | None:
    """Return the step of a run's latest checkpoint, sound or not, or None if there is none."""
    return max(_steps(run / STATE), default=None)


def _steps(state: Path) -> list[int]:
    """Return the steps that have a folder, sound or not, in ascending order."""
    try:
        names = os.listdir(state)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{state}: {error.strerror}") from None
    return sorted(int(name) for name in names if name.isdecimal())


def _is_sound(folder: Path) -> bool:
    """Return whether a checkpoint is sound; warn if it is damaged. Raise as manifests.fault."""
    fault = manifests.fault(folder)
    if fault and folder.exists():  # else training removed it while it was read
        warnings.warn(f"{folder} is skipped: {fault}", RunWarning, stacklevel=4)
    return fault is None


def newest(run: Path) -> int | None:
    """Return the step of a run's newest sound checkpoint, or None if there is none.

    A RunWarning names each damaged one that is newer. Raise InputError if the system refuses to
    read a checkpoint, because it may be sound.
    """
    state = run.absolute() / STATE
    while True:
        steps = _steps(state)
        sound = (step for step in reversed(steps) if _is_sound(state / str(step)))
        found = next(sound, None)
        if found in steps[-1:] or steps == _steps(state):  # else training removed the newer ones
            return found


def set_aside(run: Path, step: int | None) -> None:
    """Clear the way for training to continue from a step, or to begin (None).

    Newer checkpoints, which are damaged, move to damaged/<step>; unfinished ones are removed.
    Raise InputError if there are checkpoints, but none to continue from.
    """
    state = run.absolute() / STATE
    steps = _steps(state)
    require(
        step is not None or not steps,
        f"run={str(run)!r} has no sound checkpoint, only damaged ones: {steps}. "
        f"To begin anew, move {state} away",
    )
    for folder in (run, state, run / AVERAGES):
        remove_partial(folder)
    for damaged in steps:
        if step is not None and damaged > step:
            place = run / DAMAGED / str(damaged)
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            (state / str(damaged)).rename(place)


def restore(run: Path, step: int, **templates: Any) -> dict[str, Any]:
    """Return the items of a checkpoint that the templates name.

    A template is a tree of jax.ShapeDtypeStruct. Its sharding determines where the arrays go,
    whichever devices saved them. Raise InputError if the checkpoint does not hold them.
    """
    return _read(run.absolute() / STATE / str(step), templates)


def _read(folder: Path, templates: dict[str, Any]) -> dict[str, Any]:
    try:
        with ocp.StandardCheckpointer() as reader:
            return {name: reader.restore(folder / name, tree) for name, tree in templates.items()}
    except Exception as error:  # orbax raises plain ones
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{folder} does not hold this run's {', '.join(templates)}: {reason}"
        ) from None


def restore_model(run: Path, template: Any, step: int | None = None) -> Any:
    """Return the model of a run's newest sound checkpoint, or of one step.

    Raise InputError if there is none, if the step's is damaged, or if the run's configuration
    differs from the checkpoint's copy; a RunWarning names damaged ones that are newer.
    """
    state, items = run.absolute() / STATE, {MODEL: template}
    for _ in range(TRIES):
        folder = state / str(_choose(run, step))
        with tempfile.TemporaryDirectory() as place:
            try:
                _check_config(run, folder)
                if jax.process_count() > 1:  # they read it together
                    return _read(folder, items)[MODEL]
                copy = Path(place) / folder.name
                shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(TRAINING))
                if folder.exists():  # else training removed it meanwhile
                    return _read(copy, items)[MODEL]
            except (OSError, InputError) as error:
                if folder.exists():
                    raise InputError(str(error).replace(place, str(state))) from error
    raise InputError(f"run={str(run)!r} removes each checkpoint before it is read: keep more")


def _choose(run: Path, step: int | None) -> int:
    """Return the newest sound step, or the given one. Raise InputError if it is not there."""
    state = run.absolute() / STATE
    steps = _steps(state)
    require(steps, f"run={str(run)!r} has no checkpoint yet")
    if step is None:
        if (found := newest(run)) is None:
            damaged = f"has no sound checkpoint, only damaged ones: {steps}"
            raise InputError(f"run={str(run)!r} {damaged}")
        return found
    require(step in steps, f"step={step}: the checkpoints of {run} are {steps}")
    fault = manifests.fault(state / str(step))
    require(fault is None, f"step={step}: {state / str(step)} is damaged: {fault}")
    return step


def check_config(run: Path) -> None:
    """Raise InputError unless the run's configuration is that of its newest sound checkpoint."""
    if (step := newest(run)) is not None:
        _check_config(run, run.absolute() / STATE / str(step))


def _check_config(run: Path, checkpoint: Path) -> None:
    """Raise InputError unless the run's configuration is the one in a checkpoint's copy."""
    if not os.path.lexists(checkpoint / CONFIG):
        return
    ours, theirs = read_config(run), read_config(checkpoint)
    changed = [k for k, value in theirs.items() if k not in MOVABLE and ours.get(k) != value]
    require(
        not changed,
        f"{run / CONFIG} differs from the checkpoint's copy in {', '.join(changed)}: "
        f"replace it by {checkpoint / CONFIG}",
    )


def save_averages(run: Path, step: int, averages: Any) -> None:
    """Store the averages of a step, unless they were stored before the run was stopped.

    Raise OSError if they cannot be written.
    """
    folder = run.absolute() / AVERAGES / str(step)
    damaged = folder.exists() and manifests.fault(folder) is not None
    if damaged and parallel.is_first():
        shutil.rmtree(folder)
    if damaged or not folder.exists():
        _write(folder, {AVERAGES: averages})


def restore_averages(run: Path, template: Any, until: int | None = None) -> Iterator[tuple]:
    """Yield the stored averages (step, averages) of a run in order, up to a step or all of them.

    Leave out damaged ones, which a RunWarning names. Raise InputError if no sound ones are left, or
    if the step has none.
    """
    folder = run.absolute() / AVERAGES
    steps = _steps(folder)
    require(
        steps,
        f"run={str(run)!r} has no snapshots of averages: train it with --ema=power:snapshots=16",
    )
    sound = [step for step in steps if _is_sound(folder / str(step))]
    require(sound, f"run={str(run)!r} has no sound snapshot, only damaged ones: {steps}")
    require(until in (None, *sound), f"step={until}: the snapshots of {run} are {sound}")
    for step in sound:
        if until is None or step <= until:
            yield step, _read(folder / str(step), {AVERAGES: template})[AVERAGES]


def template(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Return the shapes and types of a tree of arrays or of shapes, to restore with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
