"""Compare recipes of training: each changes one thing of a preset, all see as many images.

  python -m experiments.recipes
  python -m experiments.recipes --recipes=best,best+learning_rate=0.001
  python -m experiments.recipes --out=mine --images=sprites.npy --labels=labels.npy --epochs=60

Trains each recipe's network, samples from it by DDIM and measures the samples as
experiments.evaluate does. OUT/RECIPE is a run folder; its recipe.json, written as soon as it is
finished, is a row of OUT/results.md. The same command goes on with the recipes that are left.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from diffusion_jax import checkpoints, data, evaluation, samplers, training
from diffusion_jax.config import Config, at_least
from diffusion_jax.data import Dataset
from diffusion_jax.evaluation import LEAST, Estimate, Real, classifier
from diffusion_jax.files import write_atomically
from diffusion_jax.optimizers import Length
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import Model, load_config, load_model, save_model
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling import sample
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, choose, require
from experiments.flags import FLAGS, define_devices, describe, output_folder, run
from experiments.presets import PRESETS
from experiments.tables import table


class Recipe(NamedTuple):
    """A preset, what is changed of it, and the scale of guidance in sampling, None without."""

    preset: str
    changes: dict[str, Any]
    guidance: float | None = None

    def __str__(self) -> str:
        """The recipe's name: best+learning_rate=0.001."""
        changes = self.changes | ({} if self.guidance is None else {"guidance": self.guidance})
        return "+".join([self.preset, *(f"{name}={_word(v)}" for name, v in changes.items())])

    @property
    def run(self) -> str:
        """The name of the run to sample from, which is the recipe's own without guidance."""
        return str(self._replace(guidance=None))


def _word(value: Any) -> str:
    return "-".join(value) if isinstance(value, tuple) else f"{value}"


CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "notes": (
        {},
        *({"learning_rate": rate} for rate in (2e-3, 5e-4, 3.3e-4)),
        *({"ema_decay": decay} for decay in (0.99, 0.999)),
        {"lr_schedule": "cosine", "warmup_steps": 200},
        {"schedule": "cosine"},
        *({"parameterization": name} for name in ("x0", "v")),
        {"loss_weighting": "min_snr"},
        {"norm": "group"},
        {"flips": ("all",)},
        *({"keep_probability": kept} for kept in (1.0, 0.8)),
        *({"batch_size": size} for size in (32, 128)),
    ),
    "best": (
        {},
        *({"learning_rate": rate} for rate in (4e-3, 1e-3, 6.7e-4)),
        *({"ema_decay": decay} for decay in (0.0, 0.99)),
        {"warmup_steps": 50},
        {"schedule": "notes"},
        *({"parameterization": name} for name in ("eps", "v")),
        {"loss_weighting": "min_snr"},
        {"norm": "group"},
        {"flips": ("all",)},
        *({"keep_probability": kept} for kept in (1.0, 0.8)),
        *({"batch_size": size} for size in (32, 128)),
    ),
}
GUIDANCES = (1.5, 2.0)
RECIPES = {
    str(recipe): recipe
    for preset, changes in CHANGES.items()
    for recipe in (
        *(Recipe(preset, change) for change in changes),
        *(Recipe(preset, {}, scale) for scale in GUIDANCES),
    )
}
COMMON = (
    "images",
    "labels",
    "image_size",
    "held_out",
    "n_images",
    "epochs",
    "batch_size",
    "n_feat",
)
SETTINGS = (*COMMON, "steps", "n", "real_n")
FREQUENCIES = (1.0,) * 5  # of the drawn sprites' classes
RESULT = "recipe.json"
BATCH = 500  # images sampled at once
COLUMNS = {
    "KID": "KID, classifier",
    "Frechet": "Frechet, classifier",
    "class accuracy": "class accuracy",
    "precision": "precision",
    "recall": "recall",
    "near training": "part near training",
}

define_devices()
flags.DEFINE_list("recipes", list(RECIPES), "which recipes; all by default")
flags.DEFINE_string("out", "checkpoints/recipes", "the folder for runs and results")
flags.DEFINE_string("images", "", "images of your own, as for experiments.train; empty: sprites")
flags.DEFINE_string("labels", "", "their labels")
flags.DEFINE_float("held_out", 0.0, "the part of them to measure against and not to train on")
flags.DEFINE_integer("image_size", 0, "scale the images of a folder to this height and width")
flags.DEFINE_integer("n_images", 4800, "how many sprites to draw")
flags.DEFINE_integer("epochs", 8, "how often each image is seen")
flags.DEFINE_integer("batch_size", 64, "images in a step, where a recipe has no other number")
flags.DEFINE_integer("n_feat", 32, "feature maps of all networks")
flags.DEFINE_integer("steps", 25, "steps of DDIM")
flags.DEFINE_integer("n", 1000, f"samples to measure, at least {LEAST}")
flags.DEFINE_integer("real_n", 5000, f"real images in each of two sets, at least {LEAST}")


