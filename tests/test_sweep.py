"""Sweeps: the cases, the stored results, the conclusions, and the app."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from diffusion_jax import data, evaluation, samplers
from diffusion_jax.evaluation import Row, classifier, samples, sweep
from diffusion_jax.evaluation.distances import kernel_distance
from diffusion_jax.evaluation.estimate import Estimate
from diffusion_jax.evaluation.spaces import spaces
from diffusion_jax.evaluation.sweep import Case, Point
from diffusion_jax.runs import load_config, load_model, save_model, trainer
from diffusion_jax.runs.config import Config
from diffusion_jax.sampling import Samples, sample
from diffusion_jax.typing import InputError
from experiments import app, presets, tables
from tests import apps
from tests.models import TINY, untrained

SIZES = ("--n=100", "--real_n=100", "--devices=2")
NEW = ("--network=tiny", "--schedule=course:steps=20", "--epochs=1")


# ----------------------------------------------------------------------------------- what is kept


def case(name: str, found: float | None) -> Case:
    """Return a case. If found is None, it must not be measured."""

    def measure() -> dict:
        assert found is not None, f"{name} is measured again"
        return {"value": (found, 0.5)}

    return Case({"sampler": name, "n": 3}, measure)


def test_a_sweep_continues_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    going = sweep.run(path, [case("a", 0.1), case("b", 0.2)])
    assert next(going) == {"value": [0.1, 0.5]}
    assert len(path.read_text().splitlines()) == 1, "written at once"
    list(sweep.run(path, [case("c", 0.3)]))  # a different command, in the meantime
    assert list(going) == [{"value": [0.2, 0.5]}]
    assert len(path.read_text().splitlines()) == 3
    again = sweep.run(path, [case(name, None) for name in "abc"])
    assert [found["value"][0] for found in again] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"value": [0.2', '"value": [0.1'),
        lambda text: text.replace('"sampler": "b"', '"sampler": "a"'),
        lambda text: text[:-5],
        lambda text: text.replace('"sha256"', '"crc"'),
        lambda text: text + "[" * 100_000,
        lambda text: text.replace('{"found": {"value": [0.2, 0.5]}, ', "{"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "results.jsonl"
    list(sweep.run(path, [case("a", 0.1), case("b", 0.2)]))
    whole = path.read_text()
    path.write_text(change(whole))
    assert path.read_text() != whole
    with pytest.raises(InputError, match=rf"{path}: line [123] is damaged: remove the line"):
        next(sweep.run(path, [case("a", None)]))


def test_a_digest_is_of_all_values() -> None:
    one = sweep.digest("a", np.arange(3.0))
    assert one == sweep.digest(b"a", np.arange(3.0))
    others = [sweep.digest("b", np.arange(3.0)), sweep.digest("a", np.array([0.0, 1.0, 2.1]))]
    assert len({one, *others}) == 3


# ----------------------------------------------------------------------------------- what is tried


def test_a_name_without_steps_has_the_most_steps_for_each_budget() -> None:
    schedule = TINY.build_schedule()
    found = samplers.spread("heun:grid=karras:rho=5", schedule, (3, 5, 8, 10, 50))
    steps = [spec.options["steps"] for spec in found]
    assert steps == [2, 3, 4, 5, 25]
    assert str(found[0]) == "heun:2:grid=karras:rho=5"
    assert [str(spec) for spec in samplers.spread("ddim:7", schedule, (3,))] == ["ddim:7"]


@pytest.mark.filterwarnings("ignore:.*is unstable")
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_has_points(name: str) -> None:
    schedule = TINY.build_schedule()
    rows = [samplers.build(s, schedule).rows for s in samplers.spread(name, schedule, (10, 25, 50))]
    assert rows == sorted(rows)
    assert 20 < rows[-1] <= 50


# ----------------------------------------------------------------------------------------- the app


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return runs of an untrained network for 8x8 images of two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    images = rng.integers(0, 128, (300, 8, 8, 3)) + 128 * labels[:, None, None, None]
    np.save(folder / "images.npy", images.astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "mixed.npy", rng.uniform(size=(300, 2)).astype(np.float32))
    for name, file, fields in (
        ("run", "labels", {}),
        ("always", "labels", {"keep_probability": 1.0}),
        ("mixed", "mixed", {"null_context": True}),
    ):
        text = f"npy:images={folder}/images.npy:labels={folder}/{file}.npy"
        config = TINY.override(data=text, **fields)
        config = config.fill_in(data.load(config.data))
        save_model(folder / name, config, untrained(config).variables)
    return folder


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Record the numbers of images that are drawn, and train no classifier."""
    sizes: list[int] = []

    def counted(model, tableau, n, **options):
        sizes.append(n)
        return sample(model, tableau, n, **options)

    monkeypatch.setattr(samples, "sample", counted)
    monkeypatch.setattr(
        classifier, "train", lambda data, _: classifier.init(classifier.network(data))
    )
    return sizes


