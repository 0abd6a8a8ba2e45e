"""Training that keeps its run whole: it resumes, logs, saves and stops in order."""

import json
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffusion_jax import parallel, training
from diffusion_jax.data import Dataset
from diffusion_jax.files import PARTIAL
from diffusion_jax.runs import checkpoints, environment, locks, metrics, signals, trackers
from diffusion_jax.runs.config import Config
from diffusion_jax.runs.metrics import METRICS
from diffusion_jax.runs.models import load_config, model_of
from diffusion_jax.runs.previews import Preview
from diffusion_jax.runs.summaries import write_summary
from diffusion_jax.runs.trackers import Tracker
from diffusion_jax.training import Chunk, Length, Task, TrainState
from diffusion_jax.training.averages import snapshot_steps
from diffusion_jax.typing import require


class Keeping(NamedTuple):
    """How a run is kept.

    save_every: epochs between checkpoints, besides the one at the end; None is 4, or a tenth of
    all epochs where that is more. keep: how many checkpoints to keep, the newest ones. on_nan:
    "stop" at a step whose loss or gradient is not finite, or "skip" its update. trackers: specs of
    where to log scalars, and a picture at each checkpoint, in addition to metrics.jsonl. preview:
    whether to keep a picture of samples, preview.png, up to date.
    """

    save_every: int | None = None
    keep: int = 3
    on_nan: str = "stop"
    trackers: tuple[str, ...] = ()
    preview: bool = False


DEFAULT = Keeping()
TRIAL = 2**20  # more steps than are taken to measure the speed
RESERVE = 0.03  # the part of a run's minutes for previews and checkpoints


class Run(NamedTuple):
    """A run in training. report: a function that receives each line of the report."""

    folder: Path
    config: Config
    task: Task
    length: Length
    devices: Sequence[jax.Device]
    keeping: Keeping
    report: Callable[[str], object]
    program: Callable
    preview: Preview

    def with_epochs(self, epochs: float) -> "Run":
        """Return the run with a different length. Its programs stay the same."""
        config = self.config.override(epochs=epochs)
        length = config.length(self.length.n_images)
        return self._replace(config=config, length=length, task=config.task(length))

    @property
    def last(self) -> str:
        """A message that names the last checkpoint, from which the run would continue."""
        step = checkpoints.latest(self.folder)
        place = f"{self.folder}/{checkpoints.STATE}/{step}"
        return f"{place} is the last checkpoint" if step else "there is no checkpoint yet"

    def saves(self) -> set[int]:
        """Return the steps after which to save."""
        epochs = math.ceil(self.length.epochs)
        every = self.keeping.save_every or max(4, epochs // 10)
        ends = {self.length.end_of_epoch(epoch) for epoch in range(every, epochs, every)}
        return ends | {self.length.steps}


def checksum(config: Config) -> int:
    """Return a checksum of the settings and the data, which processes compare."""
    return zlib.crc32(json.dumps(config.to_dict()).encode())


def check_folder(folder: Path, config: Config) -> None:
    """Raise InputError unless folder can be written, and is new or a run of this configuration."""
    new = not os.path.exists(folder) or (
        folder.is_dir() and all(_is_of_a_start(path.name) for path in folder.iterdir())
    )
    for name in (checkpoints.STATE, checkpoints.AVERAGES, checkpoints.DAMAGED):
        link = os.path.islink(folder / name)
        require(not link, f"{folder / name} is a link: a run's own folders must be in it")
    known = new or (folder / checkpoints.CONFIG).is_file()
    require(known, f"run={str(folder)!r} exists and is not a run: name a different folder")
    differences = [] if new else load_config(folder).differences(config)
    if differences:  # they may be damage of config.json
        checkpoints.check_config(folder)
    require(
        not differences,
        f"run={str(folder)!r} was started with a different configuration: "
        f"{'; '.join(differences)}. Use the old settings, or name a different folder with --run",
    )
    for place in (folder, folder / checkpoints.STATE):
        locks.check_writable(place, "run")


def _is_of_a_start(name: str) -> bool:
    """Return whether this is the name of a file that training leaves if it is killed early."""
    return name == locks.LOCK or (name.startswith(".") and name.endswith(PARTIAL))


def train_run(
    folder: Path,
    config: Config,
    dataset: Dataset,
    devices: Sequence[jax.Device],
    keeping: Keeping = DEFAULT,
    report: Callable[[str], object] = print,
    minutes: float | None = None,
) -> None:
    """Train a run to its end, from its newest sound checkpoint or from the start.

    minutes: lay a new run out for the steps that fit this time on these devices, compilation
    included, instead of config.epochs. The stored configuration then has the planned epochs.
    Raise InputError if it is being written by some other process, if a loss is not finite, or if
    every step was skipped. SIGINT and SIGTERM end the process after a checkpoint.
    """
    begin, first = time.perf_counter(), parallel.is_first()
    length = config.length(len(dataset.images))
    task = config.task(length)
    program = training.train_chunk(task, devices)
    preview = Preview(folder, model_of(config, task.network, {}), devices)
    run = Run(folder, config, task, length, devices, keeping, report, program, preview)
    given = dataset._replace(labels=0 * dataset.labels) if config.null_context else dataset
    with ExitStack() as held:
        with parallel.sharing_errors():
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locks.only_writer(folder))
        if minutes is not None:
            run = _lay_out(run, given, minutes, begin)
        with parallel.sharing_errors():
            if first:
                checkpoints.write_config(folder, run.config.to_dict())
                write_summary(folder, dataset)
        state = _resume(run)
        if int(state.step) == run.length.steps:
            report(f"{folder} is complete: {run.length.steps} steps")
        else:
            if first:
                environment.record(folder, environment.describe(sys.argv, devices))
            _train(run, given, state)
        losses = [record["loss"] for record in metrics.read(folder / METRICS)]
        if skipped := losses.count(None):
            report(f"{skipped} of {len(losses)} steps were skipped: loss or gradient not finite")
        require(
            not losses or skipped < len(losses),
            f"run={str(folder)!r} has learned nothing: every step was skipped. Try a lower "
            "learning rate or optimizer=adam:clip=1, in a different folder",
        )


