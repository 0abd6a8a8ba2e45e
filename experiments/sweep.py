"""Compare samplers, scales of guidance and recipes of training by the quality of their samples.

  python -m experiments.sweep
  python -m experiments.sweep --samplers=unipc:10:order=3,ddim --guidances=1,1.5 --n=5000
  python -m experiments.sweep --recipes="best course+prediction=v" --epochs=8 --samplers=ddim:25

The app samples from a run, or trains recipes first. A recipe is a preset and its changed fields,
each after a +. Flags of fields, such as --epochs, apply to all recipes. The samples of each sampler
with each guidance are measured as in experiments.evaluate. Each result is stored at once in
OUT/results.jsonl, and OUT/RECIPE is a run folder, so the same command continues where it was
stopped. OUT/results.md recommends a sampler for each number of evaluations, and OUT/results.png
plots the results. All cases start from the same noise and have the same contexts, which are the
labels of the real images.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from diffusion_jax import data, evaluation, samplers
from diffusion_jax.data import Dataset
from diffusion_jax.diffusion.guidance import Guidance, Model
from diffusion_jax.evaluation import (
    LEAST,
    MOST,
    Real,
    classifier,
    draw_like,
    measure_against,
    sweep,
)
from diffusion_jax.evaluation.sweep import Case, digest
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import environment, load_config, load_model, trainer
from diffusion_jax.runs.config import Config
from diffusion_jax.samplers import SAMPLERS, Tableau
from diffusion_jax.sampling import sample
from diffusion_jax.spec import Spec, choose
from diffusion_jax.typing import check_seed, require
from experiments import app, sweep_tables
from experiments.app import Args, describe, say
from experiments.presets import PRESETS, RECIPES

BUDGETS = (3, 5, 8, 10, 15, 25, 50)  # evaluations of a sampler that is given without steps

app.define_config()
app.define_run()
app.define_devices()
flags.DEFINE_string(
    "samplers",
    None,
    "the samplers, such as unipc:10:order=3,ddim; one without steps gets the most steps for "
    f"{', '.join(map(str, BUDGETS))} evaluations; by default all, and DDPM at every step; with "
    "--recipes, ddim:25",
)
flags.DEFINE_list("guidances", ["1"], "the guidances, as --guidance of experiments.sample; 1: none")
flags.DEFINE_string(
    "recipes",
    None,
    "train these instead of taking --run, such as best+prediction=v, with spaces between; all: "
    "those of docs/training.md",
)
flags.DEFINE_integer("n", 2000, f"samples of each case, {LEAST} to {MOST}")
flags.DEFINE_integer("real_n", 5000, f"real images in each of two sets, {LEAST} to {MOST}")
flags.DEFINE_integer("sampling_batch", 500, "images sampled at once")
flags.DEFINE_integer("sampling_seed", 0, "the seed of the samples")
flags.DEFINE_enum("sampling_dtype", "float32", list(PRECISIONS), "what sampling computes in")
flags.DEFINE_string("out", None, "the folder; by default RUN/sweep, or checkpoints/recipes")


class Subject(NamedTuple):
    """A run to sample from, and the data to train it on first, if any."""

    name: str
    folder: Path
    config: Config
    dataset: Dataset | None = None


class Method(NamedTuple):
    """A way to sample: a sampler and its tableau, and a guidance and its arguments of sample."""

    sampler: Spec
    tableau: Tableau
    guidance: str
    options: dict[str, Any]

    @property
    def evaluations(self) -> int:
        """Return the network passes of an image. Guidance doubles them."""
        return self.tableau.rows * (2 if self.options else 1)

    @property
    def words(self) -> dict[str, Any]:
        """Return the columns of the method in a table of results."""
        options = {k: v for k, v in self.sampler.options.items() if k != "steps"}
        series = self.sampler._replace(options=options)
        words = {"sampler": str(self.sampler), "series": str(series), "guidance": self.guidance}
        return words | {"evaluations": self.evaluations}


class Drawing(NamedTuple):
    """The options by which the samples of every case are drawn."""

    n: int
    batch: int
    seed: int
    dtype: str
    devices: Sequence[jax.Device]


class Task(NamedTuple):
    """A model, the real images for comparison, and evaluate, which measures samples."""

    config: Config
    model: Model
    real: Real
    params: Any
    evaluate: Callable[[], Callable]
    drawing: Drawing

    def case(self, method: Method) -> Case:
        """Return the settings that determine a method's result, and how to measure it."""
        drawing, worse = self.drawing, method.options.get("worse")
        parts = (json.dumps(self.config.to_dict()), self.model.variables, self.real[:3])
        settings = {
            "model and data": digest(*jax.tree.leaves((parts, self.params))),
            "sampler": method.sampler.full,
            "guidance": method.guidance,
            "devices": describe(drawing.devices),
        }
        if worse is not None:
            settings["worse"] = digest(*jax.tree.leaves(worse.variables))
        settings |= {k: v for k, v in drawing._asdict().items() if k != "devices"}
        return Case(settings, partial(self.measure, method))

    def measure(self, method: Method) -> dict[str, Any]:
        """Return the measures of a method's samples, and the seconds to draw them."""
        n, batch, seed, dtype, devices = self.drawing
        options = method.options | {"seed": seed, "dtype": dtype, "devices": devices}
        options |= {"batch_size": batch}
        sample(self.model, method.tableau, batch, rows=0, **options)  # this compiles
        begin = time.perf_counter()
        labels = self.real.reference.labels
        images, contexts = draw_like(self.model, method.tableau, labels, n, **options)
        seconds = time.perf_counter() - begin
        measured, _ = self.evaluate()(images, contexts)
        return {
            "seconds": seconds,
            "samples": {name: row.samples for name, row in measured.items()},
            "real": {name: row.real for name, row in measured.items()},
        }


