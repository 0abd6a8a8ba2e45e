"""Measure the quality of samples from a trained run.

  python -m experiments.evaluate --sampler=ddim:25
  python -m experiments.evaluate --sampler=ddpm --n=2000 --guidance=2
  python -m experiments.evaluate --samples=samples.npy

The app prints each measure with its standard error, beside the same measure of real images. It
writes RUN/evaluation/NAME.json and .html, where NAME is the sampler and the flags that differ from
their defaults. The classifier whose features are compared is trained at first use and stored as
RUN/evaluation/classifier.npz.

The contexts of the samples are the labels of the real images that they are compared with, so both
sets have the same proportions of classes.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion_jax import evaluation, samplers
from diffusion_jax.data import load_npy
from diffusion_jax.evaluation import LEAST, MOST, Real, Row, classifier
from diffusion_jax.files import read_json, write_atomically
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import environment, load_config, load_model
from diffusion_jax.runs.config import Config
from diffusion_jax.runs.reports import Section, gallery, table, write_report
from diffusion_jax.typing import InputError, check_seed, require
from experiments import app
from experiments.app import Args, describe, say

EACH = 16  # images in a row of the report
ROWS = 32  # the most classes in the report
VARIED = ("step", "guidance", "threshold", "n", "seed", "real_n")  # change the results

app.define_run()
app.define_sampler()
app.define_guidance()
app.define_devices()
flags.DEFINE_string("data", None, "the real images, in place of those that the run was trained on")
flags.DEFINE_string("samples", None, "measure this .npy file of images instead of drawing any")
flags.DEFINE_integer("n", 5000, f"samples to draw, {LEAST} to {MOST}")
flags.DEFINE_integer("real_n", 5000, f"real images in each of two sets, {LEAST} to {MOST}")
flags.DEFINE_integer("batch_size", 500, "images sampled at once")
flags.DEFINE_integer("seed", 0, "the seed of the samples")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/evaluation")
flags.DEFINE_string("name", None, "the files' name; by default of the settings, or the file's")


def main(args: Args) -> None:
    """Draw or read samples, measure them, and write the results."""
    folder = Path(args.run)
    config = load_config(folder)
    out = app.output_folder(args.out, folder / "evaluation")
    count = args.devices
    devices = jax.local_devices() if count is None else choose_devices(max(count, 1), count)
    data, known = (args.data, ()) if args.data else (config.data, config.fingerprint)
    real = evaluation.real_images(data, args.real_n, known=known)
    evaluation.check_shape(real, config.image_shape, config.n_cfeat)
    draw = read if args.samples else sample
    name, settings, drawn = draw(args, config, real, devices)
    settings |= {"run": args.run, "data": data, "real_n": args.real_n}
    require(Path(name).name == name, f"name={name!r}: it must be a file's name, without a folder")
    check_name(out / f"{name}.json", settings)
    args.refuse_unread("--samples")
    print(f"{folder}, {name}: {describe(devices)}; real images: {real.origin}", flush=True)
    begin = time.perf_counter()
    images, labels = drawn()
    seconds = {"sampling": time.perf_counter() - begin}
    params = classifier.obtain(out / "classifier.npz", real.teaching, devices, say)
    begin = time.perf_counter()
    measured, near = evaluation.evaluate(images, labels, real, params, devices)
    seconds["measuring"] = time.perf_counter() - begin
    show(measured, seconds)
    record = {
        "measures": {
            k: {s: v._asdict() for s, v in r._asdict().items()} for k, r in measured.items()
        },
        "real": real.origin,
        "seconds": seconds,
        "settings": settings,
        "devices": describe(devices),
        "versions": environment.versions(),
    }
    write_atomically(out / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())
    title = f"{args.run}, {name}"
    report(out / f"{name}.html", title, images, real, measured, near, labels)
    print(f"written: {out / name}.json, {out / name}.html")


def sample(args: Args, config: Config, real: Real, devices: Any) -> tuple[str, dict, Any]:
    """Return a name, the settings that determine the results, and a function that draws samples."""
    schedule = config.build_schedule()
    spec = samplers.parse(args.sampler, schedule)
    tableau = samplers.build(spec, schedule)
    options = app.check_guidance(args, config) | {"seed": check_seed(args.seed)}
    n, batch = args.n, args.batch_size
    require(LEAST <= n <= MOST, f"n={n}: it must be in {LEAST}..{MOST}")
    require(1 <= batch <= 2**16, f"batch_size={batch}: it must be in 1..65536")
    settings = {"sampler": str(spec)} | {name: getattr(args, name) for name in VARIED}
    model, labels = load_model(args.run, args.step), real.reference.labels
    name = args.name or app.variant(spec.slug, args, *VARIED)
    return (
        name,
        settings,
        lambda: evaluation.draw_like(
            model, tableau, labels, n, devices, batch_size=batch, **options
        ),
    )


def read(args: Args, config: Config, real: Real, devices: Any) -> tuple[str, dict, Any]:
    """Return a name, the settings, and a function that gives the images of --samples in uint8."""
    images = load_npy(args.samples)
    evaluation.check_samples(images, config.image_shape, f"samples={args.samples}")
    name = args.name or Path(args.samples).stem
    return name, {"samples": args.samples}, lambda: (evaluation.to_pixels(images), None)


def check_name(path: Path, settings: dict[str, Any]) -> None:
    """Raise InputError if the file holds results of different settings."""
    stored = None
    with suppress(OSError, InputError, LookupError, TypeError):
        stored = read_json(path)["settings"]
    same = stored is None or stored == json.loads(json.dumps(settings))
    require(same, f"{path} holds results of other settings: give another --name, or remove it")


def show(measured: dict[str, Row], seconds: dict[str, float]) -> None:
    """Print a table of the measures."""
    print(f"{'measure':28} {'samples':>22}  {'real against real':>22}")
    for name, row in measured.items():
        print(f"{name:28} {row.samples!s:>22}  {row.real!s:>22}")
    print(", ".join(f"{what}: {value:.1f} s" for what, value in seconds.items()))


def report(
    path: Path,
    title: str,
    images: np.ndarray,
    real: Real,
    measured: dict[str, Row],
    near: Any,
    labels: np.ndarray | None,
) -> None:
    """Write the report: measures, samples by class, and samples nearest to training images."""
    rows = {"samples": images[: 4 * EACH]}
    if labels is not None and classifier.has_classes(real.reference):
        owner = labels.argmax(1)
        rows = {
            label: images[owner == number][:EACH]
            for number, label in enumerate(real.reference.class_names[:ROWS])
            if np.any(owner == number)
        }
    numbers = {
        "samples": {label: row.samples for label, row in measured.items()},
        "real against real": {label: row.real for label, row in measured.items()},
    }
    sections = [
        Section("Measures, with standard errors", table(numbers)),
        Section("Samples", gallery(rows, columns=EACH)),
    ]
    if real.seen is not None:
        chosen = np.argsort(near.distances[:, 0])[:EACH]
        pairs = {"samples": images[chosen], "training": real.seen.images[near.indices[chosen, 0]]}
        heading = "The samples nearest to training images"
        sections.append(Section(heading, gallery(pairs, columns=EACH)))
    summary = {"samples": len(images), "real images": real.origin}
    write_report(path, title=title, summary=summary, sections=sections)


if __name__ == "__main__":
    app.run(main)
