"""Sample images from a trained run.

  python -m experiments.sample
  python -m experiments.sample --sampler=ddpm:500 --n=32
  python -m experiments.sample --context="hero; food=0.6,spell=0.4; 1,0,0.6,0,0"
  python -m experiments.sample --compare=ddpm:500,ddim:25

The app writes samples.png, samples.npy and the denoising animation as GIF and as HTML. It prints
how long sampling took, and separately how long compilation took.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import pictures, samplers
from diffusion_jax.data import contexts
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.files import open_atomically
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.parallel import alike, choose_devices, first_devices, is_first
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.runs.config import Config
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling import Samples, frame_rows, sample
from diffusion_jax.sampling.draw import images_at_once
from diffusion_jax.timing import process_seconds
from diffusion_jax.typing import check_seed, require
from experiments import app
from experiments.app import Args, describe, say

MOST = 1_000_000  # the most images of one call
SHOWN = 256  # the most images in a picture
COLUMNS = 16  # the widest row of a picture
VARIED = ("step", "n", "seed", "context", "dtype", "guidance", "threshold")  # change the images

app.define_run()
app.define_sampler()
app.define_guidance()
app.define_devices()
app.define_processes()
flags.DEFINE_string("compare", None, "time samplers side by side, such as ddpm:500,ddim:25")
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
    "course",
    ["course", "all", "none"],
    "the animation's frames: the course's choice, after every step, or no animation",
)
flags.DEFINE_enum("dtype", "float32", list(PRECISIONS), "what the network computes in")
flags.DEFINE_enum("scaling", "clip", list(pictures.SCALINGS), "how values become colours")
flags.DEFINE_string(
    "out",
    None,
    "folder of the results; by default RUN/samples/SAMPLER and the flags that differ from their "
    "defaults",
)


class Timed(NamedTuple):
    """The samples to show, the seconds of sampling, and those of the compilation before it."""

    samples: Samples
    seconds: float
    compilation: float


class Job(NamedTuple):
    """The number of images of each name, the context of each image, and options.

    options: arguments of sample that all images share.
    """

    model: Model
    names: dict[str, int]
    context: np.ndarray
    batch_size: int
    options: dict[str, Any]

    def run(
        self,
        tableau: Tableau,
        shown: np.ndarray,
        frames: Sequence[int] | None = None,
        path: Path | None = None,
    ) -> Timed:
        """Sample, after a run of zero rows that only compiles.

        Keep the images at the indices in shown, and write all images to a .npy file at path.
        """
        first, file = 0, None
        shape = (len(self.context), *self.model.network.image_shape)

        def keep(batch: Samples) -> Samples:
            nonlocal first
            require(np.all(np.isfinite(batch.images)), "the samples are not finite numbers")
            if file is not None:
                file.write(batch.images.tobytes())
            at = shown[(first <= shown) & (shown < first + len(batch.images))] - first
            first += len(batch.images)
            return batch.take(at)

        def go(n: int, **given: Any) -> Samples:
            given |= {"context": self.context[:n], "batch_size": self.batch_size, "frames": frames}
            return sample(self.model, tableau, n, **given, **self.options)

        begin = time.perf_counter()
        go(self.batch_size, rows=0)
        compiled = time.perf_counter()
        with ExitStack() as held:
            if path is not None:
                file = held.enter_context(open_atomically(path))
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            samples = go(len(self.context), keep=keep)
        return Timed(samples, time.perf_counter() - compiled, compiled - begin)

    def shown(self) -> tuple[dict[str, int], np.ndarray]:
        """Return how many images of each name a picture shows, and their indices."""
        each = max(1, SHOWN // len(self.names))
        counts = np.array(list(self.names.values()))
        starts = np.cumsum(counts) - counts
        names = {name: min(each, count) for name, count in list(self.names.items())[:SHOWN]}
        counted = zip(names.values(), starts[: len(names)], strict=True)
        return names, np.concatenate([start + np.arange(count) for count, start in counted])


def main(args: Args) -> None:
    """Sample and write pictures, or compare samplers."""
    folder = Path(args.run)
    with alike():
        config = load_config(folder)
        names, context = choose_contexts(args, config)
        options = app.check_guidance(args, config)
        tableaus = choose_samplers(args, config)
        named = "" if args.compare else app.variant(next(iter(tableaus)), args, *VARIED)
        out = app.output_folder(args.out, folder / "samples" / named)
        count = args.devices
        devices = first_devices(len(context)) if count is None else choose_devices(count, count)
        options |= {"seed": check_seed(args.seed), "dtype": args.dtype, "devices": devices}
    model = load_model(folder, args.step)
    batch = images_at_once(len(context), model, args.batch_size)
    job = Job(model, names, context, batch, options)
    layout, frames = {"scaling": args.scaling}, "" if args.compare else args.frames
    args.refuse_unread("--compare")
    say(f"{folder}: {len(context)} images on {describe(devices)}")
    if args.compare:
        compare(
            out / f"{app.variant('compare-' + '-'.join(tableaus), args, *VARIED)}.png",
            job,
            tableaus,
            layout,
        )
    else:
        draw(out, job, *next(iter(tableaus.items())), frames, layout)


def choose_samplers(args: Args, config: Config) -> dict[str, Tableau]:
    """Return the tableaus of --compare or of --sampler, keyed by label."""
    schedule = config.build_schedule()
    texts = samplers.split(args.compare) if args.compare else [args.sampler]
    specs = [samplers.parse(text, schedule) for text in texts]
    return {spec.slug: samplers.build(spec, schedule) for spec in specs}


def choose_contexts(args: Args, config: Config) -> tuple[dict[str, int], np.ndarray]:
    """Return the number of images of each context, keyed by name, and each image's context."""
    width = config.n_cfeat
    if args.context is not None:
        require(not config.null_context, "context: this run was trained without context")
        vectors = contexts.parse(args.context, config.class_names)
        labels = [part.strip() for part in args.context.split(";") if part.strip()]
        once = len(set(labels)) == len(labels)
        require(once, f"context={args.context!r}: each context must occur once")
    elif config.null_context:
        vectors, labels = np.zeros((1, width), np.float32), ["none"]
    else:
        vectors, labels = np.eye(width, dtype=np.float32), list(config.class_names)
    least, n = len(labels), args.n
    if n is None:
        n = 8 * least if least > 1 else 32
    fits = least <= n <= MOST
    require(fits, f"n={n}: it must be at least {least}, one for each context, and at most {MOST}")
    owner = np.arange(n) * least // n
    counts = np.bincount(owner)
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}, vectors[owner]