@pytest.fixture
def quick(drawn, monkeypatch) -> list[int]:
    """Do the same with images of noise, and let KID be their mean."""

    def noise(model, tableau, n, **options) -> Samples:
        drawn.append(n)
        return Samples(np.random.default_rng(n).normal(size=(n, 8, 8, 3)), None)

    def measure_against(real, params, devices) -> Callable:
        def evaluate(images: np.ndarray, labels: np.ndarray) -> tuple:
            kid = Estimate(float(images.mean()), 0.1)
            return {"KID, classifier": Row(kid, kid)}, None

        return evaluate

    monkeypatch.setattr(samples, "sample", noise)
    monkeypatch.setattr("diffusion_jax.sampling.sample", lambda *_, **__: None)  # it only compiles
    monkeypatch.setattr(evaluation, "measure_against", measure_against)
    return drawn


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_run_is_measured_once_for_each_setting(folder, tmp_path, quick, capsys) -> None:
    command = ("sweep", f"--run={folder}/run", f"--out={tmp_path}", *SIZES)
    few = ("--samplers=heun:2,ddim:2,ddim:2", "--guidances=1,cfg:2:rescale=0.5")
    apps.call(*command, *few)
    assert quick == [100] * 4
    found = re.findall(r"run, (\S+), guidance (\S+): KID", capsys.readouterr().out)
    cheapest_first = [("ddim:2", "1"), ("heun:2", "1")]
    assert found == [*cheapest_first, *((name, "cfg:2:rescale=0.5") for name, _ in cheapest_first)]
    kept = lines(tmp_path)
    apps.call(*command, *few)
    apps.call(*command, "--samplers=ddim:2")
    assert (quick, lines(tmp_path)) == ([100] * 4, kept)
    for other in ("--sampling_seed=1", "--n=101", "--real_n=101", "--sampling_dtype=bfloat16"):
        apps.call(*command, "--samplers=ddim:2", other)
    assert quick == [*[100] * 5, 101, 100, 100]
    text = (tmp_path / "results.md").read_text()
    assert "| run | ddim:2 | 1 | 2 |" in text
    assert "| real against real |  |" in text
    assert "With at most 5 evaluations use ddim:2 (2 evaluations, " in text
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_other_weights_are_measured_anew(folder, tmp_path, quick) -> None:
    model, out = load_model(folder / "run"), tmp_path / "out"
    other = jax.tree.map(lambda leaf: leaf * 0.9, model.variables)
    save_model(tmp_path / "other", load_config(folder / "run"), other)
    for run in (folder / "run", tmp_path / "other"):
        apps.call("sweep", f"--run={run}", f"--out={out}", *SIZES, "--samplers=ddim:2")
    assert len(quick) == len(lines(out)) == 2


def test_a_result_is_what_its_samples_measure(folder, tmp_path, drawn) -> None:
    """Draw the samples again, and compute KID and class accuracy by the functions for them."""
    command = ("sweep", f"--run={folder}/run", f"--out={tmp_path}", *SIZES, "--sampling_seed=7")
    apps.call(*command, "--samplers=ddim:3", "--guidances=2")
    (line,) = lines(tmp_path)
    model, config = load_model(folder / "run"), load_config(folder / "run")
    real = evaluation.real_images(config.data, 100, known=config.fingerprint)
    labels = real.reference.labels[:100]
    tableau = samplers.build("ddim", model.schedule, 3)
    images = sample(model, tableau, 100, context=labels, guidance=2.0, seed=7).images
    pixels = np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)
    params = classifier.load(tmp_path / "classifier.npz", real.teaching)
    devices = jax.devices()[:2]
    space = spaces(real.teaching, params, devices)["classifier"]
    kid = kernel_distance(space(real.reference.images), space(pixels))
    found = line["found"]["samples"]
    assert found["KID, classifier"][0] == pytest.approx(kid.value, rel=0.02)
    logits = jax.jit(classifier.network(real.teaching).apply)({"params": params}, pixels)
    right = np.asarray(logits).argmax(1) == labels.argmax(1)
    accuracy = np.mean([right[labels[:, k] == 1].mean() for k in range(2)])
    assert found["class accuracy"][0] == pytest.approx(accuracy, abs=0.02)