def with_stored_length(folder: Path, config: Config) -> Config:
    """Return a configuration with the epochs that were planned when a run began, if it has begun.

    Raise InputError if the run's stored configuration is damaged.
    """
    if not (folder / checkpoints.CONFIG).is_file():
        return config
    checkpoints.check_config(folder)
    return config.override(epochs=load_config(folder).epochs)


def _lay_out(run: Run, dataset: Dataset, minutes: float, begin: float) -> Run:
    """Return the run with the steps that fit what is left of its minutes, at least half of them.

    Measure the speed in steps that are then discarded. A run that has begun keeps its length.
    """
    if parallel.agree((run.folder / checkpoints.CONFIG).exists()):
        run.report(f"keeping the {run.length.steps} steps that were planned when the run began")
        return run
    run.report(f"measuring how many steps fit in {minutes:g} min")
    n_images, batch_size, _ = run.length
    many = run.length._replace(epochs=TRIAL * batch_size / n_images)
    state, data = training.init(run.task), (dataset.images, dataset.labels)
    if run.keeping.preview:
        run.preview.draw(state.ema)  # this compiles it
    chunks = training.fit(run.task, many, *data, state, run.devices, program=run.program)
    speed = training.measure_speed(chunks, min(5, 1.8 * minutes))
    left = max(60 * minutes - (time.perf_counter() - begin), 30 * minutes)
    most = run.config.most_epochs(n_images) * n_images / batch_size
    steps = parallel.agree(max(1, int(min(speed * left * (1 - RESERVE), most))))
    run.report(f"{steps} steps fit: {steps * batch_size / n_images:.4g} epochs")
    return run.with_epochs(steps * batch_size / n_images)


def _resume(run: Run) -> TrainState:
    """Return the state of the newest sound checkpoint, or a new one. Restore its metrics too."""
    step = -1
    with parallel.sharing_errors():
        if parallel.is_first():
            found = checkpoints.newest(run.folder)
            checkpoints.set_aside(run.folder, found)
            copy = None if found is None else run.folder / checkpoints.STATE / str(found) / METRICS
            metrics.restore(run.folder / METRICS, copy)
            step = step if found is None else found
    step = parallel.agree(step)
    state = training.init(run.task)
    if step < 0:
        return state
    shapes = checkpoints.template(state, parallel.replicate(0, run.devices).sharding)
    stored = shapes.without_model()
    items = checkpoints.restore(run.folder, step, model=shapes.ema, training=stored)
    run.report(f"continuing from step {step}")
    return TrainState(**items["training"])._replace(ema=items["model"])


