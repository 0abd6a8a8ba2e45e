"""The sweep of quality against cost: what it plans, keeps and concludes."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import evaluation, samplers
from diffusion_jax.evaluation import classifier
from diffusion_jax.runs import Model
from diffusion_jax.sampling import sample
from diffusion_jax.typing import InputError, RunWarning
from experiments import quality, quality_tables
from experiments.measure import Setting, parse_case
from tests.models import untrained

DEVICES = jax.devices()[:2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """An untrained network for 8x8 images of two classes, which are dark and bright."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    images = rng.integers(0, 128, (300, 8, 8, 3)) + 128 * labels[:, None, None, None]
    np.save(folder / "images.npy", images.astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    files = {name: str(folder / f"{name}.npy") for name in ("images", "labels")}
    return untrained(n_cfeat=2, **files)


@pytest.fixture
def fast(monkeypatch) -> list[int]:
    """No training of a classifier, parts of 60 images, and the sizes of parts that are drawn."""
    drawn: list[int] = []
    draw = Setting.draw

    def counted(self, tableau, **options):
        drawn.append(self.batch)
        return draw(self, tableau, **options)

    monkeypatch.setattr(
        classifier, "train", lambda data, _: classifier.init(classifier.network(data))
    )
    monkeypatch.setattr(quality, "PART", 60)
    monkeypatch.setattr(Setting, "draw", counted)
    return drawn


def words(cases: list[quality.Case]) -> list[tuple[str, float, int]]:
    return [(case.word, case.guidance, case.passes) for case in cases]


# ------------------------------------------------------------------------------------- the plan


def test_a_name_alone_is_the_steps_that_its_evaluations_leave_room_for(model) -> None:
    heun = [("heun:2", 3), ("heun:3", 5), ("heun:4", 7), ("heun:5", 9), ("heun:8", 15)]
    heun += [("heun:13", 25), ("heun:25", 49)]
    found = words(quality.plan(["heun", "ddpm:40"], ["1"], model.config))
    assert found == sorted([(w, 1, n) for w, n in [*heun, ("ddpm:40", 40)]], key=lambda c: c[2])


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_has_points(name: str, model) -> None:
    passes = [case.passes for case in quality.plan([name], ["1"], model.config)]
    assert passes == sorted(passes)
    assert passes[-1] > 20
    assert max(passes) <= 50


def test_guided_evaluations_count_twice_and_nothing_is_measured_twice(model) -> None:
    given = ["ddim:5", "ddim:5", "unipc:3"], ["1", "2", "1.0"]
    want = [("unipc:3", 1, 3), ("ddim:5", 1, 5), ("unipc:3", 2, 6), ("ddim:5", 2, 10)]
    assert words(quality.plan(*given, model.config)) == want


def test_a_word_has_options_and_a_grid(model) -> None:
    found = parse_case("dpmpp_multistep:8:order=3:grid=karras:rho=5", model.schedule)
    want = samplers.build("dpmpp_multistep", model.schedule, 8, "karras", order=3, rho=5)
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("given", "scales", "match"),
    [
        (["dimm"], ["1"], "samplers='dimm' is unknown: choose from ddpm"),
        (["ddim:41"], ["1"], r"steps=41: it must be in 1\.\.40"),
        (["ddim:5:order=3"], ["1"], "sampler ddim takes no order: it takes eta"),
        (["ddim:5:eta"], ["1"], "options=eta: write them as order=3"),
        (["ddim:5:grid=square"], ["1"], "grid='square' is unknown"),
        (["ddim"], ["strong"], "guidance_scales=strong: they must be finite numbers"),
        (["ddim"], ["nan"], "guidance_scales=nan: they must be finite numbers"),
        ([], ["1"], "give at least one of each"),
    ],
)
def test_what_cannot_be_planned(model, given: list, scales: list, match: str) -> None:
    with pytest.raises(InputError, match=match):
        quality.plan(given, scales, model.config)


def test_a_run_without_context_is_not_guided(model) -> None:
    config = model.config.override(keep_probability=1.0)
    assert quality.plan(["ddim:5"], ["1"], config)
    with pytest.raises(InputError, match="guidance_scales=2: this run was trained only with or"):
        quality.plan(["ddim:5"], ["1", "2"], config)


# ------------------------------------------------------------------------------------ the points


def sweep_of(model: Model, folder: Path, n: int = 100) -> quality.Sweep:
    return quality.sweep(model, n, 150, 7, "float32", folder, DEVICES)


