"""Train a diffusion model, on drawn sprites or on images of your own.

  python -m experiments.train --preset=demo
  python -m experiments.train --images=sprites.npy --labels=labels.npy --run=checkpoints/mine
  python -m experiments.train --images=folder_with_a_subfolder_for_each_class --image_size=16

The run folder holds config.json, the checkpoints, metrics.jsonl and report.html. The same command
continues a run that was stopped.
"""

import json
import signal
import sys
import time
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import (
    checkpoints,
    data,
    environment,
    locks,
    metrics,
    parallel,
    stopping,
    training,
)
from diffusion_jax.averages import snapshot_steps
from diffusion_jax.config import Config, at_least
from diffusion_jax.data import Dataset
from diffusion_jax.files import PARTIAL
from diffusion_jax.optimizers import Length
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.training import Chunk, TrainState
from diffusion_jax.typing import InputError
from experiments.flags import (
    FLAGS,
    config,
    define_config,
    define_devices,
    define_processes,
    describe,
    run,
    say,
)
from experiments.report import write_run_report

define_config()
define_devices()
define_processes()
flags.DEFINE_string("run", None, "the run folder; by default checkpoints/PRESET")
flags.DEFINE_integer(
    "save_every",
    None,
    "epochs between checkpoints, besides the one at the end; by default 4, or a tenth of all "
    "epochs where that is more",
)
flags.DEFINE_integer("keep", 3, "how many checkpoints to keep, the newest ones")
flags.DEFINE_enum(
    "on_nan",
    "stop",
    ["stop", "skip"],
    "what to do at a step whose loss or gradient is not finite: stop, or skip its update",
)
flags.DEFINE_boolean(
    "deterministic",
    False,
    "have GPUs take kernels that give the same bits each time, slower ones; on CPUs and TPUs it "
    "changes nothing, for they have no others",
)
flags.DEFINE_boolean("report", True, "sample from the model at the end, and write report.html")

METRICS = "metrics.jsonl"


def main() -> None:
    """Train a run to its end, from wherever it stands."""
    at_least("keep", FLAGS.keep, 1)
    if FLAGS.save_every is not None:
        at_least("save_every", FLAGS.save_every, 1)
    if FLAGS.deterministic:
        parallel.make_deterministic()
    folder = Path(FLAGS.run or f"checkpoints/{FLAGS.preset}")
    with parallel.alike(lambda: checksum(settings)):
        dataset = data.load(config().data)
        settings = config().fill_in(dataset)
        check_folder(folder, settings)
        devices = parallel.choose_devices(settings.training.batch_size, FLAGS.devices)
    length = Length(len(dataset.images), settings.training.batch_size, settings.training.epochs)
    say(
        f"{folder}: {len(dataset.images)} images of {', '.join(dataset.class_names)}; "
        f"{length.steps} steps of {length.batch_size} on {describe(devices)}"
    )
    with ExitStack() as held:
        with parallel.alike():
            if parallel.is_first():
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locks.only_writer(folder))
                checkpoints.write_config(folder, settings.to_dict())
        with checkpoints.open_checkpoints(folder) as manager:
            state = resume(folder, manager, settings, length, devices)
            if int(state.step) == length.steps:
                say(f"{folder} is complete: {length.steps} steps")
            else:
                if parallel.is_first():
                    environment.record(folder, environment.describe(sys.argv, devices))
                train(folder, manager, settings, dataset, state, devices, length)
        check_skipped(folder)
        if FLAGS.report:
            say(f"report: {write_run_report(folder, load_model(folder), devices)}")


def checksum(settings: Config) -> int:
    """A number that tells whether the processes of a job have the same settings and data."""
    return zlib.crc32(json.dumps(settings.to_dict()).encode())


def check_folder(folder: Path, settings: Config) -> None:
    """Raise InputError unless folder is new, empty, or a run of the same configuration.

    It must be one that can be written, too.
    """
    new = not folder.exists() or (
        folder.is_dir() and all(_is_of_a_start(path.name) for path in folder.iterdir())
    )
    for name in ("state", "damaged", checkpoints.AVERAGES):
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name} is a link: a run's own folders must be in it")
    if not (new or (folder / checkpoints.CONFIG).is_file()):
        raise InputError(f"run={str(folder)!r} exists and is not a run: name another folder")
    if differences := [] if new else load_config(folder).differences(settings):
        raise InputError(
            f"run={str(folder)!r} was started with another configuration: "
            f"{'; '.join(differences)}. Name another folder with --run, or the old settings"
        )
    for place in (folder, folder / "state"):
        locks.check_writable(place, "run")


def _is_of_a_start(name: str) -> bool:
    """Whether a file is one of those that are left where training was killed as it started."""
    return name == locks.LOCK or (name.startswith(".") and name.endswith(PARTIAL))


def resume(
    folder: Path, manager: Any, settings: Config, length: Length, devices: list[jax.Device]
) -> TrainState:
    """The state of the newest sound checkpoint, or a new one; the metrics as they were then."""
    state = training.init(settings, length)
    step = make_way(folder)
    manager.reload()
    if step is None:
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parallel.replicate(0, devices))
    shapes = checkpoints.template(state, shardings)
    stored = shapes.without_model()
    items = checkpoints.restore(manager, step, model=shapes.ema, training=stored)
    say(f"continuing from step {step}")
    return TrainState(**items["training"])._replace(ema=items["model"])


