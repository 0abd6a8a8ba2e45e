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

import numpy as np
from absl import flags

from diffusion_jax import evaluation, samplers
from diffusion_jax.evaluation import LEAST, MOST, RealImages, classifier
from diffusion_jax.files import load_npy, read_json, write_atomically
from diffusion_jax.runs import environment, load_config, load_model
from diffusion_jax.runs.config import Config
from diffusion_jax.runs.reports import Section, gallery, table, write_report
from diffusion_jax.typing import InputError, require
from experiments import app, tables
from experiments.app import Args, describe, print_once

EACH = 16  # images in a row of the report
ROWS = 32  # the most classes in the report
VARIED = ("step", "guidance", "threshold", "n", "seed", "real_n")  # change the results

app.define("run", "step", "sampler", "guidance", "threshold", "devices", "cpu_devices")
flags.DEFINE_string("data", None, "the real images; by default those of the run's data")
flags.DEFINE_string("samples", None, "a .npy file of images to measure instead of new samples")
flags.DEFINE_integer("n", 5000, f"samples to draw, {LEAST} to {MOST}", LEAST, MOST)
flags.DEFINE_integer("real_n", 5000, f"images in each of two real sets, from {LEAST}", LEAST, MOST)
flags.DEFINE_integer("batch_size", 500, "images sampled at once", 1, 2**16)
app.define_seed("the seed of the samples")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/evaluation")
flags.DEFINE_string("name", None, "the name of the files; by default the settings")


def main(args: Args) -> None:
    """Draw or read samples, measure them, and write the results."""
    folder = Path(args.run)
    config = load_config(folder)
    out = app.output_folder(args.out, folder / "evaluation")
    devices = app.devices(args)
    data, known = (args.data, ()) if args.data else (config.data, config.fingerprint)
    real = evaluation.real_images(data, args.real_n, known=known)
    evaluation.check_shape(real, config.image_shape, config.n_cfeat)
    plan = read if args.samples else sample
    name, settings, draw = plan(args, config, real, devices)
    settings |= {"run": args.run, "data": data, "real_n": args.real_n}
    require(Path(name).name == name, f"name={name!r}: it must be a file's name, without a folder")
    check_name(out / f"{name}.json", settings)
    args.refuse_unread("--samples")
    print(f"{folder}, {name}: {describe(devices)}; real images: {real.origin}", flush=True)
    begin = time.perf_counter()
    images, labels = draw()
    seconds = {"sampling": time.perf_counter() - begin}
    params = classifier.obtain(out / "classifier.npz", real.teaching, devices, print_once)
    begin = time.perf_counter()
    measured, near = evaluation.measure_against(real, params, devices)(images, labels)
    seconds["measuring"] = time.perf_counter() - begin
    columns = {
        "samples": {k: row.samples for k, row in measured.items()},
        "real against real": {k: row.real for k, row in measured.items()},
    }
    print(tables.table([{"measure": k} | {c: columns[c][k] for c in columns} for k in measured]))
    print(", ".join(f"{what}: {value:.1f} s" for what, value in seconds.items()))
    record = {
        "measures": {
            k: {side: {"value": v.value, "error": v.error} for side, v in row._asdict().items()}
            for k, row in measured.items()
        },
        "real": real.origin,
        "seconds": seconds,
        "settings": settings,
        "devices": describe(devices),
        "versions": environment.versions(),
    }
    write_atomically(out / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())
    measures = Section("Measures, with standard errors", table(columns))
    sections = [measures, *galleries(images, labels, real, near)]
    summary = {"samples": len(images), "real images": real.origin}
    title = f"{args.run}, {name}"
    write_report(out / f"{name}.html", title=title, summary=summary, sections=sections)
    print(f"written: {out / name}.json, {out / name}.html")


def sample(args: Args, config: Config, real: RealImages, devices: Any) -> tuple[str, dict, Any]:
    """Return a name, the settings that determine the results, and a function that draws samples."""
    schedule = config.build_schedule()
    spec = samplers.parse(args.sampler, schedule)
    tableau, labels = samplers.build(spec, schedule), real.reference.labels
    options = app.check_guidance(args, config)
    options |= {"seed": args.seed, "batch_size": args.batch_size}
    settings = {"sampler": str(spec)} | {name: getattr(args, name) for name in VARIED}
    model, n = load_model(args.run, args.step), args.n
    name = args.name or app.variant(spec.slug, args, *VARIED)
    draw = evaluation.draw_like
    return name, settings, lambda: draw(model, tableau, labels, n, devices, **options)


def read(args: Args, config: Config, real: RealImages, devices: Any) -> tuple[str, dict, Any]:
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
    require(
        same, f"{path} holds results of different settings: give a different --name, or remove it"
    )


def galleries(images: np.ndarray, labels: Any, real: RealImages, near: Any) -> list[Section]:
    """Return the samples by class, and the samples nearest to training images."""
    rows = {"samples": images[: 4 * EACH]}
    if labels is not None and classifier.has_classes(real.reference):
        names, owner = real.reference.class_names[:ROWS], labels.argmax(1)
        found = {name: images[owner == number][:EACH] for number, name in enumerate(names)}
        rows = {name: part for name, part in found.items() if len(part)}
    sections = [Section("Samples", gallery(rows, columns=EACH))]
    if real.seen is not None:
        chosen = np.argsort(near.distances[:, 0])[:EACH]
        pairs = {"samples": images[chosen], "training": real.seen.images[near.indices[chosen, 0]]}
        heading = "The samples nearest to training images"
        sections.append(Section(heading, gallery(pairs, columns=EACH)))
    return sections


if __name__ == "__main__":
    app.run(main)
