"""The configuration as JSON, its checks and presets, contexts as text, and the metrics file."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_jax.data import contexts
from diffusion_jax.runs import metrics
from diffusion_jax.runs.config import Config
from diffusion_jax.training import Length
from diffusion_jax.typing import InputError
from experiments.presets import PRESETS

CHANGED = Config(
    data="npy:images=a.npy",
    class_names=("x", "y"),
    null_context=True,
    network="context_unet:n_feat=24:norm=group",
    schedule="cosine:steps=40",
    loss="mse:weighting=min_snr:gamma=3",
    optimizer="adam:0.25:decay=cosine:warmup=5",
    epochs=7,
    augment="flips",
)


def as_json(config: Config) -> dict:
    return json.loads(json.dumps(config.to_dict()))


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["default", "changed"])
def test_a_configuration_survives_json(config: Config) -> None:
    back = Config.from_dict(as_json(config), "x")
    assert back == config
    assert hash(back) == hash(config), "lists have become tuples again"


def test_specs_are_stored_with_every_option() -> None:
    assert Config(schedule="linear:steps=40") == Config(
        schedule="linear:beta_max=0.02:steps=40:beta_min=0.0001"
    )
    assert CHANGED.loss == "mse:noising=ddpm:weighting=min_snr:gamma=3:times=uniform"


def test_components_are_built_as_described() -> None:
    assert CHANGED.build_network().n_feat == 24
    assert CHANGED.build_schedule().steps == 40
    assert CHANGED.n_cfeat == 2
    parts = CHANGED.task(Length(1, 1, 1))
    weights = parts.loss.weights(parts.prediction, parts.schedule)
    snr = 1 / CHANGED.build_schedule().ratio[1:] ** 2
    np.testing.assert_allclose(weights[1:], np.minimum(snr, 3) / snr)  # the weights of eps


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


def test_differences_are_named_with_both_values() -> None:
    assert CHANGED.differences(CHANGED) == []
    other = CHANGED.override(prediction="v", epochs=8)
    assert CHANGED.differences(other) == ["prediction: eps -> v", "epochs: 7 -> 8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.9}, "json has no option momentum"),
        ({"epochs": "64"}, "json: epochs=64: it must be a number"),
        ({"batch_size": 6.5}, "batch_size=6.5: it must be a whole number"),
        ({"keep_probability": "0"}, "keep_probability=0: it must be a number"),
        ({"class_names": "ab"}, "class_names=ab: it must be a word, one or more"),
        ({"class_names": [1]}, r"class_names=\[1\]: it must be a word, one or more"),
        ({"image_shape": []}, r"image_shape=\(\): it must be height, width and channels"),
        ({"image_shape": [16.5, 16, 3]}, "image_shape=.*: it must be a whole number, one or more"),
        ({"schedule": {}}, "schedule={}: it must be a word"),
        ({"schedule": "quartic"}, "schedule='quartic' is unknown"),
    ],
)
def test_stored_fields_that_are_not_this_versions_are_named(change, message) -> None:
    with pytest.raises(InputError, match=message):
        Config.from_dict(as_json(Config()) | change, "runs/a/config.json")


def test_a_stored_field_that_is_missing_is_named() -> None:
    stored = as_json(Config())
    del stored["loss"]
    with pytest.raises(InputError, match=r"^x does not have fields loss$"):
        Config.from_dict(stored, "x")


def test_a_whole_number_is_a_float_too() -> None:
    assert Config.from_dict(as_json(Config()) | {"keep_probability": 1}, "x").keep_probability == 1


# -------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data", "sprites:n=x", "data=sprites:n=x: n=x: it must be a whole number"),
        ("data", "npy:images=a.npy:names=a", "npy has no option names: did you mean class_names"),
        ("data", "spirtes", "data='spirtes' is unknown: did you mean sprites?"),
        ("network", "vit", "network='vit' is unknown: choose from context_unet"),
        ("network", "context_unet:n_feat=12", "n_feat=12: give a multiple of 8 from 8 up"),
        ("network", "context_unet:shortcut=random", "shortcut=random: it must be conv, none"),
        ("network", "context_unet:norm=layer", "norm=layer: it must be batch, group"),
        ("image_shape", (10, 10, 3), "height=10: give a multiple of 4 from 8 up"),
        ("class_names", (), "class_names: 0 of them"),
        ("schedule", "quartic", "schedule='quartic' is unknown: choose from linear, course"),
        ("schedule", "linear:steps=0", "steps=0: a schedule must have 1 to"),
        ("schedule", "linear:beta_min=0", "beta_min=0.0, beta_max=0.02: they must obey 0 <"),
        ("schedule", "linear:beta_max=1", "beta_max=1.0: they must obey"),
        ("schedule", "cosine:beta_max=0.1", "cosine has no option beta_max"),
        ("prediction", "noise", "prediction='noise' is unknown: choose from eps"),
        ("prediction", "edm:sigma_data=0", "sigma_data=0.0: it must be above 0"),
        ("loss", "mse:noising=flow", "noising=flow: it must be ddpm, course"),
        ("loss", "mse:weighting=snr", "weighting=snr: it must be one of simple, min_snr"),
        ("loss", "mse:gamma=2", "mse has no option gamma"),
        ("loss", "mse:weighting=p2:gamma=-1", "gamma=-1.0: it must be above 0"),
        ("loss", "mse:times=normal", "times=normal: it must be one of uniform, lognormal"),
        ("loss", "mse:weighting=edm", "the weights of this weighting and prediction are not"),
        ("optimizer", "adam:0", "learning_rate=0.0: it must be above 0"),
        ("optimizer", "adam:1e-320", "learning_rate=1e-320: it must be above 0"),
        ("optimizer", "adam:nan", "learning_rate=nan: it must be a number"),
        ("optimizer", "adam:decay=step", "decay=step: it must be one of course, constant"),
        ("optimizer", "adam:warmup=-1", "warmup=-1: it must be 0 or more"),
        ("optimizer", "adam:clip=1e-320", "clip=1e-320: it must be at least 1e-12, or 0 for none"),
        ("ema", "exponential:decay=1", r"decay=1.0: it must be in \[0, 1\)"),
        ("ema", "box", "ema='box' is unknown: choose from none, exponential, power"),
        ("ema", "power:0.3", "sigma_rel=0.3: it must be above 0 and below 0.2887"),
        ("ema", "power:snapshots=-1", "snapshots=-1: it must be in 0..1024"),
        ("ema", "exponential:sigma_rel=0.1", "exponential has no option sigma_rel"),
        ("augment", "flips:classes=heroes", "classes='heroes' is unknown: did you mean hero?"),
        ("epochs", 0, "epochs=0: it must be above 0, and at most 1000000"),
        ("batch_size", 0, "batch_size=0: it must be in 1..65536"),
        ("keep_probability", 1.5, r"keep_probability=1.5: it must be in \[0, 1\]"),
        ("keep_probability", float("nan"), "keep_probability=nan"),
        ("seed", -1, "seed=-1: it must be in"),
        ("seed", 2**32, "seed=4294967296: it must be in"),
        ("dtype", "float16", "dtype='float16' is unknown"),
    ],
)
def test_bad_values_are_named_with_what_would_be_right(field, value, message) -> None:
    changes = {field: value}
    if value == "mse:weighting=edm":
        changes["schedule"] = "linear:beta_max=0.9"
    with pytest.raises(InputError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "flow"}, "prediction=eps on a schedule that ends in pure noise"),
        ({"schedule": "linear:zero_snr=true"}, "prediction=eps on a schedule that ends in pure"),
        (
            {"schedule": "karras", "prediction": "v", "loss": "mse:noising=course"},
            "noising=course needs a variance preserving schedule",
        ),
        ({"augment": "flips:classes=hero", "null_context": True}, "classes='hero' is unknown"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message) -> None:
    with pytest.raises(InputError, match=message):
        Config(**fields)


# ----------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_describe_themselves(name: str) -> None:
    assert PRESETS[name]() == Config.from_dict(as_json(PRESETS[name]()), "x")
    assert PRESETS[name].__doc__, "--help shows it"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"optimizer": "adam:0.001"}, {"optimizer": "adam:0.001:decay=cosine:warmup=200"}),
        ({"optimizer": "adam:warmup=0:clip=1"}, {"optimizer": "adam:0.002:cosine:clip=1"}),
        ({"network": "context_unet:norm=group"}, {"network": "context_unet:n_feat=32:norm=group"}),
        ({"ema": "power:0.1", "network": "unet"}, {"ema": "power:0.1", "network": "unet"}),
    ],
)
def test_a_flag_keeps_the_presets_options_of_the_same_component(given: dict, kept: dict) -> None:
    best = PRESETS["best"]()
    assert best.refine(epochs=3, **given) == best.override(epochs=3, **kept)
    with pytest.raises(InputError, match="adam has no option warm: did you mean warmup"):
        best.refine(optimizer="adam:warm=3")


@pytest.mark.parametrize(("name", "shape"), [("digits", (28, 28, 1)), ("unet", (32, 32, 3))])
def test_presets_take_images_of_their_sizes(name: str, shape: tuple[int, ...]) -> None:
    assert PRESETS[name]().override(image_shape=shape).build_network().image_shape == shape


def test_a_context_that_is_never_shown_is_none() -> None:
    assert Config(keep_probability=0).null_context
    assert not Config().null_context


def test_the_course_preset_is_the_course() -> None:
    """Expect the hyperparameters of the course's training notebook."""
    config = PRESETS["course"]()
    assert config.schedule.startswith("course:steps=500:beta_min=0.0001:beta_max=0.02")
    assert config.build_network().n_feat == 64
    assert (config.n_cfeat, config.image_shape) == (5, (16, 16, 3))
    assert (config.batch_size, config.epochs, config.keep_probability) == (100, 32, 0.9)
    assert config.optimizer == "adam:learning_rate=0.001:warmup=0:clip=0:decay=course"
    assert config.ema == "none"


