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
labels of the real images, so differences between cases are more exact than the cases themselves.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from diffusion_jax import data, evaluation, samplers
from diffusion_jax.data import Dataset
from diffusion_jax.diffusion.guidance import Guidance, Model
from diffusion_jax.evaluation import LEAST, MOST, Estimate, RealImages, classifier, draw_like, sweep
from diffusion_jax.evaluation.sweep import Case, Point, difference, digest, front
from diffusion_jax.files import write_atomically
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import environment, load_config, load_model, trainer
from diffusion_jax.runs.config import Config
from diffusion_jax.samplers import SAMPLERS, Tableau
from diffusion_jax.sampling import sample
from diffusion_jax.spec import Spec, choose
from diffusion_jax.typing import require
from experiments import app, tables
from experiments.app import Args, describe, print_once
from experiments.presets import PRESETS, RECIPES

STEPS_FOR = (3, 5, 8, 10, 15, 25, 50)  # evaluations of a sampler that is given without steps
SHOWN = ("KID", "Frechet", "class accuracy", "precision", "recall", "part near training")
PLOTTED = ("KID", "class accuracy")
HOW = (
    "Each row is measured on {n} samples. Real images: {origin}. Errors are standard errors. All "
    "rows have the same noise and contexts, so the error of a difference is that of paired "
    "samples. An evaluation is one pass of the network for one image; a step with guidance has "
    "two. Seconds are the time to draw all samples, on {devices}, without compilation."
)
WHICH = (
    "the samplers, separated by commas; for a sampler without a number of steps, the most steps "
    f"within {', '.join(map(str, STEPS_FOR))} network evaluations; by default all samplers and "
    "DDPM at every step, or ddim:25 with --recipes"
)
TRAINED = (
    "the recipes to train instead of sampling from --run, separated by spaces, such as "
    "best+prediction=v; all stands for the recipes of docs/training.md"
)
app.define("preset", "run", "step", "devices", "cpu_devices")
flags.DEFINE_string("samplers", None, WHICH)
flags.DEFINE_list("guidances", ["1"], "the kinds of guidance to compare; 1 is without guidance")
flags.DEFINE_string("recipes", None, TRAINED)
flags.DEFINE_integer("n", 2000, f"samples of each case, {LEAST} to {MOST}", LEAST, MOST)
flags.DEFINE_integer("real_n", 5000, f"images in each of two real sets, from {LEAST}", LEAST, MOST)
flags.DEFINE_integer("sampling_batch", 500, "images sampled at once", 1, 2**16)
app.define_seed("the seed of the samples", "sampling_seed")
flags.DEFINE_enum("sampling_dtype", "float32", list(PRECISIONS), "the network's precision")
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


def main(args: Args) -> None:
    """Check everything, then measure each case and write the tables."""
    run = Path(args.run)
    default = Path("checkpoints/recipes") if args.recipes else run / "sweep"
    out = app.output_folder(args.out, default)
    runs = read_recipes(args, out) if args.recipes else [Subject(run.name, run, load_config(run))]
    methods = [plan(args, subject.config) for subject in runs]
    n, devices = args.n, app.devices(args)
    options = {"seed": args.sampling_seed, "dtype": args.sampling_dtype, "devices": devices}
    options |= {"batch_size": min(n, args.sampling_batch)}
    real_images = cache(partial(evaluation.real_images, n=args.real_n))
    for subject in runs:
        config = subject.config
        real = real_images(config.data, known=config.fingerprint)
        evaluation.check_shape(real, config.image_shape, config.n_cfeat)
    step = None if args.recipes else args.step
    args.refuse_unread("--recipes" if args.recipes else "a sweep without --recipes")
    print_once(f"{sum(map(len, methods))} cases on {describe(devices)}; results go to {out}")
    about = environment.describe(sys.argv, devices) | {"n": n, "devices": describe(devices)}
    words: list[dict[str, str]] = []
    points: list[Point] = []
    for (name, folder, config, dataset), chosen in zip(runs, methods, strict=True):
        if dataset is not None:
            trained_on = choose_devices(config.batch_size, args.devices)
            trainer.train_run(folder, config, dataset, trained_on, report=print_once)
        model = load_model(folder, step)
        real = real_images(config.data, known=config.fingerprint)
        params = classifier.obtain(out / "classifier.npz", real.teaching, devices, print_once)
        cases = plan_cases(model, config, real, params, chosen, n, options)
        results = sweep.run(out / "results.jsonl", cases)
        for method, found in zip(chosen, results, strict=True):
            words.append({"run": name, "sampler": str(method.sampler), "guidance": method.guidance})
            points.append(point_of(method, found, f"{name}, " if len(runs) > 1 else ""))
            measured = ", ".join(f"{k} {v}" for k, v in points[-1].measures.items())
            print_once(f"{name}, {method.sampler}, guidance {method.guidance}: {measured}")
        write(out, words, points, choose_shown(found["real"]), about | {"origin": real.origin})


