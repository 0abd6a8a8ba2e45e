"""Edit images with a trained run: the same samplers, from another start.

  python -m experiments.edit --edit=sdedit --strength=0.6 --context=hero
  python -m experiments.edit --edit=inpaint --mask=left
  python -m experiments.edit --edit=reconstruct --steps=100
  python -m experiments.edit --edit=interpolate --pick=0,1
  python -m experiments.edit --edit=interpolate --seeds=3,7 --context=food
  python -m experiments.edit --edit=contexts --context="hero; spell"

sdedit adds noise and removes it by --sampler; inpaint fills in what a mask hides, by RePaint;
reconstruct turns images into noise and back, by DDIM; interpolate goes from one image, or one seed,
to another; contexts goes from one context to another with the noise kept. The images are the run's
own unless --images names others. Writes edited.png and edited.npy under RUN/edits/EDIT.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import data, editing, grids, pictures, samplers
from diffusion_jax.config import Config, DataConfig, at_least, at_most
from diffusion_jax.files import save_npy
from diffusion_jax.grids import Grid
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import Model, load_config, load_model
from diffusion_jax.sampling import Start, initial_noise, sample
from diffusion_jax.typing import check_seed, choose, options_of, require
from experiments.flags import (
    FLAGS,
    GUIDANCE,
    contexts,
    define_devices,
    define_guidance,
    define_run,
    define_sampler,
    finite_grid,
    guidance,
    numbers,
    options,
    output_folder,
    refuse_unread,
    run,
    variant,
)

GREY = 0.5  # what hidden pixels look like
BACK = ("reconstruct", "interpolate")  # the edits in which DDIM goes back
READ = {  # the flags that an edit reads, of those that not every one does
    "sdedit": {"images", "pick", "seed", "sampler", "strength"},
    "inpaint": {"images", "pick", "seed", "mask", "jump", "repeats"},
    "reconstruct": {"images", "pick", "iterations"},
    "interpolate": {"images", "pick", "iterations", "seeds", "between"},
    "contexts": {"seed", "between"},
}
MOST = 1000  # images of an interpolation

define_devices()
define_guidance()
define_run()
define_sampler(
    "ddim",
    "50 on --grid=trailing, or 100 on uniform_logsnr where DDIM goes back (on trailing where the "
    "schedule ends in noise alone)",
    grid=None,
)
flags.DEFINE_enum(
    "edit",
    "sdedit",
    ["sdedit", "inpaint", "reconstruct", "interpolate", "contexts"],
    "what to do",
)
flags.DEFINE_string("images", None, "a .npy file or a folder of images; by default the run's own")
flags.DEFINE_list(
    "pick", None, "numbers of the images; by default the first 8, or 2 to interpolate"
)
flags.DEFINE_list("seeds", None, "two seeds to interpolate between, in place of images")
flags.DEFINE_string("context", None, "the context of all images; by default each one's own")
flags.DEFINE_float("strength", 0.5, "sdedit: how far into the noise, from 0 to 1")
flags.DEFINE_string(
    "mask",
    "left",
    "inpaint: the half that is known: left, right, top, bottom; or a .npy of 0 and 1",
)
flags.DEFINE_integer("jump", 10, "inpaint: the steps of RePaint's jumps")
flags.DEFINE_integer("repeats", 5, "inpaint: how often each jump is taken")
flags.DEFINE_integer("iterations", 5, "calls for each step of an inversion; more is more exact")
flags.DEFINE_integer("between", 10, "images of an interpolation, the ends included")
flags.DEFINE_integer("seed", 0, "the seed of the noise")
flags.DEFINE_string(
    "out", None, "folder of the results; by default RUN/edits/EDIT and the flags that differ"
)


VARIED = (  # the flags that change the results
    *("step", "sampler", "steps", "grid", "options", "images", "pick", "seeds", "context"),
    *("strength", "mask", "jump", "repeats", "iterations", "between", "seed", "threshold"),
    *GUIDANCE,
)


class Editor(NamedTuple):
    """A model with what it edits: images in [-1, 1], each with its context."""

    model: Model
    grid: Grid
    images: np.ndarray
    context: np.ndarray
    wrappers: dict[str, Any]
    options: dict[str, Any]

    def sample(self, table: samplers.Tableau, start: Start | None, **given: Any) -> np.ndarray:
        """Run a table on all images at once."""
        n = len(self.context)
        devices = choose_devices(n, FLAGS.devices)
        given = {"seed": FLAGS.seed, "start": start, "devices": devices, **self.wrappers, **given}
        return sample(self.model, table, n, context=self.context, **given).images

    def invert(self) -> np.ndarray:
        """The noise that DDIM turns into the images. Guidance, which would mislead it, is left."""
        table = samplers.ddim_inversion(self.model.schedule, self.grid, FLAGS.iterations)
        return self.sample(table, Start(self.images), guidance=None, worse=None)

    def denoise(self, noise: np.ndarray) -> np.ndarray:
        """The images of given noise, by DDIM."""
        return self.sample(samplers.ddim(self.model.schedule, self.grid), Start(noise))

    def noise(self, seed: int) -> np.ndarray:
        """The state from which sample starts its first image with a seed."""
        scale = samplers.ddim(self.model.schedule, self.grid).noise_scale
        return np.float32(scale) * initial_noise(self.model, 1, seed)


Rows = dict[str, np.ndarray]  # label -> images, all of one number


def main() -> None:
    """Edit, and write what came of it."""
    check()
    folder = Path(FLAGS.run)
    settings = load_config(folder)
    grid, own = choose_grid(settings)
    wrappers = guidance(settings)
    out = output_folder("out", folder / "edits" / variant(FLAGS.edit, *VARIED))
    images, context = inputs(settings)
    editor = Editor(load_model(folder, FLAGS.step), grid, images, context, wrappers, own)
    rows = EDITS[FLAGS.edit](editor)
    sheet = pictures.grid(np.concatenate(list(rows.values())), labels=list(rows))
    save_npy(out / "edited.npy", list(rows.values())[-1])
    pictures.save_png(out / "edited.png", sheet)
    print(f"written: {out / 'edited.png'}, {out / 'edited.npy'}")


def check() -> None:
    """Raise InputError for flags that this edit does not read, and numbers out of bounds."""
    known = set().union(*READ.values())
    refuse_unread(f"--edit={FLAGS.edit}", *sorted(known - READ[FLAGS.edit]))
    if FLAGS.seeds:
        refuse_unread("--seeds", "images", "pick", "iterations")
    at_least("between", FLAGS.between, 2)
    at_most("between", FLAGS.between, MOST)
    check_seed(FLAGS.seed)


def choose_grid(settings: Config) -> tuple[Grid, dict[str, Any]]:
    """The grid, and those of --options that are the sampler's."""
    schedule, back = settings.diffusion.build(), FLAGS.edit in BACK
    steps = min(100 if back else 50, schedule.steps) if FLAGS.steps is None else FLAGS.steps
    if back and not FLAGS.seeds:
        at_most("iterations", FLAGS.iterations, editing.LONGEST // max(1, steps))
    name = FLAGS.grid or (finite_grid(schedule) if back else "trailing")
    given = options(FLAGS.options)
    takes = options_of(samplers.SAMPLERS[FLAGS.sampler]) if FLAGS.edit == "sdedit" else {}
    own = {option: given.pop(option) for option in takes if option in given}
    return grids.build(name, schedule, steps, **given), own


def sdedit(editor: Editor) -> Rows:
    """The images, with noise, and what a sampler makes of that."""
    schedule = editor.model.schedule
    grid = editing.tail(schedule, editor.grid, FLAGS.strength)
    table = samplers.build(FLAGS.sampler, schedule, grid.steps, grid, **editor.options)
    start = editing.noised(editor.images, table)
    noisy = editor.sample(table, start, rows=0)
    return {"image": editor.images, "noise": noisy, "edited": editor.sample(table, start)}


def inpaint(editor: Editor) -> Rows:
    """The images, what is known of them, and what RePaint fills in."""
    known = np.broadcast_to(mask(editor.images.shape[1:3]), (*editor.images.shape[:3], 1))
    table = editing.repaint(editor.model.schedule, editor.grid, FLAGS.jump, FLAGS.repeats)
    start = editing.noised(known * editor.images, table)
    filled = editor.sample(table, start, mask=known)
    shown = np.where(known == 1, editor.images, GREY)
    return {"image": editor.images, "known": shown, "inpainted": filled}


def reconstruct(editor: Editor) -> Rows:
    """The images, the noise that DDIM makes of them, and the way back."""
    noise = editor.invert()
    back = editor.denoise(noise)
    ratios = editing.psnr(editor.images, np.clip(back, -1, 1))
    print(f"PSNR: {', '.join(f'{ratio:.1f}' for ratio in ratios)} dB")
    return {"image": editor.images, "as noise": noise / 2, "reconstructed": back}


def interpolate(editor: Editor) -> Rows:
    """From one image, or one seed, to another: slerp of the noise, and of the contexts with it."""
    if FLAGS.seeds:
        seeds = numbers("seeds", int)
        require(len(seeds) == 2, f"seeds={','.join(FLAGS.seeds)}: it must be two numbers")
        ends = np.concatenate([editor.noise(check_seed(seed, "seeds")) for seed in seeds])
    else:
        require(
            len(editor.images) == 2,
            f"pick={','.join(FLAGS.pick or [])}: interpolation takes two images",
        )
        ends = editor.invert()
    places = np.linspace(0, 1, FLAGS.between)
    between = editing.slerp(ends[0], ends[1], places)
    row = editor._replace(context=mixed(editor.context, places)).denoise(between)
    return {"interpolated": row}


def mix_contexts(editor: Editor) -> Rows:
    """From one context to another, all from the same noise: a row for each seed."""
    places = np.linspace(0, 1, FLAGS.between)
    row = editor._replace(context=mixed(editor.context, places))
    seeds = range(FLAGS.seed, FLAGS.seed + 4)
    noises = {f"seed {seed}": editor.noise(seed) for seed in seeds}
    return {
        label: row.denoise(np.repeat(noise, len(places), axis=0)) for label, noise in noises.items()
    }


EDITS = {
    "sdedit": sdedit,
    "inpaint": inpaint,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "contexts": mix_contexts,
}


def mixed(ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Contexts on the straight line between two."""
    return ((1 - places[:, None]) * ends[0] + places[:, None] * ends[-1]).astype(np.float32)


def inputs(settings: Config) -> tuple[np.ndarray, np.ndarray]:
    """The images to edit, in [-1, 1], and their contexts."""
    if FLAGS.edit == "contexts" or FLAGS.seeds:
        return np.empty((0, 1, 1, 1), np.float32), two_contexts(settings)
    source = settings.data
    if FLAGS.images is not None:
        size = settings.network.image_shape[0] if Path(FLAGS.images).is_dir() else 0
        source = DataConfig(images=FLAGS.images, image_size=size)
    dataset = data.load(source)
    found, shape = dataset.images.shape[1:], settings.network.image_shape
    require(found == shape, f"images of shape {found}: this run's are {shape}")
    count = 2 if FLAGS.edit == "interpolate" else 8
    chosen = numbers("pick", int) if FLAGS.pick else list(range(min(count, len(dataset.images))))
    for index in chosen:
        last = len(dataset.images) - 1
        require(0 <= index <= last, f"pick={index}: the images are numbered 0 to {last}")
    images = dataset.images[chosen].astype(np.float32) / 127.5 - 1
    if FLAGS.context is not None:
        vectors = contexts(settings)
        fits = len(vectors) in (1, len(chosen))
        require(fits, f"context={FLAGS.context!r}: it must be one, or one for each image")
        return images, np.broadcast_to(vectors, (len(chosen), vectors.shape[1]))
    if FLAGS.images is not None:
        return images, np.zeros((len(chosen), settings.network.n_cfeat), np.float32)
    return images, np.asarray(dataset.labels[chosen], np.float32)


def two_contexts(settings: Config) -> np.ndarray:
    """The contexts that an interpolation goes between."""
    if FLAGS.context is None:
        require(FLAGS.edit != "contexts", 'contexts needs two of them: --context="hero; spell"')
        return np.zeros((2, settings.network.n_cfeat), np.float32)
    vectors = contexts(settings)
    wanted = 2 if FLAGS.edit == "contexts" else 1
    require(wanted <= len(vectors) <= 2, f"context={FLAGS.context!r}: it must be two, split by a ;")
    return vectors


def mask(size: tuple[int, int]) -> np.ndarray:
    """Return the mask of --mask, (height, width, 1): 1 where pixels are known."""
    known = np.zeros((*size, 1), np.float32)
    row, column = size[0] // 2, size[1] // 2
    halves: dict[str, Any] = {
        **{"left": np.s_[:, :column], "right": np.s_[:, column:]},
        **{"top": np.s_[:row], "bottom": np.s_[row:]},
    }
    if not FLAGS.mask.endswith(".npy"):
        known[choose(halves, "mask", FLAGS.mask)] = 1
        return known
    given = data.load_npy(FLAGS.mask)
    require(
        given.shape in (size, known.shape) and np.isin(given, (0, 1)).all(),
        f"mask={FLAGS.mask} has shape {given.shape}: it must be {size}, of 0 and 1",
    )
    return given.reshape(known.shape).astype(np.float32)


if __name__ == "__main__":
    run(main)