# ---------------------------------------------------------------------------------- contexts

NAMES = ("hero", "food", "side-facing")


@pytest.mark.parametrize(
    ("text", "vectors"),
    [
        ("hero", [[1, 0, 0]]),
        ("side-facing", [[0, 0, 1]]),
        ("hero; food ;", [[1, 0, 0], [0, 1, 0]]),
        ("food=0.6,side-facing=0.4", [[0, 0.6, 0.4]]),
        ("hero, food", [[1, 1, 0]]),
        ("hero, food = -0.5", [[1, -0.5, 0]]),
        ("food=0.25,food=0.5", [[0, 0.75, 0]]),
        ("1,0,0.6", [[1, 0, 0.6]]),
        (" -1 , 2e-1 , .5 ", [[-1, 0.2, 0.5]]),
        ("none", [[0, 0, 0]]),
        ("hero; none; 0,1,0; food=2", [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0]]),
    ],
)
def test_contexts_are_read_as_people_write_them(text: str, vectors: list) -> None:
    np.testing.assert_array_equal(
        contexts.parse(text, NAMES), np.array(vectors, np.float32), strict=True
    )


def test_a_file_holds_contexts(tmp_path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.array([[1, 0, 2.5], [0, 1, 0]]))
    np.testing.assert_array_equal(contexts.parse(path, NAMES), [[1, 0, 2.5], [0, 1, 0]])
    for wrong, message in (
        (np.ones((2, 4)), r"shape \(2, 4\): give numbers of shape \(contexts, 3\)"),
        (np.ones(3), r"shape \(3,\): give"),
        (np.ones((0, 3)), r"shape \(0, 3\): give"),
        (np.full((1, 3), 1e39), "some numbers are not finite"),
        (np.full((1, 3), "a"), "<U1 of shape"),
    ):
        np.save(path, wrong)
        with pytest.raises(InputError, match=f"context={path}: .*{message}"):
            contexts.parse(path, NAMES)
    with pytest.raises(InputError, match=r"no\.npy: there is no such file"):
        contexts.parse("no.npy", NAMES)