def draw(
    out: Path, job: Job, label: str, tableau: Tableau, rule: str, layout: dict[str, Any]
) -> None:
    """Sample once, and write the images and the animation."""
    frames = None if rule == "none" else frame_rows(tableau, job.model.schedule.steps, rule)
    n, (names, shown) = len(job.context), job.shown()
    path = out / "samples.npy" if is_first() else None
    samples, seconds, compilation = job.run(tableau, shown, frames, path)
    say(
        f"{label}: {n} images in {seconds:.2f} s, {n / seconds:.1f} images/s, "
        f"{tableau.rows} network evaluations; compilation {compilation:.1f} s"
    )
    say(f"the images were there {process_seconds():.1f} s after the start of the process")
    if not is_first():
        return
    if len(shown) < n:
        say(f"the pictures show {len(shown)} of the {n} images")
    rows = pictures.Rows(names, COLUMNS)
    layout = layout | {"columns": rows.columns}
    sheet = pictures.grid(rows.arrange(samples.images), labels=rows.labels, **layout)
    pictures.save_png(out / "samples.png", sheet)
    written = ["samples.npy", "samples.png"]
    if samples.frames is not None:
        moving = np.stack([rows.arrange(frame) for frame in samples.frames])
        pictures.save_gif(out / "denoising.gif", moving, scale=3, **layout)
        pictures.save_html(out / "denoising.html", moving, scale=3, **layout)
        written += ["denoising.gif", "denoising.html"]
    say(f"written: {', '.join(str(out / name) for name in written)}")


def compare(path: Path, job: Job, tableaus: dict[str, Tableau], layout: dict[str, Any]) -> None:
    """Time samplers one after the other, and show their images from the same noise."""
    say(f"{'sampler':12} {'evaluations':>11} {'seconds':>9} {'images/s':>9} {'compilation':>12}")
    n = len(job.context)
    wide = min(COLUMNS, n)
    shown = np.linspace(0, n - 1, wide).astype(int)  # some images of every context
    found = {}
    for label, tableau in tableaus.items():
        found[label] = job.run(tableau, shown)
        seconds, compilation = found[label][1:]
        say(f"{label:12} {tableau.rows:11} {seconds:9.2f} {n / seconds:9.1f} {compilation:10.1f} s")
    slowest = max(each.seconds for each in found.values())
    for label, each in found.items():
        say(f"{label} is {slowest / each.seconds:.1f} times as fast as the slowest")
    if is_first():
        images = np.concatenate([each.samples.images for each in found.values()])
        pictures.save_png(path, pictures.grid(images, labels=list(found), columns=wide, **layout))
        say(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
