"""Train a diffusion model, on drawn sprites or on images of your own.

  python -m experiments.train --preset=demo
  python -m experiments.train --data=npy:images=sprites.npy:labels=labels.npy --run=checkpoints/mine
  python -m experiments.train --data=folder:path=images:size=16 --run=checkpoints/mine

The run folder holds config.json, the checkpoints, metrics.jsonl and report.html. The same command
continues a run that was stopped.
"""

from pathlib import Path

from absl import flags

from diffusion_jax import data, parallel
from diffusion_jax.runs import load_model, trainer
from diffusion_jax.runs.overview import write_run_report
from diffusion_jax.runs.trainer import Keeping
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args, describe, say

app.define_config()
app.define_devices()
app.define_processes()
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
    "have GPUs take kernels that give the same bits each time, slower ones; CPUs and TPUs have no "
    "others",
)
flags.DEFINE_boolean("report", True, "sample from the model at the end, and write report.html")


def main(args: Args) -> None:
    """Train a run to its end, from its last checkpoint or from the start."""
    keeping = Keeping(args.save_every, args.keep, args.on_nan)
    require(args.keep >= 1, f"keep={args.keep}: it must be at least 1")
    every = args.save_every is None or args.save_every >= 1
    require(every, f"save_every={args.save_every}: it must be at least 1")
    if args.deterministic:
        parallel.make_deterministic()
    folder = Path(args.run or f"checkpoints/{args.preset}")
    with parallel.alike(lambda: trainer.checksum(config)):
        config = app.config(args)
        dataset = data.load(config.data)
        config = config.fill_in(dataset)
        trainer.check_folder(folder, config)
        devices = parallel.choose_devices(config.batch_size, args.devices)
    say(
        f"{folder}: {len(dataset.images)} images of {', '.join(dataset.class_names)}; "
        f"{config.epochs} epochs in batches of {config.batch_size} on {describe(devices)}"
    )
    trainer.train_run(folder, config, dataset, devices, keeping, say)
    if args.report:
        say(f"report: {write_run_report(folder, load_model(folder), devices)}")


if __name__ == "__main__":
    app.run(main)
