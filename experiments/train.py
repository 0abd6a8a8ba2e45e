"""Train a diffusion model, on drawn sprites or on images of your own.

  python -m experiments.train --preset=demo
  python -m experiments.train --images=sprites.npy --labels=labels.npy --run=checkpoints/mine
  python -m experiments.train --images=folder_with_a_subfolder_for_each_class --image_size=16

The run folder holds config.json, the checkpoints, metrics.jsonl and report.html. The same command
continues a run that was stopped.
"""

import json
import math
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import checkpoints, data, metrics, parallel, training
from diffusion_jax.averages import snapshot_steps
from diffusion_jax.config import Config, at_least
from diffusion_jax.data import Dataset
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
flags.DEFINE_boolean("report", True, "sample from the model at the end, and write report.html")


def main() -> None:
    """Train a run to its end, from wherever it stands."""
    at_least("keep", FLAGS.keep, 1)
    if FLAGS.save_every is not None:
        at_least("save_every", FLAGS.save_every, 1)
    folder = Path(FLAGS.run or f"checkpoints/{FLAGS.preset}")
    with parallel.alike(lambda: checksum(settings, dataset)):
        dataset = data.load(config().data)
        settings = fill_in(config(), dataset)
        check_folder(folder, settings)
        devices = parallel.choose_devices(settings.training.batch_size, FLAGS.devices)
    length = Length(len(dataset.images), settings.training.batch_size, settings.training.epochs)
    say(
        f"{folder}: {len(dataset.images)} images of {', '.join(dataset.class_names)}; "
        f"{length.steps} steps of {length.batch_size} on {describe(devices)}"
    )
    with parallel.alike():
        if parallel.is_first():
            checkpoints.write_config(folder, settings.to_dict())
    with checkpoints.open_checkpoints(folder, FLAGS.keep) as manager:
        state = resume(folder, manager, settings, length, devices)
        if int(state.step) == length.steps:
            say(f"{folder} is complete: {length.steps} steps")
        else:
            train(folder, manager, settings, dataset, state, devices, length)
    if FLAGS.report:
        say(f"report: {write_run_report(folder, load_model(folder), devices)}")


def fill_in(settings: Config, dataset: Dataset) -> Config:
    """The configuration with what the data decides. Raises InputError if the two do not fit."""
    if length_in_bits(len(dataset.images), settings) > 31:
        raise InputError(f"epochs={settings.training.epochs}: too many for int32 step counters")
    return settings.override(
        height=dataset.images.shape[1],
        in_channels=dataset.images.shape[3],
        n_cfeat=dataset.labels.shape[1],
        class_names=dataset.class_names,
    )


def checksum(settings: Config, dataset: Dataset) -> int:
    """A number that tells whether the processes of a job have the same settings and data."""
    settings_sum = zlib.crc32(json.dumps(settings.to_dict()).encode())
    return zlib.crc32(dataset.labels.tobytes(), zlib.crc32(dataset.images.tobytes(), settings_sum))


def length_in_bits(n_images: int, settings: Config) -> float:
    """The bits that the number of all images seen takes."""
    return math.log2(n_images * settings.training.epochs + settings.training.batch_size)


def check_folder(folder: Path, settings: Config) -> None:
    """Raise InputError unless folder is new, empty, or a run of the same configuration."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / checkpoints.CONFIG).is_file():
        raise InputError(f"run={str(folder)!r} exists and is not a run: name another folder")
    if differences := load_config(folder).differences(settings):
        raise InputError(
            f"run={str(folder)!r} was started with another configuration: "
            f"{'; '.join(differences)}. Name another folder with --run, or the old settings"
        )


def resume(
    folder: Path, manager: Any, settings: Config, length: Length, devices: list[jax.Device]
) -> TrainState:
    """The state of the newest checkpoint, or a new one."""
    state = training.init(settings, length)
    step = manager.latest_step()
    with parallel.alike():
        if parallel.is_first():
            metrics.truncate(folder / "metrics.jsonl", step or 0)
    if step is None:
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parallel.replicate(0, devices))
    shapes = checkpoints.template(state, shardings)
    stored = shapes.without_model()
    items = checkpoints.restore(manager, step, model=shapes.ema, training=stored)
    say(f"continuing from step {step}")
    return TrainState(**items["training"])._replace(ema=items["model"])


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
    shown = {"unit": "step", "desc": "training", "disable": not parallel.is_first()}
    with tqdm(total=length.steps, initial=int(state.step), **shown) as bar:
        for chunk in training.fit(
            settings, dataset.images, dataset.labels, state, devices, stops=saves | snapshots
        ):
            step = int(chunk.state.step)
            log(folder, chunk, step, length, bar)
            if step in snapshots and len(chunk.losses):  # before a checkpoint that follows it
                checkpoints.save_averages(folder, step, chunk.state.averages)
            if step in saves and len(chunk.losses):
                checkpoints.save(manager, step, chunk.state.ema, chunk.state.without_model())
                manager.wait_until_finished()
    say(f"{length.steps} steps in {time.perf_counter() - begin:.0f} s")


def log(folder: Path, chunk: Chunk, step: int, length: Length, bar: tqdm) -> None:
    """Append each step's loss to metrics.jsonl, and show the last one in the bar."""
    count = len(chunk.losses)
    if not count:
        bar.set_postfix_str(f"compiled in {chunk.seconds:.1f} s")
        return
    if not np.all(np.isfinite(chunk.losses)):
        raise InputError(
            f"the loss is not finite within steps {step - count + 1}..{step}: "
            "try a lower --learning_rate or --grad_clip=1; the last checkpoint stands"
        )
    epoch = [(step - count + i) * length.batch_size // length.n_images for i in range(count)]
    records = [
        {"step": step - count + 1 + i, "epoch": epoch[i], "loss": float(loss)}
        for i, loss in enumerate(chunk.losses)
    ]
    if parallel.is_first():
        metrics.append(folder / "metrics.jsonl", records)
    rate = count * length.batch_size / chunk.seconds
    bar.update(count)
    bar.set_postfix_str(f"loss {np.mean(chunk.losses):.4f}, {rate:,.0f} images/s")


if __name__ == "__main__":
    run(main)
