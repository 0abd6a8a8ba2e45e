"""Write a run and a sampler as one file, which samples wherever there is JAX, without this library.

  python -m experiments.export --sampler=ddim --steps=25 --to=demo.sampler

README.md shows how the file is checked, loaded and called. The file is a program: load only files
whose writer you trust.
"""

from pathlib import Path

from absl import flags

from diffusion_jax.exporting import PLATFORMS, check_new, export_sampler, write_sampler
from diffusion_jax.precisions import PRECISIONS
from diffusion_jax.runs import load_config, load_model
from experiments.flags import FLAGS, define_run, define_sampler, run, tableau

define_run()
define_sampler(steps="25")
FLAGS.set_default("steps", 25)
flags.DEFINE_boolean("guidance", False, "take the scale of guidance as a third argument")
flags.DEFINE_enum("dtype", "float32", list(PRECISIONS), "what the network computes in")
flags.DEFINE_multi_enum(
    "platforms", list(PLATFORMS), ["cpu", "cuda", "rocm", "tpu"], "what the file can run on"
)
flags.DEFINE_string("to", None, "the new file")
flags.DEFINE_integer("cpu_devices", 1, "CPU cores to use as devices")
flags.mark_flag_as_required("to")


def main() -> None:
    """Export a run's model with a tableau."""
    target = check_new(FLAGS.to)
    schedule = load_config(Path(FLAGS.run)).diffusion.build()
    _, table = tableau(schedule, FLAGS.sampler, FLAGS.steps)
    model = load_model(FLAGS.run, FLAGS.step)
    sampler = export_sampler(
        model, table, guidance=FLAGS.guidance, dtype=FLAGS.dtype, platforms=FLAGS.platforms
    )
    digest = write_sampler(target, sampler)
    arguments = "seed, context, guidance" if FLAGS.guidance else "seed, context"
    print(f"written: {target}, a function of ({arguments}) on {', '.join(FLAGS.platforms)}")
    print(f"SHA-256, also in {target}.sha256: {digest}")


if __name__ == "__main__":
    run(main)
