"""Measure the quality of samples from a trained run.

  python -m experiments.evaluate --sampler=ddim --steps=25
  python -m experiments.evaluate --sampler=ddpm --n=2000 --guidance=2
  python -m experiments.evaluate --samples=samples.npy

Prints each measure with its standard error, beside what real images get against other real ones;
writes RUN/evaluation/NAME.json and .html, where NAME is SAMPLER-STEPS and what else is not the
default. The classifier whose features are compared is trained on first use and kept as
RUN/evaluation/classifier.npz.

Contexts of the samples are the labels of the real images that they are held against, so that both
sets have the same proportions of classes.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import environment, evaluation
from diffusion_jax.config import Config, at_least, at_most
from diffusion_jax.data import load_npy
from diffusion_jax.evaluation import LEAST, MOST, Real, Row, classifier
from diffusion_jax.files import read_json, write_atomically
from diffusion_jax.parallel import choose_devices
from diffusion_jax.reports import Section, gallery, table, write_report
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling import sample
from diffusion_jax.typing import InputError, require
from experiments.flags import (
    FLAGS,
    define_devices,
    define_guidance,
    define_run,
    define_sampler,
    describe,
    guidance,
    output_folder,
    refuse_unread,
    run,
    say,
    tableau,
    variant,
)

EACH = 16  # images of a row in the report
ROWS = 32  # classes in the report
CHANGING = (  # flags of drawing that are in the name where they are not the default
    *("step", "grid", "options", "guidance", "guidance_interval", "guidance_rescale"),
    *("cfg_plus_plus", "autoguidance", "autoguidance_step", "threshold", "n", "seed"),
)
DRAWING = ("sampler", "steps", *CHANGING)

define_devices()
define_guidance()
define_run()
define_sampler()
flags.DEFINE_integer("n", 5000, f"samples to draw, at least {LEAST}")
flags.DEFINE_integer("real_n", 5000, f"real images in each of two sets, at least {LEAST}")
flags.DEFINE_string("samples", None, "measure this .npy file of images instead of drawing any")
flags.DEFINE_integer("batch_size", 500, "images sampled at once")
flags.DEFINE_integer("seed", 0, "the seed of the samples")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/evaluation")
flags.DEFINE_string("name", None, "the files' name; by default of the settings, or the file's")


def main() -> None:
    """Draw or read samples, measure them, write what came of it."""
    folder = Path(FLAGS.run)
    config = load_config(folder)
    check()
    wrappers = guidance(config)
    name, sampler = plan(config)
    out = output_folder("out", folder / "evaluation")
    check_name(out / f"{name}.json")
    given = read_samples(config) if FLAGS.samples else None
    model = None if FLAGS.samples else load_model(folder, FLAGS.step)
    count = FLAGS.devices
    devices = jax.local_devices() if count is None else choose_devices(max(count, 1), count)
    real = evaluation.real_images(config.data, FLAGS.real_n)
    evaluation.check_shape(config, real)
    print(f"{folder}, {name}: {describe(devices)}; real images: {real.origin}", flush=True)
    labels, seconds = None, {}
    begin = time.perf_counter()
    if given is None:
        labels = real.reference.labels[np.arange(FLAGS.n) % len(real.reference.labels)]
        images = draw(model, sampler, labels, devices, wrappers)
        seconds["sampling"] = time.perf_counter() - begin
    else:
        images = given
    params = classifier.obtain(out / "classifier.npz", real.teaching, devices, say)
    begin = time.perf_counter()
    measured, near = evaluation.evaluate(
        images, None if config.data.null_context else labels, real, params, devices
    )
    seconds["measuring"] = time.perf_counter() - begin
    show(measured, seconds)
    write(out, name, measured, seconds, devices, real)
    report(out / f"{name}.html", name, images, real, measured, near, labels)
    print(f"written: {out / name}.json, {out / name}.html")


def check() -> None:
    """Raise InputError for flags that are out of range, or of no effect."""
    if FLAGS.samples:
        refuse_unread("--samples, which are not drawn here,", *DRAWING, "batch_size")
    bounds = (("n", LEAST, MOST), ("real_n", LEAST, MOST), ("batch_size", 1, 2**16))
    for name, least, most in bounds:
        at_least(name, FLAGS.get_flag_value(name, 0), least)
        at_most(name, FLAGS.get_flag_value(name, 0), most)
    require(0 <= FLAGS.seed < 2**32, f"seed={FLAGS.seed}: it must be in 0..{2**32 - 1}")


def plan(config: Config) -> tuple[str, Tableau]:
    """The name of the files and the sampler's table. Raises InputError for what cannot be."""
    label, table = tableau(config.diffusion.build(), FLAGS.sampler, FLAGS.steps)
    label = variant(label, *CHANGING, "real_n")
    name = FLAGS.name or (Path(FLAGS.samples).stem if FLAGS.samples else label)
    require(Path(name).name == name, f"name={name!r}: it must be a file's name, without a folder")
    return name, table