def test_by_class_is_the_context_of_each_name() -> None:
    vectors = contexts.by_class(NAMES)
    assert list(vectors) == list(NAMES)
    for name, vector in vectors.items():
        np.testing.assert_array_equal(vector, contexts.parse(name, NAMES)[0], strict=True)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", r"context='' is empty"),
        (" ; ", r"context=' ; ' is empty"),
        ("knight", "context 'knight' is not understood"),
        ("hero; Food", "context 'Food' is not understood"),
        ("hero=", "context 'hero=' is not understood"),
        ("hero=much", "context 'hero=much' is not understood"),
        ("hero=nan", "context 'hero=nan' is not understood"),
        ("hero=1e999", "context 'hero=1e999' is not understood"),
        ("hero=1=2", "context 'hero=1=2' is not understood"),
        ("=1", "context '=1' is not understood"),
        ("hero,", "context '' is not understood"),
        ("hero,none", "context 'none' is not understood"),
        ("hero,1", "context '1' is not understood"),
        ("1,0", "context '1,0' has 2 numbers"),
        ("1,0,0,0", "context '1,0,0,0' has 4 numbers"),
        ("0.5", "context '0.5' has 1 numbers"),
        ("1,nan,0", "context '1' is not understood"),
    ],
)
def test_a_context_that_cannot_be_read_is_named(text: str, part: str) -> None:
    advice = "write 3 numbers, or names of hero, food, side-facing, such as hero=0.6"
    with pytest.raises(InputError, match=f"^{part}: {advice}$"):
        contexts.parse(text, NAMES)


# ----------------------------------------------------------------------------------- metrics

RECORDS = [{"step": step, "epoch": step // 3, "loss": 1 / (step + 2)} for step in range(1, 8)]


def test_records_are_appended_and_read_back_exactly(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    metrics.append(path, RECORDS[:3])
    metrics.append(path, [])
    metrics.append(path, RECORDS[3:])
    assert metrics.read(path) == RECORDS
    assert len(path.read_text().splitlines()) == len(RECORDS), "a line for each record"


def test_a_last_line_cut_short_is_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, RECORDS)
    path.write_text(path.read_text()[:-5])
    assert metrics.read(path) == RECORDS[:-1]


@pytest.mark.parametrize("damage", ["", '{"step": 1, "lo', '{"step": 9}\n', None])
def test_metrics_become_what_a_copy_of_them_is(tmp_path, damage: str | None) -> None:
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "copy.jsonl"
    metrics.append(copy, RECORDS)
    if damage is not None:
        path.write_text(damage)
    metrics.restore(path, copy)
    assert path.read_bytes() == copy.read_bytes()
    metrics.restore(path, None)
    assert not path.exists()
