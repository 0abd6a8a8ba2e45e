"""Learn a sampler of few steps for a trained run, without changing the network.

  python -m experiments.learn_sampler
  python -m experiments.learn_sampler --start=unipc:8 --objective=mmd --minutes=10
  python -m experiments.learn_sampler --start=sa_solver:5 --guidance=1.5 --free=guidance,mixing
  python -m experiments.sample --sampler=file:path=learned.json

The app begins with the sampler --start. It changes its levels, its weights of earlier predictions
and its noise until samples resemble the training images. A fifth of these images is not learned
from: the sampler that does best on it is kept. The app writes OUT, a sampler file that every app
takes, and a picture of the objective beside it.
"""

from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import data, learning, pictures, samplers, spec
from diffusion_jax.data import Dataset
from diffusion_jax.diffusion.guidance import Guidance
from diffusion_jax.learning import FREE, OBJECTIVES, Learned
from diffusion_jax.runs import load_config, load_model
from diffusion_jax.runs.config import Config
from diffusion_jax.runs.locks import check_writable
from diffusion_jax.tableau import interchange
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args, describe

HELD_OUT = 0.2  # of the training images, to choose by
OPTIONS = ("free", "batch_size", "learning_rate", "registers", "seed")

app.define("run", "step", "guidance", "devices", "cpu_devices")
flags.DEFINE_string("start", "sa_solver:5", "the sampler to begin with")
flags.DEFINE_string("objective", "energy", "what learning minimises")
flags.DEFINE_list("free", ["levels", "mixing", "noise"], f"what is learned, of {', '.join(FREE)}")
flags.DEFINE_float("minutes", 4.0, "the time for learning", 0.0, 1e4)
flags.DEFINE_integer("steps", None, "the steps of Adam, instead of --minutes", 1, 10**6)
flags.DEFINE_integer("batch_size", 128, "the samples in a step, over all devices", 16, 2**16)
flags.DEFINE_float("learning_rate", 0.05, "the learning rate of Adam at the first step")
flags.DEFINE_integer("registers", 3, "how many earlier predictions a step may use", 0, 8)
app.define_seed("the seed of noise, features and the order of images")
flags.DEFINE_string("out", "learned.json", "the sampler file")
app.SHOWN["objective"] = (OBJECTIVES, ())


def main(args: Args) -> None:
    """Learn a sampler, and write it."""
    out = Path(args.out)
    fits = out.suffix == ".json" and not out.exists()
    require(fits, f"out={args.out!r}: it must be a new file that ends in .json")
    check_writable(out.parent, "out")
    config, model = load_config(Path(args.run)), load_model(args.run, args.step)
    chosen = samplers.parse(args.start, model.schedule)
    start = samplers.build(chosen, model.schedule)
    objective = spec.parse(args.objective, OBJECTIVES, "objective")
    options = {name: getattr(args, name) for name in OPTIONS}
    options["guidance"] = read_guidance(args, config)
    options["minutes" if args.steps is None else "steps"] = args.steps or args.minutes
    devices = app.devices(args)
    args.refuse_unread("learning with --steps")
    held_out, training = data.split(data.load(config.data, config.fingerprint), 1 - HELD_OUT)
    if not model.class_names:
        training, held_out = map(without_labels, (training, held_out))
    app.print_once(f"{chosen}: {start.rows} evaluations; {describe(devices)}; compiling")
    with tqdm(unit="step", desc="learning") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        parts = training, held_out, objective.bind()()
        learned = learning.fit(model, start, *parts, devices=devices, progress=show, **options)
    write(out, learned, f"learned from {chosen} by {objective}, seed {args.seed}", config.schedule)


def read_guidance(args: Args, config: Config) -> Guidance | None:
    """Return --guidance. Raise InputError if it is invalid, or if it needs a second model."""
    given = {} if args.guidance is None else app.guided(args.guidance, config)
    second = given.get("guide_model") is not None
    require(not second, f"guidance={args.guidance}: samplers are learned with cfg only")
    return given.get("guidance")


def without_labels(dataset: Dataset) -> Dataset:
    """Return a data set whose contexts are zero, for a run that was trained without context."""
    return dataset._replace(labels=np.zeros_like(dataset.labels))


def write(out: Path, learned: Learned, about: str, schedule: str) -> None:
    """Write the sampler's file and a picture of the objective, and report what was learned."""
    steps, found = np.array(learned.curve).T
    interchange.write(out, learned.tableau, about, schedule)
    picture = out.with_suffix(".png")
    pictures.loss_curve(picture, steps, found, "objective on held-out images")
    words = f"step {learned.best} of --steps={learned.steps} is the best"
    app.print_once(f"{words}: {found.min():.4g} on held-out images, {found[0]:.4g} before")
    levels = ", ".join(f"{t:.1f}" for t in learned.tableau.t)
    scale = f"; guidance={learned.scale:.4g}" if learned.scale != 1 else ""
    app.print_once(f"levels t = {levels}{scale}")
    app.print_once(f"written: {out}, {picture}; sample with --sampler=file:path={out}")


if __name__ == "__main__":
    app.run(main)