def make_way(folder: Path) -> int | None:
    """The step from which to go on, with the metrics as they were then; None at the start."""
    step = None
    with parallel.alike():
        if parallel.is_first():
            step = checkpoints.newest(folder)
            checkpoints.set_aside(folder, step)
            copy = None if step is None else folder / "state" / str(step) / METRICS
            metrics.restore(folder / METRICS, copy)
    agreed = parallel.agree(-1 if step is None else step)
    return None if agreed < 0 else agreed


def train(
    folder: Path,
    manager: Any,
    settings: Config,
    dataset: Dataset,
    state: TrainState,
    devices: list[jax.Device],
    length: Length,
) -> None:
    """Run the remaining steps, saving at the ends of epochs."""
    save_every = FLAGS.save_every or max(4, length.epochs // 10)
    epochs = range(save_every, length.epochs, save_every)
    saves = {length.end_of_epoch(epoch) for epoch in epochs} | {length.steps}
    snapshots = snapshot_steps(length.steps, settings.training.ema_snapshots)
    begin = time.perf_counter()
    with (
        stopping.on_signals() as request,
        tqdm(
            total=length.steps,
            initial=int(state.step),
            unit="step",
            desc="training",
            disable=not parallel.is_first(),
        ) as bar,
    ):
        bar.set_postfix_str("compiling")
        for chunk in training.fit(
            settings, dataset.images, dataset.labels, state, devices, stops=saves | snapshots
        ):
            step = int(chunk.state.step)
            log(folder, manager, chunk, step, length, bar)
            if step in snapshots and len(chunk.losses):  # before a checkpoint that follows it
                checkpoints.save_averages(folder, step, chunk.state.averages)
            asked = parallel.largest(request.by or 0)
            if len(chunk.losses) and (step in saves or asked):
                save(folder, manager, chunk.state, step)
            if asked:
                bar.close()
                if parallel.is_first():
                    name = signal.Signals(asked).name
                    print(f"{name}: {stands(folder, manager)}", file=sys.stderr)
                sys.exit(128 + asked)
    say(f"{length.steps} steps in {time.perf_counter() - begin:.0f} s")


def check_skipped(folder: Path) -> None:
    """Print how many steps of a run were skipped. Raises InputError if all were."""
    losses = [record["loss"] for record in metrics.read(folder / METRICS)]
    if skipped := losses.count(None):
        say(f"{skipped} of {len(losses)} steps were skipped: loss or gradient not finite")
    if losses and skipped == len(losses):
        raise InputError(
            f"run={str(folder)!r} has learned nothing: every step was skipped. "
            "Try a lower --learning_rate or --grad_clip=1, in another folder"
        )


def save(folder: Path, manager: Any, state: TrainState, step: int) -> None:
    """Write a checkpoint. Raises OSError naming the last one if it fails."""
    stored = state.without_model()
    try:
        checkpoints.save(
            manager, step, state.ema, stored, files=[folder / METRICS], keep=FLAGS.keep
        )
    except OSError as error:
        message = f"{error.strerror}; {stands(folder, manager)}"
        raise OSError(error.errno, message, error.filename) from error


def stands(folder: Path, manager: Any) -> str:
    """Where a run that ends now will continue."""
    step = manager.latest_step()
    return f"{folder}/state/{step} is the last checkpoint" if step else "there is no checkpoint yet"


def log(folder: Path, manager: Any, chunk: Chunk, step: int, length: Length, bar: tqdm) -> None:
    """Append each step's loss to the metrics, null for one skipped; show the last ones' mean.

    Raises InputError at a loss or gradient that is not finite, unless such steps are skipped.
    """
    count = len(chunk.losses)
    if not count:
        bar.set_postfix_str(f"compiled in {chunk.seconds:.1f} s", refresh=sys.stderr.isatty())
        return
    finite = np.isfinite(chunk.losses)
    if FLAGS.on_nan == "stop" and not finite.all():
        bad = step - count + 1 + np.argmin(finite)
        raise InputError(
            f"the loss or its gradient is not finite in step {bad}: "
            "try a lower --learning_rate, --grad_clip=1 or --on_nan=skip; "
            f"{stands(folder, manager)}"
        )
    epoch = [(step - count + i) * length.batch_size // length.n_images for i in range(count)]
    records = [
        {
            "step": step - count + 1 + i,
            "epoch": epoch[i],
            "loss": float(loss) if finite[i] else None,
        }
        for i, loss in enumerate(chunk.losses)
    ]
    if parallel.is_first():
        metrics.append(folder / METRICS, records)
    rate = count * length.batch_size / chunk.seconds
    mean = np.mean(chunk.losses[finite]) if finite.any() else np.nan
    bar.set_postfix_str(f"loss {mean:.4f}, {rate:,.0f} images/s", refresh=False)
    bar.update(count)


if __name__ == "__main__":
    run(main)
