"""Measure how likely held-out images are to a trained run, in bits per dimension.

  python -m experiments.likelihood --n=256
  python -m experiments.likelihood --by=bound --n=1000

By the probability flow, whose ODE diffrax solves, for pixels dequantised by uniform noise, and by
the variational bound of DDPM at every step of the schedule; each of an image given its label.
Prints the means over images with their standard errors, and writes RUN/evaluation/likelihood.json.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import evaluation
from diffusion_jax.config import at_least, at_most
from diffusion_jax.data import Dataset
from diffusion_jax.evaluation import LEAST, MOST
from diffusion_jax.evaluation.estimate import Estimate, mean
from diffusion_jax.evaluation.likelihood import diffrax
from diffusion_jax.files import write_atomically
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import Model, load_model
from diffusion_jax.typing import require
from experiments.flags import FLAGS, define_devices, define_run, describe, output_folder, run

WAYS = {
    "bound": "variational bound, whole grey levels",
    "flow": "probability flow, dequantised uniformly",
}
RECORDED = ("run", "step", "by", "n", "probes", "seed")

define_devices()
define_run()
flags.DEFINE_list("by", list(WAYS), "the ways: bound, flow, or both")
flags.DEFINE_integer("n", 256, "held-out images, at least 2")
flags.DEFINE_integer("probes", 1, "random vectors that estimate a trace in the flow")
flags.DEFINE_integer("batch_size", 128, "images at once")
flags.DEFINE_integer("seed", 0, "the seed of all noise")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/evaluation")


def main() -> None:
    """Measure held-out images, write what came of it."""
    for name, least, most in (("n", 2, MOST), ("probes", 1, 1000), ("batch_size", 1, 2**16)):
        at_least(name, FLAGS.get_flag_value(name, 0), least)
        at_most(name, FLAGS.get_flag_value(name, 0), most)
    require(0 <= FLAGS.seed < 2**32, f"seed={FLAGS.seed}: it must be in 0..{2**32 - 1}")
    unknown = [way for way in FLAGS.by if way not in WAYS]
    require(FLAGS.by and not unknown, f"by={','.join(FLAGS.by)}: choose from {', '.join(WAYS)}")
    if "flow" in FLAGS.by:
        diffrax()  # or say at once that it is missing
    out = output_folder("out", Path(FLAGS.run) / "evaluation")
    model = load_model(FLAGS.run, FLAGS.step)
    count = FLAGS.devices
    devices = jax.local_devices() if count is None else choose_devices(max(count, 1), count)
    held_out = evaluation.real_images(model.config.data, max(FLAGS.n, LEAST))
    evaluation.check_shape(model.config, held_out)
    print(f"{FLAGS.run}: {describe(devices)}; {held_out.origin}", flush=True)
    found = {way: measure(way, model, held_out.other, devices) for way in dict.fromkeys(FLAGS.by)}
    record = {
        "bits per dimension": {WAYS[way]: value._asdict() for way, value in found.items()},
        "images": held_out.origin,
        "flags": {flag: FLAGS[flag].value for flag in RECORDED},
    }
    path = out / "likelihood.json"
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    print(f"written: {path}")


def measure(way: str, model: Model, held_out: Dataset, devices: Sequence[jax.Device]) -> Estimate:
    """The mean over the images, printed."""
    images, labels = held_out.images[: FLAGS.n], held_out.labels[: FLAGS.n]
    begin = time.perf_counter()
    with tqdm(total=len(images), unit="image", desc=way) as bar:
        bits = evaluation.bits_per_dim(
            model,
            images,
            None if model.config.data.null_context else labels,
            devices,
            by=way,
            probes=FLAGS.probes,
            seed=FLAGS.seed,
            chunk=max(1, min(FLAGS.batch_size, len(images)) // len(devices)),
            progress=bar.update,
        )
    require(np.all(np.isfinite(bits)), f"run={FLAGS.run}: the {way} gives no finite numbers")
    seconds = time.perf_counter() - begin
    found = mean(bits)
    print(f"{WAYS[way]}: {found} bits/dim, {len(images)} images, {seconds:.1f} s", flush=True)
    return found


if __name__ == "__main__":
    run(main)
