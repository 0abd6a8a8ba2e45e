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

import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import evaluation
from diffusion_jax.evaluation import LEAST, MOST
from diffusion_jax.evaluation.estimate import mean
from diffusion_jax.files import write_atomically
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.typing import import_extra, require
from experiments import app
from experiments.app import Args, describe

WAYS = {
    "bound": "variational bound, whole grey levels",
    "flow": "probability flow, dequantised uniformly",
}

app.define("run", "step", "devices", "cpu_devices")
flags.DEFINE_list("by", list(WAYS), "how to measure: bound, flow, or both")
flags.DEFINE_integer("n", 256, f"how many held-out images, 2 to {MOST}", 2, MOST)
flags.DEFINE_integer("probes", 1, "random vectors for the trace in the flow, 1 to 1000", 1, 1000)
flags.DEFINE_integer("batch_size", 128, "images at once", 1, 2**16)
app.define_seed("the seed of all noise")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/evaluation")


def main(args: Args) -> None:
    """Measure held-out images, and write the results."""
    unknown = [way for way in args.by if way not in WAYS]
    require(args.by and not unknown, f"by={','.join(args.by)}: choose from {', '.join(WAYS)}")
    if "flow" in args.by:
        import_extra("diffrax", "likelihood")  # report at once if it is missing
    out = app.output_folder(args.out, Path(args.run) / "evaluation")
    config, model = load_config(Path(args.run)), load_model(args.run, args.step)
    devices = app.devices(args)
    real = evaluation.real_images(config.data, max(args.n, LEAST), known=config.fingerprint)
    evaluation.check_shape(real, config.image_shape, config.n_cfeat)
    print(f"{args.run}: {describe(devices)}; {real.origin}", flush=True)
    images, found = real.other.images[: args.n], {}
    labels = real.other.labels[: args.n] if model.class_names else None
    chunk = max(1, min(args.batch_size, args.n) // len(devices))
    for way in dict.fromkeys(args.by):
        begin = time.perf_counter()
        with tqdm(total=len(images), unit="image", desc=way) as bar:
            options = {"probes": args.probes, "seed": args.seed, "chunk": chunk}
            options["progress"] = bar.update
            bits = evaluation.bits_per_dim(model, images, labels, devices, by=way, **options)
        require(np.all(np.isfinite(bits)), f"run={args.run}: the {way} gives no finite numbers")
        found[WAYS[way]], seconds = mean(bits), time.perf_counter() - begin
        about = f"{mean(bits)} bits/dim, {len(images)} images, {seconds:.1f} s"
        print(f"{WAYS[way]}: {about}", flush=True)
    settings = {name: getattr(args, name) for name in ("run", "step", "n", "probes", "seed")}
    record = {
        "bits per dimension": {
            way: {"value": bits.value, "error": bits.error} for way, bits in found.items()
        },
        "images": real.origin,
        "settings": settings,
    }
    path = out / "likelihood.json"
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    print(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