def settings() -> dict[str, Any]:
    """The flags that decide the results."""
    names = ("run", "real_n", *(("samples",) if FLAGS.samples else DRAWING))
    return {name: FLAGS[name].value for name in names}


def check_name(path: Path) -> None:
    """Raise InputError if the results of other settings, of which it knows, are stored there."""
    stored = None
    with suppress(OSError, InputError, LookupError, TypeError):
        stored = read_json(path)["flags"]
    same = stored is None or stored == json.loads(json.dumps(settings()))
    require(same, f"{path} holds results of other settings: give another --name, or remove it")


def read_samples(config: Config) -> np.ndarray:
    """The images of --samples, in uint8. Raises InputError for what cannot be measured."""
    images = load_npy(FLAGS.samples)
    evaluation.check_samples(images, config.network.image_shape, f"samples={FLAGS.samples}")
    return evaluation.to_pixels(images)


def draw(
    model: Any,
    sampler: Tableau,
    labels: np.ndarray,
    devices: Sequence[jax.Device],
    wrappers: dict[str, Any],
) -> Any:
    """Samples in uint8, image i of the context labels[i]."""
    context = None if model.config.data.null_context else labels
    with tqdm(total=FLAGS.n, unit="image", desc="sampling") as bar:
        images = sample(
            model,
            sampler,
            FLAGS.n,
            context=context,
            **wrappers,
            seed=FLAGS.seed,
            batch_size=min(FLAGS.batch_size, FLAGS.n),
            devices=devices,
            progress=bar.update,
        ).images
    require(np.all(np.isfinite(images)), f"run={FLAGS.run}: its samples are not finite numbers")
    return evaluation.to_pixels(images)


def show(measured: dict[str, Row], seconds: dict[str, float]) -> None:
    """Print a table."""
    print(f"{'measure':28} {'samples':>22}  {'real against real':>22}")
    for name, row in measured.items():
        print(f"{name:28} {row.samples!s:>22}  {row.real!s:>22}")
    print(", ".join(f"{what}: {value:.1f} s" for what, value in seconds.items()))


def write(
    out: Path,
    name: str,
    measured: dict[str, Row],
    seconds: dict[str, float],
    devices: Sequence[jax.Device],
    real: Real,
) -> None:
    """Write all measures, and how they came about, as JSON."""
    record = {
        "measures": {
            k: {s: v._asdict() for s, v in r._asdict().items()} for k, r in measured.items()
        },
        "real": real.origin,
        "seconds": seconds,
        "flags": settings(),
        "batch_size": FLAGS.batch_size,
        "devices": describe(devices),
        "versions": environment.versions(),
    }
    write_atomically(out / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())


def report(
    path: Path,
    name: str,
    images: np.ndarray,
    real: Real,
    measured: dict[str, Row],
    near: Any,
    labels: np.ndarray | None,
) -> None:
    """Write the report: the measures, samples by class, and those nearest to training images."""
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
    write_report(path, title=f"{FLAGS.run}, {name}", summary=summary, sections=sections)


if __name__ == "__main__":
    run(main)
