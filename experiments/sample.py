"""Sample images from a trained run.

  python -m experiments.sample
  python -m experiments.sample --sampler=ddpm --steps=500 --n=32
  python -m experiments.sample \\
      --context="hero; food=0.6,spell=0.4; 1,0,0.6,0,0"
  python -m experiments.sample --compare=ddpm:500,ddim:25

Writes samples.png, samples.npy and the denoising animation, as GIF and as HTML, and prints how
long sampling took, with compilation told apart.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from diffusion_jax import pictures
from diffusion_jax.config import Config, at_least, at_most
from diffusion_jax.files import open_atomically
from diffusion_jax.parallel import alike, choose_devices, first_devices, is_first
from diffusion_jax.precisions import PRECISIONS
from diffusion_jax.runs import Model, load_config, load_model
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling import Samples, frame_rows, images_at_once, sample
from diffusion_jax.timing import process_seconds
from diffusion_jax.typing import require
from experiments.flags import (
    FLAGS,
    GUIDANCE,
    contexts,
    define_devices,
    define_guidance,
    define_processes,
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

LARGEST = 1_000_000  # the most images of one call
SHOWN = 256  # the most images in a picture
COLUMNS = 16  # the widest row of a picture
VARIED = (  # the flags that change the images
    *("step", "grid", "options", "eta", "variance", "n", "seed", "context", "dtype", "threshold"),
    *GUIDANCE,
)

define_devices()
define_guidance()
define_processes()
define_run()
define_sampler()
flags.DEFINE_float("eta", None, "ddim: 0 is deterministic, 1 as noisy as ddpm")
flags.DEFINE_enum("variance", None, ["beta", "posterior"], "ddpm: the variance of its noise")
flags.DEFINE_integer("n", None, "images in all; by default 8 of each context, or 32 without")
flags.DEFINE_integer("batch_size", None, "images at once; by default up to 1024 of 16x16")
flags.DEFINE_integer("seed", 0, "the seed: image i is the same in every batch and on all devices")
flags.DEFINE_string(
    "context",
    None,
    'contexts separated by ";": class names, weights such as food=0.6,spell=0.4, a number for '
    "each class, or none; by default one of each class",
)
flags.DEFINE_enum(
    "frames",
    "notes",
    ["notes", "all", "none"],
    "the animation's frames: the notes' choice, after every step, or no animation",
)
flags.DEFINE_enum(
    "dtype",
    "float32",
    list(PRECISIONS),
    "what the network computes in; tf32: float32 with products rounded to TF32 on GPUs",
)
flags.DEFINE_enum("scaling", "clip", list(pictures.SCALINGS), "how values become colours")
flags.DEFINE_string(
    "out",
    None,
    "folder of the results; by default RUN/samples/SAMPLER-STEPS and the flags that differ from "
    "their defaults",
)
flags.DEFINE_list("compare", None, "time samplers side by side, such as ddpm:500,ddim:25")


class Timed(NamedTuple):
    """The samples to show, the seconds that all took, and the seconds of compilation before."""

    samples: Samples
    seconds: float
    compilation: float


class Job(NamedTuple):
    """A model and what to draw from it: how many images of each name, each with its context."""

    model: Model
    names: dict[str, int]
    context: np.ndarray
    devices: Sequence[jax.Device]
    wrappers: dict[str, Any]

    def run(
        self,
        table: Tableau,
        shown: np.ndarray,
        frames: Sequence[int] | None = None,
        path: Path | None = None,
    ) -> Timed:
        """Sample, after a run of no rows that does no more than compile.

        Keep the images with the numbers in shown, and write all to a .npy file at path.
        """
        first, file = 0, None
        shape = (len(self.context), *self.model.network.image_shape)

        def keep(batch: Samples) -> Samples:
            nonlocal first
            finite = np.all(np.isfinite(batch.images))
            require(finite, f"run={FLAGS.run}: its samples are not finite numbers")
            if file is not None:
                file.write(batch.images.tobytes())
            at = shown[(first <= shown) & (shown < first + len(batch.images))] - first
            first += len(batch.images)
            return batch.take(at)

        def go(n: int, **given: Any) -> Samples:
            given |= self.wrappers | {"context": self.context[:n], "batch_size": size}
            given |= {"frames": frames, "devices": self.devices}
            return sample(self.model, table, n, seed=FLAGS.seed, dtype=FLAGS.dtype, **given)

        size = images_at_once(len(self.context), self.model, FLAGS.batch_size)
        begin = time.perf_counter()
        go(size, rows=0)
        compiled = time.perf_counter()
        with ExitStack() as held:
            if path is not None:
                file = held.enter_context(open_atomically(path))
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            samples = go(len(self.context), keep=keep)
        return Timed(samples, time.perf_counter() - compiled, compiled - begin)

    def shown(self) -> tuple[dict[str, int], np.ndarray]:
        """How many images of each name a picture shows, and the numbers of these images."""
        each = max(1, SHOWN // len(self.names))
        counts = np.array(list(self.names.values()))
        starts = np.cumsum(counts) - counts
        names = {name: min(each, count) for name, count in list(self.names.items())[:SHOWN]}
        counted = zip(names.values(), starts[: len(names)], strict=True)
        return names, np.concatenate([start + np.arange(count) for count, start in counted])


def main() -> None:
    """Sample and write pictures, or compare samplers."""
    folder = Path(FLAGS.run)
    with alike():
        settings = load_config(folder)
        names, context = choose_contexts(settings)
        wrappers = guidance(settings)
        plans = choose_samplers(settings)
        named = "" if FLAGS.compare else variant(plans[0][0], *VARIED)
        out = output_folder("out", folder / "samples" / named)
        count = FLAGS.devices
        devices = first_devices(len(context)) if count is None else choose_devices(count, count)
    job = Job(load_model(folder, FLAGS.step), names, context, devices, wrappers)
    say(f"{folder}: {len(context)} images on {describe(devices)}")
    if FLAGS.compare:
        compare(out, job, plans)
    else:
        draw(out, job, *plans[0])


def choose_samplers(settings: Config) -> list[tuple[str, Tableau]]:
    """The labels and tables of --compare, or else of --sampler and --steps."""
    schedule = settings.diffusion.build()
    named = {key: FLAGS[key].value for key in ("eta", "variance") if FLAGS[key].value is not None}
    if not FLAGS.compare:
        return [tableau(schedule, FLAGS.sampler, FLAGS.steps, **named)]
    refuse_unread("--compare", "sampler", "steps", "frames")
    plans = []
    for word in FLAGS.compare:
        name, _, steps = word.partition(":")
        fits = not steps or (steps.isdecimal() and len(steps) < 10)
        require(fits, f"compare={word}: write samplers as ddpm:500,ddim:25")
        plans.append(tableau(schedule, name, int(steps) if steps else None, **named))
    return plans


def choose_contexts(settings: Config) -> tuple[dict[str, int], np.ndarray]:
    """How many images each context gets, by its name, and the context of each image."""
    classes = settings.data.class_names
    width = settings.network.n_cfeat
    if FLAGS.context is not None:
        vectors = contexts(settings)
        labels = [part.strip() for part in FLAGS.context.split(";") if part.strip()]
        once = len(set(labels)) == len(labels)
        require(once, f"context={FLAGS.context!r}: each context must stand there once")
    elif settings.data.null_context:
        vectors, labels = np.zeros((1, width), np.float32), ["none"]
    else:
        vectors, labels = np.eye(width, dtype=np.float32), list(classes)
    n = FLAGS.n
    if n is None:
        n = 8 * len(labels) if len(labels) > 1 else 32
    least = len(labels)
    require(n >= least, f"n={n}: it must be at least {least}, one image for each context")
    at_most("n", n, LARGEST)
    if FLAGS.batch_size is not None:
        at_least("batch_size", FLAGS.batch_size, 1)
    owner = np.arange(n) * len(labels) // n
    counts = np.bincount(owner)
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}, vectors[owner]


def draw(out: Path, job: Job, label: str, table: Tableau) -> None:
    """Sample once; write the images and the animation."""
    frames = None
    if FLAGS.frames != "none":
        frames = frame_rows(table, job.model.schedule.steps, FLAGS.frames)
    n = len(job.context)
    names, shown = job.shown()
    path = out / "samples.npy" if is_first() else None
    samples, seconds, compilation = job.run(table, shown, frames, path)
    say(
        f"{label}: {n} images in {seconds:.2f} s, {n / seconds:.1f} images/s, "
        f"{table.rows} network evaluations; compilation {compilation:.1f} s"
    )
    say(f"the images were there {process_seconds():.1f} s after the start of the process")
    if not is_first():
        return
    if len(shown) < n:
        say(f"the pictures show {len(shown)} of the {n} images")
    layout = {"scaling": FLAGS.scaling, "columns": columns(names)}
    labels = row_labels(names)
    sheet = pictures.grid(by_rows(samples.images, names), labels=labels, **layout)
    pictures.save_png(out / "samples.png", sheet)
    written = ["samples.npy", "samples.png"]
    if samples.frames is not None:
        moving = np.stack([by_rows(frame, names) for frame in samples.frames])
        pictures.save_gif(out / "denoising.gif", moving, scale=3, **layout)
        pictures.save_html(out / "denoising.html", moving, scale=3, **layout)
        written = ["denoising.gif", "denoising.html", *written]
    say(f"written: {', '.join(str(out / name) for name in written)}")


def compare(out: Path, job: Job, plans: Sequence[tuple[str, Tableau]]) -> None:
    """Time samplers one after the other, and show what they draw from the same noise."""
    say(f"{'sampler':12} {'evaluations':>11} {'seconds':>9} {'images/s':>9} {'compilation':>12}")
    rows, slowest, n = {}, 0.0, len(job.context)
    wide = min(COLUMNS, n)
    shown = np.linspace(0, n - 1, wide).astype(int)  # some of every context
    for label, table in plans:
        samples, seconds, compilation = job.run(table, shown)
        slowest = max(slowest, seconds)
        say(f"{label:12} {table.rows:11} {seconds:9.2f} {n / seconds:9.1f} {compilation:10.1f} s")
        rows[label] = (samples.images, seconds)
    for label, (_, seconds) in rows.items():
        say(f"{label} is {slowest / seconds:.1f} times as fast as the slowest")
    if not is_first():
        return
    images = np.concatenate([images for images, _ in rows.values()])
    sheet = pictures.grid(images, labels=list(rows), columns=wide, scaling=FLAGS.scaling)
    path = out / f"{variant('-'.join(['compare', *rows]), *VARIED)}.png"
    pictures.save_png(path, sheet)
    say(f"written: {path}")


def columns(names: dict[str, int]) -> int:
    """The columns of a picture with rows for each context."""
    return min(COLUMNS, max(names.values())) if len(names) > 1 else 8


def by_rows(images: np.ndarray, names: dict[str, int]) -> np.ndarray:
    """The images with white ones put in, so that each context starts a row."""
    wide = columns(names)
    parts = np.split(images, np.cumsum(list(names.values()))[:-1])
    fill = ((0, 0), (0, 0), (0, 0))
    return np.concatenate(
        [np.pad(part, ((0, -len(part) % wide), *fill), constant_values=1) for part in parts]
    )


def row_labels(names: dict[str, int]) -> list[str]:
    """The label of each row that by_rows makes: a context's name at its first row."""
    wide = columns(names)
    labels = []
    for name, count in names.items():
        labels += [name] + [""] * (-(-count // wide) - 1)
    return labels


if __name__ == "__main__":
    run(main)
