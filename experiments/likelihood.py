"""Measure how likely held-out images are to a trained run, in bits per dimension.

  python -m experiments.likelihood --n=256
  python -m experiments.likelihood --by=bound --n=1000

The app has two ways. One is the probability flow, whose ODE diffrax solves, for pixels dequantised
by uniform noise. The other is the variational bound of DDPM at every step of the schedule. Both
give the likelihood of an image given its label. The app prints means over images with their
standard errors, and writes RUN/evaluation/likelihood.json.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import evaluation
from diffusion_jax.evaluation import LEAST, MOST
from diffusion_jax.evaluation.estimate import mean
from diffusion_jax.evaluation.likelihood import diffrax
from diffusion_jax.files import write_atomically
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.typing import check_seed, require
from experiments import app
from experiments.app import Args, describe

WAYS = {
    "bound": "variational bound, whole grey levels",
    "flow": "probability flow, dequantised uniformly",
}
BOUNDS = {"n": (2, MOST), "probes": (1, 1000), "batch_size": (1, 2**16)}

app.define_run()
app.define_devices()
flags.DEFINE_list("by", list(WAYS), "the ways: bound, flow, or both")
flags.DEFINE_integer("n", 256, "held-out images, at least 2")
flags.DEFINE_integer("probes", 1, "random vectors that estimate a trace in the flow")
flags.DEFINE_integer("batch_size", 128, "images at once")
flags.DEFINE_integer("seed", 0, "the seed of all noise")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/evaluation")


def main(args: Args) -> None:
    """Measure held-out images, and write the results."""
    n, probes, batch = (getattr(args, name) for name in BOUNDS)
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        require(least <= value <= most, f"{name}={value}: it must be in {least}..{most}")
    seed = check_seed(args.seed)
    unknown = [way for way in args.by if way not in WAYS]
    require(args.by and not unknown, f"by={','.join(args.by)}: choose from {', '.join(WAYS)}")
    if "flow" in args.by:
        diffrax()  # report at once if it is missing
    out = app.output_folder(args.out, Path(args.run) / "evaluation")
    config, model = load_config(Path(args.run)), load_model(args.run, args.step)
    count = args.devices
    devices = jax.local_devices() if count is None else choose_devices(max(count, 1), count)
    real = evaluation.real_images(config.data, max(n, LEAST), known=config.fingerprint)
    evaluation.check_shape(real, config.image_shape, config.n_cfeat)
    print(f"{args.run}: {describe(devices)}; {real.origin}", flush=True)
    images, found = real.other.images[:n], {}
    labels = real.other.labels[:n] if model.class_names else None
    options = {"probes": probes, "seed": seed, "chunk": max(1, min(batch, n) // len(devices))}
    for way in dict.fromkeys(args.by):
        begin = time.perf_counter()
        with tqdm(total=len(images), unit="image", desc=way) as bar:
            options["progress"] = bar.update
            bits = evaluation.bits_per_dim(model, images, labels, devices, by=way, **options)
        require(np.all(np.isfinite(bits)), f"run={args.run}: the {way} gives no finite numbers")
        found[way], seconds = mean(bits), time.perf_counter() - begin
        about = f"{found[way]} bits/dim, {len(images)} images, {seconds:.1f} s"
        print(f"{WAYS[way]}: {about}", flush=True)
    record = {
        "bits per dimension": {WAYS[way]: value._asdict() for way, value in found.items()},
        "images": real.origin,
        "settings": {"run": args.run, "step": args.step, "n": n, "probes": probes, "seed": seed},
    }
    path = out / "likelihood.json"
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    print(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