def test_a_run_without_classes_has_only_its_kid(folder, tmp_path, drawn) -> None:
    apps.call("sweep", f"--run={folder}/mixed", f"--out={tmp_path}", *SIZES, "--samplers=ddim:2")
    (line,) = lines(tmp_path)
    assert "KID, random" in line["found"]["samples"]
    assert "class accuracy" not in (tmp_path / "results.md").read_text()


def test_a_recipe_is_trained_and_measured_once(folder, tmp_path, quick, monkeypatch) -> None:
    trained: list[int] = []

    def train(folder: Path, config: Config, dataset: data.Dataset, devices, report) -> None:
        trained.append(len(dataset.images) // config.batch_size)
        if not folder.exists():
            save_model(folder, config, untrained(config).variables)

    monkeypatch.setattr(trainer, "train_run", train)
    files = f"--data=npy:images={folder}/images.npy:labels={folder}/labels.npy"
    command = ("sweep", f"--out={tmp_path}", *SIZES, *NEW, files, "--samplers=ddim:2")
    recipe = "--recipes=best+batch_size=60+optimizer=adam:0.01:decay=cosine"
    apps.call(*command, recipe, "--guidances=1,1.5")
    (run,) = tmp_path.glob("best+*")
    config = load_config(run)
    assert (config.batch_size, config.epochs) == (60, 1)
    assert config.specs()["optimizer"].options["learning_rate"] == 0.01
    assert config.prediction.startswith("x0"), "the preset's"
    assert [line["settings"]["guidance"] for line in lines(tmp_path)] == ["1", "1.5"]
    text = (tmp_path / "results.md").read_text()
    assert text.count(f"| {recipe.removeprefix('--recipes=')} | ddim:2 | ") == 2
    apps.call(*command, recipe)
    assert trained == [5, 5], "the second one finds the run complete"
    assert len(quick) == len(lines(tmp_path)) == 2
    with pytest.raises(InputError, match="a different configuration: epochs: 1 -> 2"):
        apps.call(*command, recipe, "--epochs=2")


def test_recipes_are_told_apart_by_their_presets(folder, tmp_path, drawn) -> None:
    """Separate recipes by spaces or commas. An invalid last one is refused before training."""
    recipes = "best+ema=none,course+data=sprites:n=9:frequencies=1,1,1,1,1 demo+seed=-1"
    with pytest.raises(InputError, match="seed=-1: it must be"):
        apps.call("sweep", f"--out={tmp_path}/new", *SIZES, *NEW, f"--recipes={recipes}")
    for recipe in presets.RECIPES:
        preset, _, change = recipe.partition("+")
        config = presets.PRESETS[preset]()
        assert (
            not change or config.override(**app.read_fields([change.split("=", 1)], "")) != config
        )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--samplers=dimm"], "sampler='dimm' is unknown: did you mean ddim"),
        (["--samplers=ddim:41"], r"steps=41: it must be in 1\.\.40"),
        (["--samplers=ddim:5:order=3"], "ddim has no option order"),
        (["--samplers=ddim:5:grid=square"], "grid=square: it must be one of course"),
        (["--guidances=strong"], "guidance='strong' is unknown"),
        (["--guidances=nan"], "guidance: scale=nan: it must be finite"),
        (["--guidances="], "guidances: give at least one"),
        (["--n=99"], r"n=99: 99 is not an integer in the range \[100, 100000\]"),
        (["--real_n=99"], r"real_n=99: 99 is not an integer in the range \[100, 100000\]"),
        (["--sampling_seed=-1"], r"sampling_seed=-1: -1 is not an integer in the range \[0, 4294"),
        (["--sampling_batch=0"], "sampling_batch=0: 0 is not an integer in the range"),
        (["--devices=3000"], "devices=3000: this machine has 8"),
        (["--run={}/always", "--guidances=1,2"], "guidance=2: this run was trained only with or"),
        (["--run={}/none"], r"run='.*none': there is no such folder"),
        (["--out={}/images.npy"], r"out='.*images\.npy' is a file: name a folder"),
        (["--recipes=worst"], "recipes='worst' is unknown: choose from course"),
        (["--recipes=best+width=3"], r"recipes=best\+width=3='width' is unknown: choose from data"),
        (["--recipes=best+epochs=few"], "epochs=few: it must be a number"),
        (["--recipes=best+prediction=w"], "prediction='w' is unknown"),
        (["--recipes=course", "--data=npy:images={}/none.npy"], r"none\.npy"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    folder, tmp_path, drawn, given: list[str], match: str
) -> None:
    command = ("sweep", f"--run={folder}/run", f"--out={tmp_path / 'new'}", "--samplers=ddim:2")
    with pytest.raises((InputError, flags.Error), match=match):
        apps.call(*command, *(flag.replace("{}", str(folder)) for flag in given))
    assert not drawn
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------- the conclusions


def points(seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point(
            f"{name}:{n}{guided}",
            f"{name}{guided}",
            n * (2 if guided else 1),
            n * 0.01 * (2 if guided else 1),
            {
                "KID": Estimate(float(rng.normal(0.1 / n, 0.01)), 0.004),
                "class accuracy": Estimate(float(rng.uniform(0.9, 1)), 0.01),
            },
        )
        for name in ("ddpm", "ddim", "heun")
        for n in (3, 8, 25, 100)
        for guided in ("", ", guidance 2")
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_cheapest_within_an_error_of_the_best(seed: int) -> None:
    every = points(seed)
    assert sweep.choose_within(every, 2) is None
    for budget in (3, 10, 50, 1000):
        able = [p for p in every if p.evaluations <= budget]
        cheapest, best = sweep.choose_within(every, budget)
        assert best.quality.value == min(p.quality.value for p in able)
        assert cheapest in able
        error = 0.004 * np.sqrt(2)  # of a difference of independent estimates
        assert cheapest.quality.value <= best.quality.value + error
        for p in able:
            if p.evaluations < cheapest.evaluations:
                assert p.quality.value > best.quality.value + error


@pytest.mark.parametrize("cost", ["evaluations", "seconds"])
@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_what_nothing_as_cheap_reaches(seed: int, cost: str) -> None:
    every = points(seed)

    def key(p: Point) -> tuple[float, float]:
        return getattr(p, cost), p.quality.value

    def reaches(q: Point, p: Point) -> bool:
        return key(q) != key(p) and key(q)[0] <= key(p)[0] and key(q)[1] <= key(p)[1]

    best = [p for p in every if not any(reaches(q, p) for q in every)]
    assert sweep.front(every, cost) == sorted(best, key=key)


def test_the_advice_is_the_choice_for_each_budget() -> None:
    every = points(0)
    sentences = list(sweep.advise(every, (2, 10, 1000)))
    for sentence, budget in zip(sentences, (10, 1000), strict=True):
        cheapest, best = sweep.choose_within(every, budget)
        assert sentence.startswith(f"With at most {budget} evaluations use {cheapest.label} (")
        assert (f"as good as the best, {best.label} (" in sentence) == (best is not cheapest)


def test_a_difference_is_paired_block_by_block() -> None:
    """Compare with a double loop over the kernel, and with the scatter of independent trials."""

    def mmd(x: np.ndarray, y: np.ndarray) -> float:
        def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a @ b.T / x.shape[1] + 1) ** 3

        def within(a: np.ndarray) -> float:
            return (kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1))

        return within(x) + within(y) - 2 * kernel(x, y).mean()

    def trial(seed: int) -> tuple[Estimate, list[Estimate], list[np.ndarray]]:
        rng = np.random.default_rng(seed)
        real, ours = rng.normal(size=(2, 100, 4))
        sets = [real, ours + 0.1, ours + 0.05 * rng.normal(size=ours.shape)]
        found = [kernel_distance(np.float32(real), np.float32(each)) for each in sets[1:]]
        pair = [Point("", "", 1, 1.0, {"KID": each}) for each in found]
        return sweep.difference(*pair), found, sets

    gap, found, (real, *sets) = trial(0)
    left = []
    for block in range(10):
        kept = np.arange(100) // 10 != block
        left.append(mmd(real[kept], sets[0][kept]) - mmd(real[kept], sets[1][kept]))
    assert gap.value == pytest.approx(mmd(real, sets[0]) - mmd(real, sets[1]), abs=1e-6)
    assert gap.error == pytest.approx(3 * np.std(left), rel=1e-3)
    assert gap.error < 0.7 * np.hypot(*(each.error for each in found))
    trials = [trial(seed)[0] for seed in range(100)]
    scatter = np.std([each.value for each in trials])
    assert 0.7 < np.mean([each.error for each in trials]) / scatter < 1.5


@pytest.mark.parametrize("error", [0.0, 0.01])
@pytest.mark.parametrize("count", [1, 2])
def test_points_that_are_alike_are_drawn(count: int, error: float) -> None:
    found = [Point("a:5", "a", 5 + i, 0.1, {"KID": Estimate(0.1, error)}) for i in range(count)]
    for value in (0.1, 0.0):
        drawn = [p._replace(measures={"KID": Estimate(value, error)}) for p in found]
        png = tables.plot(drawn, {"seconds": "s", "evaluations": "n"}, ["KID"])
        assert png.startswith(b"\x89PNG")