def main(args: Args) -> None:
    """Check everything, then measure each case and write the tables."""
    out = Path("checkpoints/recipes") if args.recipes else Path(args.run) / "sweep"
    out = app.output_folder(args.out, out)
    subjects = read_recipes(args, out) if args.recipes else [read_run(Path(args.run))]
    methods = [plan(args, subject.config) for subject in subjects]
    drawing = read_drawing(args)
    real_images = cache(partial(evaluation.real_images, n=args.real_n))
    for subject in subjects:
        config = subject.config
        real = real_images(config.data, known=config.fingerprint)
        evaluation.check_shape(real, config.image_shape, config.n_cfeat)
    step = None if args.recipes else args.step
    args.refuse_unread("--recipes" if args.recipes else "a sweep without --recipes")
    say(f"{sum(map(len, methods))} cases on {describe(drawing.devices)}; results go to {out}")
    rows: list[dict[str, Any]] = []
    about = environment.describe(sys.argv, drawing.devices)
    about |= {"n": drawing.n, "devices": describe(drawing.devices)}
    for subject, chosen in zip(subjects, methods, strict=True):
        name, folder, config, dataset = subject
        if dataset is not None:
            devices = choose_devices(config.batch_size, args.devices)
            trainer.train_run(folder, config, dataset, devices, tell=say)
        model = load_model(folder, step)
        real = real_images(config.data, known=config.fingerprint)
        params = classifier.obtain(out / "classifier.npz", real.teaching, drawing.devices, say)
        evaluate = cache(partial(measure_against, real, params, drawing.devices))
        task = Task(config, model, real, params, evaluate, drawing)
        results = sweep.run(out / "results.jsonl", map(task.case, chosen))
        for method, found in zip(chosen, results, strict=True):
            rows.append({"subject": name} | method.words | found)
            say(sweep_tables.line(rows[-1]))
        for path in sweep_tables.write(out, rows, about | {"origin": real.origin}):
            say(f"written: {path}")


def read_drawing(args: Args) -> Drawing:
    """Return how samples are drawn. Raise InputError if a flag is invalid."""
    n, batch, count = args.n, args.sampling_batch, args.devices
    require(LEAST <= n <= MOST, f"n={n}: it must be in {LEAST}..{MOST}")
    require(1 <= batch <= 2**16, f"sampling_batch={batch}: it must be in 1..65536")
    devices = jax.local_devices() if count is None else choose_devices(max(count, 1), count)
    seed = check_seed(args.sampling_seed, "sampling_seed")
    return Drawing(n, min(n, batch), seed, args.sampling_dtype, devices)


def read_run(folder: Path) -> Subject:
    """Return the run in a folder. Raise InputError if the folder is not a run."""
    return Subject(folder.name, folder, load_config(folder))


def read_recipes(args: Args, out: Path) -> list[Subject]:
    """Return the recipes with their data. Raise InputError if one is invalid."""
    common, load, subjects = app.fields(args), cache(data.load), {}
    texts = re.split(rf"[,\s]+(?=(?:{'|'.join(PRESETS)})(?:[+,\s]|$))", args.recipes.strip())
    for text in RECIPES if args.recipes == "all" else texts:
        preset, *words = re.split(r"\+(?=[a-z_]+=)", text)
        changes = app.read_fields([word.split("=", 1) for word in words], f"recipes={text}")
        config = choose(PRESETS, "recipes", preset)().override(**common | changes)
        dataset = load(config.data)
        config, folder = config.fill_in(dataset), out / app.variant(text, args)
        trainer.check_folder(folder, config)
        choose_devices(config.batch_size, args.devices)
        subjects[text] = Subject(text, folder, config, dataset)
    return list(subjects.values())


def plan(args: Args, config: Config) -> list[Method]:
    """Return the methods for a run, cheapest first. Raise InputError if one is invalid."""
    schedule = config.build_schedule()
    texts = ["ddim:25"] if args.recipes else [*SAMPLERS, f"ddpm:{schedule.steps}"]
    if args.samplers:
        texts = samplers.split(args.samplers)
    specs = {str(spec): spec for text in texts for spec in samplers.spread(text, schedule, BUDGETS)}
    guidances = {text: guided(text, config) for text in args.guidances}
    require(guidances, "guidances: give at least one")
    methods = [
        Method(spec, samplers.build(spec, schedule), *guidance)
        for spec in specs.values()
        for guidance in guidances.items()
    ]
    return sorted(methods, key=lambda method: method.evaluations)


def guided(text: str, config: Config) -> dict[str, Any]:
    """Return a guidance as arguments of sample. The scale 1 gives none."""
    options = app.guided(text, config)
    return {} if options["guidance"] == Guidance() else options


if __name__ == "__main__":
    app.run(main)
