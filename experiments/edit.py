"""Edit images with a trained run: the same samplers start from images instead of noise.

  python -m experiments.edit --edit=sdedit:strength=0.6 --context=hero
  python -m experiments.edit --edit=inpaint:mask=left
  python -m experiments.edit --edit=reconstruct --sampler=ddim:100:grid=uniform_logsnr
  python -m experiments.edit --edit=interpolate --pick=0,1
  python -m experiments.edit --edit=interpolate:seeds=3,7 --context=food
  python -m experiments.edit --edit=contexts --context="hero; spell"

The images come from the run's data unless --data names others. sdedit takes any sampler. The other
edits use DDIM, with the steps and the grid that --sampler names. The app writes edited.png and
edited.npy.
"""

from pathlib import Path

import numpy as np
from absl import flags

from diffusion_jax import data, pictures, samplers, spec
from diffusion_jax.data import contexts
from diffusion_jax.files import save_npy
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.runs.config import Config
from diffusion_jax.sampling.editing import EDITS, Editor
from diffusion_jax.spec import Spec
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args

BACK = ("reconstruct", "interpolate")  # the edits in which DDIM turns images into noise
VARIED = ("step", "data", "pick", "context", "seed", "guidance", "threshold")

app.define("run", "step", "guidance", "threshold", "devices", "cpu_devices", sampler="")
flags.DEFINE_string("edit", "sdedit", "the kind of edit and its options")
app.SHOWN["edit"] = (EDITS, ("editor",))
flags.DEFINE_string("data", None, "the images, such as npy:images=FILE.npy; by default the run's")
flags.DEFINE_list("pick", None, "the numbers of the images; by default the first 8, or 2")
flags.DEFINE_string("context", None, "the context of all images; by default each image's own")
app.define_seed("the seed of the noise")
flags.DEFINE_string("out", None, "the folder to write to; by default RUN/edits/SETTINGS")


def main(args: Args) -> None:
    """Edit images, and write the results."""
    folder = Path(args.run)
    config = load_config(folder)
    edit = spec.parse(args.edit, EDITS, "edit")
    sampler = choose_sampler(args, edit.name, config)
    options = app.check_guidance(args, config)
    from_noise = edit.name == "contexts" or bool(edit.options.get("seeds"))
    images, context = (two_contexts if from_noise else inputs)(args, edit, config)
    if edit.name in ("sdedit", "inpaint"):
        options["seed"] = args.seed
    label = f"{edit.slug}-{sampler.slug}" if args.sampler else edit.slug
    out = app.output_folder(args.out, folder / "edits" / app.variant(label, args, *VARIED))
    options["devices"] = choose_devices(len(context), args.devices)
    editor = Editor(load_model(folder, args.step), images, context, sampler, options)
    args.refuse_unread(f"--edit={args.edit}")
    rows = edit.bind()(editor)
    sheet = pictures.grid(np.concatenate(list(rows.values())), labels=list(rows))
    save_npy(out / "edited.npy", list(rows.values())[-1])
    pictures.save_png(out / "edited.png", sheet)
    print(f"written: {out / 'edited.png'}, {out / 'edited.npy'}")


def choose_sampler(args: Args, edit: str, config: Config) -> Spec:
    """Return the sampler; by default DDIM in 50 steps, or in 100 of equal log-SNR for BACK."""
    schedule = config.build_schedule()
    text = args.sampler or f"ddim:{min(50, schedule.steps)}"
    if not args.sampler and edit in BACK:
        grid = "uniform_logsnr" if np.isfinite(schedule.ratio[-1]) else "trailing"
        text = f"ddim:{min(100, schedule.steps)}:grid={grid}"
    found = samplers.parse(text, schedule)
    require("steps" in found.options, f"sampler={text}: edits start within a grid: name a sampler")
    only = found.name == "ddim" and not found.options.keys() - {"steps", "grid"}
    require(
        edit == "sdedit" or only,
        f"sampler={text}: {edit} walks by DDIM: give ddim, its steps and its grid only",
    )
    samplers.build(found, schedule)
    return found


def inputs(args: Args, edit: Spec, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return the images to edit, in [-1, 1], and their contexts."""
    dataset = data.load(args.data or config.data)
    found, shape = dataset.images.shape[1:], config.image_shape
    require(found == shape, f"images of shape {found}: this run's are {shape}")
    count = min(2 if edit.name == "interpolate" else 8, len(dataset.images))
    chosen = app.numbers("pick", args.pick or list(map(str, range(count))), int)
    last = len(dataset.images) - 1
    for index in chosen:
        require(0 <= index <= last, f"pick={index}: the images are numbered 0 to {last}")
    images = dataset.images[chosen].astype(np.float32) / 127.5 - 1
    if args.context is not None:
        vectors = read_contexts(args, config)
        fits = len(vectors) in (1, len(chosen))
        require(fits, f"context={args.context!r}: it must be one, or one for each image")
        return images, np.broadcast_to(vectors, (len(chosen), vectors.shape[1]))
    if args.data is not None or config.null_context:
        return images, np.zeros((len(chosen), config.n_cfeat), np.float32)
    return images, np.asarray(dataset.labels[chosen], np.float32)


def two_contexts(args: Args, edit: Spec, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return an empty array of images, and the two contexts to interpolate."""
    vectors, wanted = np.zeros((2, config.n_cfeat), np.float32), 1
    if edit.name == "contexts":
        require(args.context is not None, 'contexts needs two of them: --context="hero; spell"')
        wanted = 2
    if args.context is not None:
        vectors = read_contexts(args, config)
    fits = wanted <= len(vectors) <= 2
    require(fits, f"context={args.context!r}: it must be two, separated by ;")
    return np.empty((0, 1, 1, 1), np.float32), vectors


def read_contexts(args: Args, config: Config) -> np.ndarray:
    """Return the vectors of --context."""
    require(not config.null_context, "context: this run was trained without context")
    return contexts.parse(args.context, config.class_names)


if __name__ == "__main__":
    app.run(main)
