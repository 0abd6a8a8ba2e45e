"""Train a diffusion model, on drawn sprites or on images of your own.

  python -m experiments.train --preset=demo --minutes=5
  python -m experiments.train --data=npy:images=sprites.npy:labels=labels.npy --run=checkpoints/mine
  python -m experiments.train --data=folder:path=images:size=16 --run=checkpoints/mine

The run folder holds config.json, the checkpoints, metrics.jsonl and report.html. During training,
preview.png in it shows samples of the moment. The same command continues a run that was stopped.
With --minutes, the learning rate falls over the steps that fit, as they were measured when the run
began. If a flag names the same component as the preset, such as --optimizer=adam:0.001, it changes
only the options that it gives.
"""

from pathlib import Path

from absl import flags

from diffusion_jax import data, parallel
from diffusion_jax.runs import load_model, trackers, trainer
from diffusion_jax.runs.overview import write_run_report
from diffusion_jax.runs.previews import PREVIEW
from diffusion_jax.runs.trainer import Keeping
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args, describe, print_once

SAVES = "epochs between checkpoints; by default 4, or a tenth of all epochs if that is more"
BITS = "use only GPU kernels that give the same bits in every run; they are slower"
MINUTES = "how long to train on these devices, instead of --epochs; compilation counts"
LONGEST = 10**6  # minutes
NAN = "at a step with a loss or gradient that is not finite: stop, or skip the update"
app.define("preset", "devices", "cpu_devices", "processes")
flags.DEFINE_string("run", None, "the run folder; by default checkpoints/PRESET")
flags.DEFINE_integer("save_every", None, SAVES, lower_bound=1)
flags.DEFINE_integer("keep", 3, "the number of newest checkpoints to keep", lower_bound=1)
flags.DEFINE_enum("on_nan", "stop", ["stop", "skip"], NAN)
flags.DEFINE_boolean("deterministic", False, BITS)
app.SHOWN["tracker"] = (trackers.TRACKERS, ("folder",))
flags.DEFINE_multi_string("tracker", [], "where else losses and pictures go")
flags.DEFINE_float("minutes", None, MINUTES)
flags.DEFINE_boolean("report", True, "draw preview.png in training, and write report.html after it")


def main(args: Args) -> None:
    """Train a run to its end, from its last checkpoint or from the start."""
    keeping = Keeping(args.save_every, args.keep, args.on_nan, tuple(args.tracker), args.report)
    minutes = check_minutes(args)
    for text in args.tracker:
        trackers.check(text)
    if args.deterministic:
        parallel.make_deterministic()
    folder = Path(args.run or f"checkpoints/{args.preset}")
    with parallel.sharing_errors(lambda: trainer.checksum(config)):
        config = app.config(args)
        if minutes is not None:  # its epochs are not known yet, unless they are stored
            config = trainer.with_stored_length(folder, config.override(epochs=1))
        dataset = data.load(config.data)
        config = config.fill_in(dataset)
        trainer.check_folder(folder, config)
        devices = parallel.choose_devices(config.batch_size, args.devices)
    length = f"{config.epochs:g} epochs" if minutes is None else f"about {minutes:g} min"
    print_once(
        f"{folder}: {data.describe(dataset)}\n{folder}: "
        f"{length} in batches of {config.batch_size} on {describe(devices)}"
    )
    if args.report:
        print_once(f"look at {folder / PREVIEW} to watch it learn")
    trainer.train_run(folder, config, dataset, devices, keeping, print_once, minutes)
    if args.report:
        print_once(f"report: {write_run_report(folder, load_model(folder), devices)}")


def check_minutes(args: Args) -> float | None:
    """Return --minutes. Raise InputError if it is invalid, or beside --epochs."""
    minutes = args.minutes
    if minutes is not None:
        fits = 0 < minutes <= LONGEST
        require(fits, f"minutes={minutes:g}: it must be above 0, and at most {LONGEST}")
        require(args.epochs is None, f"minutes={minutes:g}: give it or --epochs, not both")
    return minutes


if __name__ == "__main__":
    app.run(main)