def read_recipes(args: Args, out: Path) -> list[Subject]:
    """Return the recipes with their data. Raise InputError if one is invalid."""
    common, load, subjects = app.fields(args), cache(data.load), {}
    texts = re.split(rf"[,\s]+(?=(?:{'|'.join(PRESETS)})(?:[+,\s]|$))", args.recipes.strip())
    for text in RECIPES if args.recipes == "all" else texts:
        preset, *words = re.split(r"\+(?=[a-z_]+=)", text)
        changes = app.read_fields([word.split("=", 1) for word in words], f"recipes={text}")
        config = choose(PRESETS, "recipes", preset)().refine(**common).refine(**changes)
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
    specs = {str(s): s for text in texts for s in samplers.spread(text, schedule, STEPS_FOR)}
    guidances = {text: app.guided(text, config) for text in args.guidances}
    require(guidances, "guidances: give at least one")
    for text, options in guidances.items():
        if options["guidance"] == Guidance():  # the scale 1
            guidances[text] = {}
    methods = [
        Method(spec, samplers.build(spec, schedule), text, options)
        for spec in specs.values()
        for text, options in guidances.items()
    ]
    return sorted(methods, key=lambda method: method.evaluations)


def plan_cases(
    model: Model,
    config: Config,
    real: RealImages,
    params: Any,
    methods: Sequence[Method],
    n: int,
    options: dict[str, Any],
) -> Iterator[Case]:
    """Yield the settings that determine the result of each method, and how to measure it."""
    identity = json.dumps(config.to_dict()), model.variables, real[:3], params
    settings = {"model and data": digest(*jax.tree.leaves(identity)), "n": n, **options}
    settings["devices"] = describe(options["devices"])
    evaluate = cache(partial(evaluation.measure_against, real, params, options["devices"]))
    for method in methods:
        own = {"sampler": method.sampler.full, "guidance": method.guidance}
        if (guide_model := method.options.get("guide_model")) is not None:
            own["guide_model"] = digest(*jax.tree.leaves(guide_model.variables))
        given, labels = method.options | options, real.reference.labels
        drawn = model, method.tableau, labels, n, given
        yield Case(settings | own, partial(measure, *drawn, evaluate))


def measure(
    model: Model,
    tableau: Tableau,
    labels: Any,
    n: int,
    options: dict[str, Any],
    evaluate: Callable[[], Callable],
) -> dict[str, Any]:
    """Return the measures of samples, and the seconds to draw them.

    evaluate: returns the function that measures; it is called only if it is needed."""
    sample(model, tableau, options["batch_size"], rows=0, **options)  # this compiles
    begin = time.perf_counter()
    images, contexts = draw_like(model, tableau, labels, n, **options)
    seconds = time.perf_counter() - begin
    rows = evaluate()(images, contexts)[0].items()
    found = {side: {name: getattr(row, side) for name, row in rows} for side in ("samples", "real")}
    return {"seconds": seconds} | found


def choose_shown(found: dict[str, list]) -> dict[str, Estimate]:
    """Return the measures of SHOWN that were stored, KID and Frechet in their first space."""
    keys = {key.split(",")[0]: key for key in reversed(found)}
    return {name: Estimate(*found[keys[name]]) for name in SHOWN if name in keys}


def point_of(method: Method, found: dict[str, Any], prefix: str) -> Point:
    """Return a result as a point of the plot. prefix: the run's name, if there are several."""
    guided = "" if method.guidance == "1" else f", guidance {method.guidance}"
    options = {k: v for k, v in method.sampler.options.items() if k != "steps"}
    names = method.sampler, method.sampler._replace(options=options)
    label, series = (f"{prefix}{name}{guided}" for name in names)
    shown = choose_shown(found["samples"])
    return Point(label, series, method.evaluations, found["seconds"], shown)


def write(
    out: Path,
    words: Sequence[dict[str, str]],
    points: Sequence[Point],
    real: dict[str, Estimate],
    about: dict[str, Any],
) -> None:
    """Write results.md and results.png, cheapest rows first. words: the first columns of rows."""
    best, cheapest = min(points, key=lambda p: p.quality), front(points, "evaluations")
    rows: list[dict[str, Any]] = [
        first
        | {"evaluations": point.evaluations, "seconds": point.seconds, **point.measures}
        | {"KID minus the best": difference(point, best) if point is not best else "best"}
        | {"front": "*" if point in cheapest else ""}
        for first, point in sorted(zip(words, points, strict=True), key=lambda p: p[1].evaluations)
    ]
    rows.append({"run": "real against real", **real})
    advice = "\n".join(f"- {sentence}" for sentence in sweep.advise(points))
    parts = ["# Quality against cost", tables.header(about), HOW.format(**about), advice]
    costs = {"seconds": f"seconds for {about['n']} images", "evaluations": "network evaluations"}
    text = "\n\n".join([*parts, tables.table(rows)]) + "\n"
    write_atomically(out / "results.md", text.encode())
    write_atomically(out / "results.png", tables.plot(points, costs, PLOTTED, real))
    print_once(f"written: {out / 'results.md'}, {out / 'results.png'}")


if __name__ == "__main__":
    app.run(main)