def test_a_sweep_goes_on_where_it_was_stopped(model, tmp_path, fast) -> None:
    cases = quality.plan(["ddim:2", "ddim:3", "heun:3"], ["1"], model.config)
    first = quality.measure_points(sweep_of(model, tmp_path), cases[:2])
    assert fast == [60, 40] * 2
    assert quality.measure_points(sweep_of(model, tmp_path), cases)[:2] == first
    assert fast == [60, 40] * 3
    (tmp_path / "points.jsonl").unlink()  # the samples are still there
    assert quality.measure_points(sweep_of(model, tmp_path), cases)[:2] == first
    assert fast == [60, 40] * 3
    more = quality.measure_points(sweep_of(model, tmp_path, 120), cases[:1])
    assert fast == [60, 40] * 3 + [60]  # the last part was too short
    assert more[0]["KID"] != first[0]["KID"]
    assert len((tmp_path / "points.jsonl").read_text().splitlines()) == 4


def test_what_is_damaged_is_not_measured(model, tmp_path, fast) -> None:
    """A part of zeros is drawn anew; a changed point, or classifier, does not count as known."""
    cases = quality.plan(["ddim:2"], ["1"], model.config)
    first = quality.measure_points(sweep_of(model, tmp_path), cases)
    points, (part, _) = tmp_path / "points.jsonl", sorted(tmp_path.glob("samples/*/*.npy"))
    whole = points.read_text()
    points.write_text(whole.replace('"value": ', '"value": 1'))
    with pytest.raises(InputError, match=r"points\.jsonl is damaged: move it away"):
        quality.measure_points(sweep_of(model, tmp_path), cases)
    points.unlink()
    np.save(part, np.zeros_like(np.load(part)))
    with pytest.warns(RunWarning, match=f"{part} is damaged: its images are drawn anew"):
        assert quality.measure_points(sweep_of(model, tmp_path), cases) == first
    assert fast == [60, 40, 60]
    assert points.read_text() == whole
    sweep = sweep_of(model, tmp_path)
    other = jax.tree.map(lambda leaf: leaf * 0.9, sweep.yardstick.params)
    sweep = sweep._replace(yardstick=sweep.yardstick._replace(params=other))
    quality.measure_points(sweep, cases)
    assert len(points.read_text().splitlines()) == 2


def test_points_of_another_model_or_seed_are_others(model, tmp_path, fast) -> None:
    cases = quality.plan(["ddim:2"], ["1"], model.config)
    quality.measure_points(sweep_of(model, tmp_path), cases)
    other = model._replace(variables=jax.tree.map(lambda leaf: leaf * 0.9, model.variables))
    quality.measure_points(sweep_of(other, tmp_path), cases)
    one = sweep_of(model, tmp_path)
    quality.measure_points(one._replace(setting=one.setting | {"seed": 8}), cases)
    assert len(fast) == 6


def test_a_point_is_what_its_samples_measure(model, tmp_path, fast) -> None:
    """Drawn anew, part i with the seed seed + i; KID and accuracy by evaluation's own functions."""
    case = quality.plan(["ddim:3"], ["2"], model.config)[0]
    sweep = sweep_of(model, tmp_path, 120)
    (point,) = quality.measure_points(sweep, [case])
    real = sweep.yardstick.real
    labels = real.reference.labels[np.arange(120)]
    parts = [
        sample(model, case.tableau, len(part), context=part, guidance=2.0, seed=7 + i).images
        for i, part in enumerate(np.split(labels, [60]))
    ]
    pixels = np.clip(np.round((np.concatenate(parts) + 1) * 127.5), 0, 255).astype(np.uint8)
    params = classifier.load(tmp_path / "classifier.npz", real.teaching)
    space = evaluation.spaces(real.teaching, params, DEVICES)["classifier"]
    rows = [space.rows(images, DEVICES) for images in (real.reference.images, pixels)]
    kid = evaluation.kernel_distance(*rows)
    assert point["KID"]["value"] == pytest.approx(kid.value, abs=0.02 * abs(kid.value))
    net = classifier.network(real.teaching)
    logits = jax.jit(net.apply)({"params": params}, pixels)
    right = np.asarray(logits).argmax(1) == labels.argmax(1)
    accuracy = np.mean([right[labels[:, k] == 1].mean() for k in range(2)])
    assert point["class accuracy"]["value"] == pytest.approx(accuracy, abs=0.02)


