"""Sample images from a trained run.

  python -m experiments.sample
  python -m experiments.sample --sampler=ddpm:500 --n=32
  python -m experiments.sample --context="hero; food=0.6,spell=0.4; 1,0,0.6,0,0"
  python -m experiments.sample --compare=ddpm:500,ddim:25

The app writes samples.png, samples.npy and the denoising animation as GIF and as HTML. It prints
how long sampling took, and separately how long compilation took. With --compare, it draws the same
noise by several samplers, and writes one picture.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from diffusion_jax import pictures, samplers
from diffusion_jax.data import contexts
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.files import open_atomically
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.parallel import choose_devices, first_devices, is_first, sharing_errors
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.runs.config import Config
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling import Samples, frame_rows, sample
from diffusion_jax.sampling.draw import images_at_once
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args, describe, print_once
from experiments.timing import process_seconds

MOST = 1_000_000  # the most images of one call
SHOWN = 256  # the most images in a picture
COLUMNS = 16  # the widest row of a picture
VARIED = ("step", "n", "seed", "context", "dtype", "guidance", "threshold")  # change the images

CONTEXTS = (
    'contexts separated by ";", each a class name, weights such as food=0.6,spell=0.4, a number '
    "for each class, or none; or a .npy file of contexts; by default one for each class"
)
FRAMES = "the frames of the animation: the course's choice, every step, or no animation"
app.define("run", "step", "sampler", "guidance", "threshold")
app.define("devices", "cpu_devices", "processes")
flags.DEFINE_string("compare", None, "samplers to compare, such as ddpm:500,ddim:25")
flags.DEFINE_integer("n", None, "how many images; by default 8 for each context, or 32 for one")
flags.DEFINE_integer("batch_size", None, "images at once; by default up to 1024 of 16x16", 1)
app.define_seed("the seed; image i does not depend on --n, the batch size or the devices")
flags.DEFINE_string("context", None, CONTEXTS)
flags.DEFINE_enum("frames", "course", ["course", "all", "none"], FRAMES)
flags.DEFINE_enum("dtype", "float32", list(PRECISIONS), "the precision of the network")
flags.DEFINE_enum("scaling", "clip", list(pictures.SCALINGS), "how values become colours")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/samples/SETTINGS")


def main(args: Args) -> None:
    """Sample and write pictures, or compare samplers."""
    folder = Path(args.run)
    with sharing_errors():
        config = load_config(folder)
        labels, context = choose_contexts(args, config)
        options = app.check_guidance(args, config)
        tableaus = choose_samplers(args, config)
        named = "" if args.compare else app.variant(next(iter(tableaus)), args, *VARIED)
        out = app.output_folder(args.out, folder / "samples" / named)
        count, n = args.devices, len(context)
        devices = first_devices(n) if count is None else choose_devices(count, count)
        options |= {"seed": args.seed, "dtype": args.dtype, "devices": devices}
    model = load_model(folder, args.step)
    options |= {"context": context, "batch_size": images_at_once(n, model, args.batch_size)}
    layout, rule = {"scaling": args.scaling}, "none" if args.compare else args.frames
    args.refuse_unread("--compare")
    print_once(f"{folder}: {n} images on {describe(devices)}")
    if args.compare:
        name = app.variant("compare-" + "-".join(tableaus), args, *VARIED)
        compare(out / f"{name}.png", model, tableaus, options, layout)
        return
    ((label, tableau),) = tableaus.items()
    shown, rows = arrange(labels, n)
    frames = None if rule == "none" else frame_rows(tableau, model.schedule.steps, rule)
    path = out / "samples.npy" if is_first() else None
    samples, _ = draw(label, model, tableau, shown, options | {"frames": frames}, path)
    print_once(f"the images were there {process_seconds():.1f} s after the start of the process")
    if is_first():
        if len(shown) < n:
            print_once(f"the pictures show {len(shown)} of the {n} images")
        write(out, samples, rows, layout)


def choose_samplers(args: Args, config: Config) -> dict[str, Tableau]:
    """Return the tableaus of --compare or of --sampler, keyed by label."""
    schedule = config.build_schedule()
    texts = samplers.split(args.compare) if args.compare else [args.sampler]
    specs = [samplers.parse(text, schedule) for text in texts]
    return {spec.slug: samplers.build(spec, schedule) for spec in specs}


def choose_contexts(args: Args, config: Config) -> tuple[list[str], np.ndarray]:
    """Return the names of the contexts, and the context of each image."""
    names, width = list(config.class_names), config.n_cfeat
    vectors = np.eye(width, dtype=np.float32)
    if args.context is not None:
        require(not config.null_context, "context: this run was trained without context")
        vectors = contexts.parse(args.context, config.class_names)
        names = [part.strip() for part in args.context.split(";") if part.strip()]
        once = len(set(names)) == len(names)
        require(once, f"context={args.context!r}: each context must occur once")
        if len(names) != len(vectors):  # they are rows of a file
            names = [str(row) for row in range(len(vectors))]
    elif config.null_context:
        names, vectors = ["none"], np.zeros((1, width), np.float32)
    least = len(names)
    n = args.n if args.n is not None else (8 * least if least > 1 else 32)
    fits = least <= n <= MOST
    require(fits, f"n={n}: it must be at least {least}, one for each context, and at most {MOST}")
    return names, vectors[np.arange(n) * least // n]


def arrange(names: Sequence[str], n: int) -> tuple[np.ndarray, pictures.Rows]:
    """Return the indices of the images that a picture shows, and the rows that they fill."""
    most = max(1, SHOWN // len(names))
    starts = -(-np.arange(len(names) + 1) * n // len(names))
    parts = [np.arange(*pair)[:most] for pair in pairwise(starts)][:SHOWN]
    counts = {name: len(part) for name, part in zip(names, parts, strict=False)}
    return np.concatenate(parts), pictures.Rows(counts, COLUMNS)


def draw(
    label: str,
    model: Model,
    tableau: Tableau,
    shown: np.ndarray,
    options: dict[str, Any],
    path: Path | None = None,
) -> tuple[Samples, float]:
    """Return the samples at the indices in shown, and the seconds of sampling.

    Compile first, by a run of zero rows. Write all images to a .npy file at path.
    """
    context, size, first = options["context"], options["batch_size"], 0
    n, shape = len(context), model.network.image_shape

    def keep(batch: Samples) -> Samples:
        nonlocal first
        require(np.all(np.isfinite(batch.images)), "the samples are not finite numbers")
        if path is not None:
            file.write(batch.images.tobytes())
        at = shown[(first <= shown) & (shown < first + len(batch.images))] - first
        first += len(batch.images)
        return batch.take(at)

    begin = time.perf_counter()
    sample(model, tableau, size, rows=0, **options | {"context": context[:size]})
    compiled = time.perf_counter()
    with ExitStack() as held:
        if path is not None:
            file = held.enter_context(open_atomically(path))
            header = {"descr": "<f4", "fortran_order": False, "shape": (n, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
        samples = sample(model, tableau, n, keep=keep, **options)
    seconds = time.perf_counter() - compiled
    print_once(
        f"{label}: {n} images in {seconds:.2f} s, {n / seconds:.1f} images/s, "
        f"{tableau.rows} network evaluations; compilation {compiled - begin:.1f} s"
    )
    return samples, seconds


def write(out: Path, samples: Samples, rows: pictures.Rows, layout: dict[str, Any]) -> None:
    """Write the picture and the animation of samples."""
    layout = layout | {"columns": rows.columns}
    sheet = pictures.grid(rows.arrange(samples.images), labels=rows.labels, **layout)
    pictures.save_png(out / "samples.png", sheet)
    written = ["samples.npy", "samples.png"]
    if samples.frames is not None:
        moving = np.stack([rows.arrange(frame) for frame in samples.frames])
        pictures.save_gif(out / "denoising.gif", moving, scale=3, **layout)
        pictures.save_html(out / "denoising.html", moving, scale=3, **layout)
        written += ["denoising.gif", "denoising.html"]
    print_once(f"written: {', '.join(str(out / name) for name in written)}")


def compare(
    path: Path,
    model: Model,
    tableaus: dict[str, Tableau],
    options: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    """Time samplers one after the other, and show their images from the same noise."""
    n = len(options["context"])
    wide = min(COLUMNS, n)
    shown = np.linspace(0, n - 1, wide).astype(int)  # some images of every context
    found = {label: draw(label, model, one, shown, options) for label, one in tableaus.items()}
    slowest = max(seconds for _, seconds in found.values())
    for label, (_, seconds) in found.items():
        print_once(f"{label} is {slowest / seconds:.1f} times as fast as the slowest")
    if is_first():
        images = np.concatenate([samples.images for samples, _ in found.values()])
        pictures.save_png(path, pictures.grid(images, labels=list(found), columns=wide, **layout))
        print_once(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
