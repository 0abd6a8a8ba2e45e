"""Make the average that a run did not keep, of any width, from the two whose snapshots it stored.

  python -m experiments.train --preset=demo --ema_snapshots=16
  python -m experiments.ema --run=checkpoints/demo --sigma_rel=0.15 --to=checkpoints/wider

Karras et al. 2023, arXiv:2312.02696, section 3.2. The new folder is a run that every app takes.
"""

from pathlib import Path

from absl import flags

from diffusion_jax.runs import check_new, load_config, reconstruct, save_model
from experiments.flags import FLAGS, run

flags.DEFINE_string("run", None, "the run folder, trained with --ema_snapshots")
flags.DEFINE_float("sigma_rel", None, "the width of the average as a part of the run, up to 0.28")
flags.DEFINE_string("to", None, "a new run folder")
flags.DEFINE_integer("step", None, "the snapshot at which the average ends; by default the newest")
flags.DEFINE_integer("cpu_devices", 1, "CPU cores to use as devices")
flags.mark_flags_as_required(["run", "sigma_rel", "to"])


def main() -> None:
    """Solve for the average, and store it as a run."""
    check_new(FLAGS.to)
    found = reconstruct(FLAGS.run, FLAGS.sigma_rel, FLAGS.step)
    settings = load_config(Path(FLAGS.run)).override(
        ema_profile="power", ema_sigma_rel=FLAGS.sigma_rel
    )
    save_model(FLAGS.to, settings, found.variables)
    print(
        f"the average of sigma_rel {FLAGS.sigma_rel} at step {found.step}; "
        f"its weights over the steps are met to {found.error:.2%}"
    )
    print(f"written: {FLAGS.to}")


if __name__ == "__main__":
    run(main)