def test_a_damaged_list_of_points_is_named(tmp_path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text('{"key": {"n": 1}, "found": {}}\n{"key": {"n"')
    with pytest.raises(InputError, match=r"points\.jsonl is damaged: move it away"):
        quality.read_points(path)


@pytest.mark.parametrize(
    ("n", "seed", "match"),
    [(99, 0, "n=99: it must be at least 100"), (600, 2**32 - 1, "seed=4294967295: 600 images")],
)
def test_sweeps_that_cannot_be(model, tmp_path, n: int, seed: int, match: str) -> None:
    with pytest.raises(InputError, match=match):
        quality.sweep(model, n, 150, seed, "float32", tmp_path, DEVICES)


# ------------------------------------------------------------------------------- the conclusions


def points(seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "case": f"{name}:{n}",
            "guidance": scale,
            "evaluations": n * (1 if scale == 1 else 2),
            "seconds": {"median": n * 0.01, "p10": 0.0, "p90": 1.0},
            "KID": {"value": float(rng.normal(0.1 / n, 0.01)), "error": 0.004},
            "class accuracy": {"value": float(rng.uniform(0.9, 1)), "error": 0.01},
        }
        for name in ("ddpm", "ddim", "heun")
        for n in (3, 8, 25, 100)
        for scale in (1.0, 2.0)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_cheapest_within_an_error_of_the_best(seed: int) -> None:
    every = points(seed)
    assert quality.choose_within(every, 2) is None
    for budget in (3, 10, 50, 1000):
        able = [p for p in every if p["evaluations"] <= budget]
        cheapest, best = quality.choose_within(every, budget)
        assert best["KID"]["value"] == min(p["KID"]["value"] for p in able)
        assert cheapest in able
        assert cheapest["KID"]["value"] <= best["KID"]["value"] + 0.004
        for p in able:
            if p["evaluations"] < cheapest["evaluations"]:
                assert p["KID"]["value"] > best["KID"]["value"] + 0.004


@pytest.mark.parametrize("cost", ["evaluations", "seconds"])
def test_the_front_is_what_nothing_as_cheap_reaches(cost: str) -> None:
    every = points(1)

    def key(p: dict) -> tuple[float, float]:
        return (p["seconds"]["median"] if cost == "seconds" else p[cost], p["KID"]["value"])

    def reaches(q: dict, p: dict) -> bool:
        return key(q) != key(p) and key(q)[0] <= key(p)[0] and key(q)[1] <= key(p)[1]

    best = [p for p in every if not any(reaches(q, p) for q in every)]
    assert quality.front(every, cost) == sorted(best, key=key)


def test_the_files_say_what_to_use(tmp_path) -> None:
    every = points(0)
    about = {"processor": "P", "date": "D", "python": "3", "versions": {"jax": "1"}}
    real = {"KID": {"value": 0.0, "error": 0.001}, "class accuracy": {"value": 1.0, "error": 0.0}}
    record = {"about": about | {"flags": {}}, "n": 5, "batch": 32, "devices": "2 CPU cores"}
    record |= {"origin": "sprites", "real": real, "points": every}
    found = quality_tables.write(tmp_path, record)
    assert [path.name for path in found] == ["quality.json", "quality.md", "quality.png"]
    text = found[1].read_text()
    for point in every:
        row = f"| {point['case']} | {point['guidance']:g} | {point['evaluations']} |"
        assert text.count(row) == 1
    cheapest, _ = quality.choose_within(every, 10)
    assert f"- With at most 10 evaluations use {cheapest['case']}" in text
    best = min((p for p in every if p["evaluations"] <= 10), key=lambda p: p["KID"]["value"])
    full = next(p for p in every if p["case"] == "ddpm:100" and p["guidance"] == 1)
    gap = (best["KID"]["value"] - full["KID"]["value"]) / np.hypot(0.004, 0.004)
    assert f"({gap:+.1f} standard errors), for 1/{100 / best['evaluations']:.0f} of" in text
    assert json.loads(found[0].read_text())["advice"]
    assert found[2].read_bytes().startswith(b"\x89PNG")


def test_a_run_without_classes_has_only_its_kid(model, tmp_path, fast) -> None:
    data = dataclasses.replace(model.config.data, null_context=True)
    config = dataclasses.replace(model.config, data=data)
    sweep = sweep_of(model._replace(config=config), tmp_path)
    (point,) = quality.measure_points(sweep, quality.plan(["ddim:2"], ["1"], config))
    assert "class accuracy" not in point
    assert sweep.labels is None