def _train(run: Run, dataset: Dataset, state: TrainState) -> None:
    """Take the remaining steps. Save after those in saves(), and when a signal asks to stop."""
    saves, steps = run.saves(), run.length.steps
    snapshots = snapshot_steps(steps, run.task.average.snapshots)
    begin, first = time.perf_counter(), parallel.is_first()
    bar = tqdm(total=steps, initial=int(state.step), unit="step", disable=not first)
    with signals.on_signals() as request, bar, _tracking(run) as tracking:
        bar.set_description("training")
        bar.set_postfix_str("compiling")
        data, stops = (dataset.images, dataset.labels), saves | snapshots
        given = run.task, run.length, *data, state, run.devices
        for chunk in training.fit(*given, stops=stops, program=run.program):
            step, count = int(chunk.state.step), len(chunk.losses)
            _log(run, chunk, step, bar, tracking)
            if step in snapshots and count:  # before a checkpoint that follows it
                checkpoints.save_averages(run.folder, step, chunk.state.averages)
            asked = parallel.largest(request.by or 0)
            if count and (step in saves or asked):
                _save(run, chunk.state, step)
                _track_picture(run, chunk.state, step, tracking)
            if run.keeping.preview:
                run.preview.refresh(chunk.state.ema, now=step == steps)
            if asked:
                bar.close()
                if first:
                    print(f"{signal.Signals(asked).name}: {run.last}", file=sys.stderr)
                sys.exit(128 + asked)
    run.report(f"{steps} steps in {time.perf_counter() - begin:.0f} s")


def _save(run: Run, state: TrainState, step: int) -> None:
    """Write a checkpoint. Raise OSError naming the last one if it fails."""
    stored, files = state.without_model(), [run.folder / METRICS]
    try:
        checkpoints.save(run.folder, step, state.ema, stored, files=files, keep=run.keeping.keep)
    except OSError as error:
        message = f"{error.strerror}; {run.last}"
        raise OSError(error.errno, message, error.filename) from error


@contextmanager
def _tracking(run: Run) -> Iterator[list[Tracker]]:
    """Open the run's trackers in the first process; close them at the end."""
    with ExitStack() as opened:
        found = [
            trackers.build(text, run.folder) for text in run.keeping.trackers if parallel.is_first()
        ]
        for tracker in found:
            opened.callback(tracker.close)
        yield found


def _track_picture(run: Run, state: TrainState, step: int, tracking: Sequence[Tracker]) -> None:
    """Give the trackers samples of each class. All processes draw them together."""
    if run.keeping.trackers:
        picture = run.preview.draw(state.ema)
        for tracker in tracking:
            tracker.picture("samples", picture, step)


def _log(run: Run, chunk: Chunk, step: int, bar: tqdm, tracking: Sequence[Tracker]) -> None:
    """Append each step's scalars to the metrics, null where not finite; show the mean loss.

    Raise InputError at a loss or gradient that is not finite, unless such steps are skipped.
    """
    count, length = len(chunk.losses), run.length
    if not count:
        bar.set_postfix_str(f"compiled in {chunk.seconds:.1f} s", refresh=sys.stderr.isatty())
        return
    before, finite = step - count, np.isfinite(chunk.losses)
    require(
        run.keeping.on_nan != "stop" or finite.all(),
        f"the loss or its gradient is not finite in step {before + 1 + int(np.argmin(finite))}: "
        f"try a lower learning rate, --optimizer=adam:clip=1 or --on_nan=skip; {run.last}",
    )
    if parallel.is_first():
        records = [
            {"step": at + 1, "epoch": at * length.batch_size // length.n_images}
            | {k: float(v[i]) if np.isfinite(v[i]) else None for k, v in chunk.scalars.items()}
            for i, at in enumerate(range(before, step))
        ]
        metrics.append(run.folder / METRICS, records)
        for tracker in tracking:
            tracker.scalars(records)
    rate = count * length.batch_size / chunk.seconds
    mean = np.mean(chunk.losses[finite]) if finite.any() else np.nan
    bar.set_postfix_str(f"loss {mean:.4f}, {rate:,.0f} images/s", refresh=False)
    bar.update(count)