def main() -> None:
    """Train and measure the recipes that are not finished; write the table after each."""
    chosen = [choose(RECIPES, "recipes", name) for name in FLAGS.recipes]
    at_least("n", FLAGS.n, LEAST)
    settings = {name: FLAGS[name].value for name in SETTINGS}
    configs = {str(recipe): config(recipe) for recipe in chosen}
    for each in configs.values():
        tableau(each.diffusion.build())  # which checks --steps
    out = output_folder("out", Path())
    done = finished(out, settings)
    left = [recipe for recipe in chosen if str(recipe) not in done]
    print(f"{out}: {len(chosen) - len(left)} recipes finished, {len(left)} to go", flush=True)
    if not left:
        return
    dataset = data.load(configs[str(left[0])].data)
    real = evaluation.real_images(configs[str(left[0])].data, FLAGS.real_n)
    configs = {name: each.fill_in(dataset) for name, each in configs.items()}
    for recipe in chosen:
        check_run(out / recipe.run, configs[str(recipe)])
    for recipe in left:
        model = trained(out / recipe.run, configs[str(recipe)], dataset)
        measures = measure(out, model, real, recipe.guidance)
        row = {"recipe": str(recipe), "settings": settings, "measures": measures}
        path = out / str(recipe) / RESULT
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(row, indent=1) + "\n").encode())
        print(markdown([row]))
        rows = finished(out, settings)
        ordered = [rows[name] for name in RECIPES if name in rows]
        write_atomically(out / "results.md", markdown(ordered).encode())


def config(recipe: Recipe) -> Config:
    """A recipe's configuration. Raises InputError for what cannot be."""
    common = {name: FLAGS[name].value for name in COMMON}
    values = common | {"class_frequencies": FREQUENCIES} | recipe.changes
    return PRESETS[recipe.preset]().override(**values)


def tableau(schedule: NoiseSchedule) -> Tableau:
    """The sampler. Raises InputError for steps that cannot be."""
    return samplers.build("ddim", schedule, FLAGS.steps)


def finished(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The rows that are there, by recipe. Raises InputError if they are of other settings."""
    rows = {}
    for path in out.glob(f"*/{RESULT}"):
        try:
            row = json.loads(path.read_text())
            theirs, name = row["settings"], row["recipe"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} is no result of this app: move it away") from None
        other = [f"{k}={theirs.get(k)}" for k in SETTINGS if theirs.get(k) != settings[k]]
        require(
            not other,
            f"out={str(out)!r} holds results of {', '.join(other)}: name another folder, or the "
            "old settings",
        )
        rows[name] = row
    return rows


def check_run(folder: Path, config: Config) -> None:
    """Raise InputError if there is a run of another configuration, or of other data."""
    if (folder / checkpoints.CONFIG).exists():
        differences = load_config(folder).differences(config)
        require(not differences, f"{folder} is another run: {'; '.join(differences)}")


def trained(folder: Path, config: Config, dataset: Dataset) -> Model:
    """The model of a run that is there already, or of one that is trained now."""
    if (folder / checkpoints.CONFIG).exists():
        return load_model(folder)
    settings = config.training
    length = Length(len(dataset.images), settings.batch_size, settings.epochs)
    devices = choose_devices(settings.batch_size, FLAGS.devices)
    state = training.init(config, length)
    about = f"{folder.name} on {describe(devices)}"
    with tqdm(total=length.steps, unit="step", desc=about) as bar:
        for chunk in training.fit(config, dataset.images, dataset.labels, state, devices):
            require(np.all(np.isfinite(chunk.losses)), f"{folder.name}: the loss is not finite")
            bar.update(len(chunk.losses))
    save_model(folder, config, chunk.state.ema)
    return load_model(folder)


def measure(out: Path, model: Model, real: Real, guidance: float | None) -> dict[str, Any]:
    """Each measure of samples, with its error, as lists; samples have the real images' labels."""
    devices = jax.local_devices()
    labels = real.reference.labels[np.arange(FLAGS.n) % len(real.reference.labels)]
    with tqdm(total=FLAGS.n, unit="image", desc="sampling") as bar:
        images = sample(
            model,
            tableau(model.schedule),
            FLAGS.n,
            context=labels,
            guidance=guidance,
            batch_size=min(BATCH, FLAGS.n),
            devices=devices,
            progress=bar.update,
        ).images
    require(np.all(np.isfinite(images)), "the samples are not finite numbers")
    params = classifier.obtain(out / "classifier.npz", real.teaching, devices, print)
    measured, _ = evaluation.evaluate(evaluation.to_pixels(images), labels, real, params, devices)
    return {
        name: {side: e._asdict() for side, e in row._asdict().items()}
        for name, row in measured.items()
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of finished recipes, above it real images."""
    real = {name: values["real"] for name, values in rows[0]["measures"].items()}
    lines = [["real images", *cells(real)]]
    for row in rows:
        samples = {name: values["samples"] for name, values in row["measures"].items()}
        lines.append([row["recipe"], *cells(samples)])
    return table(["recipe", *COLUMNS], lines) + "\n"


def cells(measures: dict[str, Any]) -> list[str]:
    """Estimates in words; empty where there is none."""
    found = [measures.get(name) for name in COLUMNS.values()]
    return [str(Estimate(**estimate)) if estimate else "" for estimate in found]


if __name__ == "__main__":
    run(main)
