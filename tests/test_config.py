"""The configuration as JSON, its checks and its presets; contexts as text; the metrics file."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_jax import contexts, metrics
from diffusion_jax.config import Config
from diffusion_jax.typing import InputError
from experiments.presets import PRESETS

CHANGED = Config().override(
    images="a.npy",
    class_names=("x", "y"),
    n_cfeat=2,
    class_frequencies=(1.0, 2.0, 0.0, 0.0, 0.5),
    null_context=True,
    n_feat=24,
    norm="group",
    timesteps=40,
    schedule="cosine",
    epochs=7,
    learning_rate=0.25,
    flips=("all",),
)


def as_json(config: Config) -> dict:
    return json.loads(json.dumps(config.to_dict()))


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["default", "changed"])
def test_a_configuration_survives_json(config: Config) -> None:
    back = Config.from_dict(as_json(config), "x")
    assert back == config
    assert hash(back) == hash(config), "lists have become tuples again"


def test_override_sets_fields_of_every_group_and_no_others() -> None:
    assert CHANGED.data.class_names == ("x", "y")
    assert CHANGED.network.n_feat == 24
    assert CHANGED.diffusion.timesteps == 40
    assert CHANGED.training.learning_rate == 0.25
    assert CHANGED.training.batch_size == Config().training.batch_size
    assert Config() == Config().override()


def test_fields_have_names_of_their_own_over_all_groups() -> None:
    names = [name for group in Config().to_dict().values() for name in group]
    assert len(names) == len(set(names)), "each is one flag"


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.epochs = 3


def test_differences_are_named_with_both_values() -> None:
    assert CHANGED.differences(CHANGED) == []
    other = CHANGED.override(n_feat=32, images="b.npy", learning_rate=0.5)
    assert CHANGED.differences(other) == [
        "images: 'a.npy' -> 'b.npy'",
        "n_feat: 24 -> 32",
        "learning_rate: 0.25 -> 0.5",
    ]


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(InputError, match=r"^there is no option n_feet$"):
        Config().override(n_feet=8, epochs=3)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("training", {"momentum": 0.9}, "the fields of training are not this version's: momentum"),
        ("network", {"n_feat": "64"}, "n_feat='64': it must be of type int"),
        ("diffusion", {"timesteps": None}, "timesteps=None: it must be of type int"),
        ("diffusion", {"timesteps": 500.5}, "timesteps=500.5: it must be of type int"),
        ("diffusion", {"beta_min": "0"}, "beta_min='0': it must be of type float"),
        ("data", {"class_names": "ab"}, "class_names='ab': it must be of type tuple"),
        ("training", {"lr_schedule": {}}, "lr_schedule={}: it must be of type str"),
        ("ema", {"decay": 0.9}, "ema are not this version's"),
    ],
)
def test_stored_fields_that_are_not_this_versions_are_named(group, change, message) -> None:
    stored = as_json(Config())
    stored.setdefault(group, {}).update(change)
    with pytest.raises(InputError, match=f"^runs/a/config.json: .*{message}"):
        Config.from_dict(stored, "runs/a/config.json")


def test_fields_that_an_earlier_version_did_not_have_get_their_defaults() -> None:
    stored = as_json(CHANGED)
    for name in ("loss_weighting", "weighting_gamma", "time_sampling"):
        del stored["training"][name]
    assert Config.from_dict(stored, "x") == CHANGED
    del stored["network"]["n_feat"]
    assert Config.from_dict(stored, "x") == CHANGED.override(n_feat=64)


def test_a_stored_group_that_is_missing_is_named() -> None:
    stored = as_json(Config())
    del stored["training"]
    with pytest.raises(InputError, match=r"^x: the fields of training are missing$"):
        Config.from_dict(stored, "x")


def test_a_whole_number_is_a_float_too() -> None:
    stored = as_json(Config())
    stored["training"]["learning_rate"] = 1
    assert Config.from_dict(stored, "x").training.learning_rate == 1


# -------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_images", 0, "n_images=0: it must be at least 1"),
        ("data_seed", -1, "data_seed=-1: it must be at least 0"),
        ("image_size", -8, "image_size=-8: it must be at least 0"),
        ("labels", "l.npy", "labels='l.npy' without images: give --images too"),
        ("class_names", ("a", "b", "a"), "class_names=a,b,a: each must be another"),
        ("network", "vit", "network='vit' is unknown: choose from context_unet"),
        ("n_feat", 12, "n_feat=12: give a multiple of 8 from 8 up"),
        ("n_feat", 0, "n_feat=0: give a multiple of 8"),
        ("image_shape", (8, 8, 0), "in_channels=0: give an integer from 1 up"),
        ("image_shape", (10, 16, 3), "height=10: give a multiple of 4 from 8 up"),
        ("image_shape", (16, 4, 3), "width=4: give a multiple of 4 from 8 up"),
        ("n_cfeat", 0, "n_cfeat=0: give an integer from 1 up"),
        ("schedule", "quartic", "schedule='quartic' is unknown: choose from linear, notes"),
        ("timesteps", 0, "a schedule of 0 steps: it must have at least 1"),
        ("beta_min", -1.0, r"beta_min=-1.0, beta_max=0.02: they must obey 0 < beta_min"),
        ("beta_min", float("nan"), "beta_min=nan"),
        ("beta_max", 1.0, "beta_max=1.0: they must obey"),
        ("beta_max", 1e-5, "beta_max=1e-05: they must obey"),
        ("parameterization", "noise", "parameterization='noise' is unknown: choose from eps"),
        ("noising", "flow", "noising='flow' is unknown: choose from ddpm, notes"),
        ("epochs", 0, "epochs=0: it must be at least 1"),
        ("batch_size", 0, "batch_size=0: it must be at least 1"),
        ("n_images", 10**12, "n_images=1000000000000: it must be at most 10000000"),
        ("learning_rate", 0.0, "learning_rate=0.0: it must be above 0"),
        ("learning_rate", float("nan"), "learning_rate=nan: it must be above 0"),
        ("lr_schedule", "step", "lr_schedule='step' is unknown: choose from notes"),
        ("warmup_steps", -1, "warmup_steps=-1: it must be at least 0"),
        ("ema_decay", 1.0, r"ema_decay=1.0: it must be in \[0, 1\)"),
        ("ema_decay", -0.1, r"ema_decay=-0.1: it must be in \[0, 1\)"),
        ("ema_profile", "box", "ema_profile='box' is unknown: choose from exponential, power"),
        ("ema_sigma_rel", 0.3, "ema_sigma_rel=0.3: it must be above 0 and below 0.2887"),
        ("ema_snapshots", -1, "ema_snapshots=-1: it must be at least 0"),
        ("grad_clip", -1.0, "grad_clip=-1.0: it must be at least 0"),
        ("grad_clip", float("nan"), "grad_clip=nan: it must be at least 0"),
        ("held_out", 1.0, r"held_out=1.0: it must be in \[0, 1\)"),
        ("keep_probability", 1.5, r"keep_probability=1.5: it must be in \[0, 1\]"),
        ("keep_probability", float("nan"), "keep_probability=nan"),
        ("loss_weighting", "snr", "loss_weighting='snr' is unknown: choose from simple, min_snr"),
        ("weighting_gamma", -1.0, "weighting_gamma=-1.0: it must be at least 0"),
        ("weighting_gamma", 2.0, "weighting_gamma=2.0: simple takes none, leave it at 0"),
        ("time_sampling", "normal", "time_sampling='normal' is unknown: choose from uniform, log"),
        ("seed", -1, "seed=-1: it must be at least 0"),
        ("seed", 2**32, "seed=4294967296: it must be in 0..4294967295"),
    ],
)
def test_bad_values_are_named_with_what_would_be_right(field, value, message) -> None:
    with pytest.raises(InputError, match=message):
        Config().override(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "cosine", "beta_max": 0.1}, "beta_max=0.1: schedule cosine takes offset"),
        ({"schedule": "flow", "beta_min": 0.1}, "beta_min=0.1: schedule flow takes none"),
        *(
            ({"schedule": name, "parameterization": "v", "noising": "notes"}, "noising='notes'")
            for name in ("karras", "flow")
        ),
    ],
)
def test_values_that_do_not_go_together(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config().override(**values)


@pytest.mark.parametrize(
    ("schedule", "alpha_bar"), [("scaled_linear", 0.00466), ("linear", 4.036e-5)]
)
def test_a_schedule_has_its_own_betas(schedule: str, alpha_bar: float) -> None:
    """Latent diffusion's and DDPM's published ends, of 1,000 steps."""
    built = Config().override(schedule=schedule, timesteps=1000).diffusion.build()
    assert built.alpha[-1] ** 2 == pytest.approx(alpha_bar, rel=2e-3)
    steeper = Config().override(schedule=schedule, timesteps=1000, beta_max=0.03)
    assert steeper.diffusion.build().beta[-1] == pytest.approx(0.03, rel=1e-12)


# ----------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_what_they_describe(name: str) -> None:
    config = PRESETS[name]()
    assert config.network.build().n_feat == config.network.n_feat
    assert config.diffusion.build().steps == config.diffusion.timesteps
    assert PRESETS[name].__doc__, "--help shows it"


def test_the_notes_preset_is_the_notes() -> None:
    """Hyperparameters of the course's training notebook."""
    config = PRESETS["notes"]()
    assert (config.diffusion.timesteps, config.diffusion.schedule) == (500, "notes")
    beta = config.diffusion.build().beta
    assert (beta[0], beta[-1]) == pytest.approx((1e-4, 0.02), rel=1e-12)
    assert (config.network.n_feat, config.network.n_cfeat) == (64, 5)
    assert config.network.image_shape == (16, 16, 3)
    assert (config.training.batch_size, config.training.epochs) == (100, 32)
    assert (config.training.learning_rate, config.training.lr_schedule) == (1e-3, "notes")
    assert (config.training.keep_probability, config.training.ema_decay) == (0.9, 0)
    assert not config.training.grad_clip
    assert not config.training.warmup_steps


@pytest.mark.parametrize(
    "names", [("x" * 100_000, "y"), ("\x1b[2J", "y"), ("none", "y"), ("", "y")]
)
def test_stored_class_names_that_cannot_be_shown_are_refused(names) -> None:
    stored = as_json(CHANGED)
    stored["data"]["class_names"] = names
    with pytest.raises(InputError, match=r"class name '.*': give it another one") as caught:
        Config.from_dict(stored, "config.json")
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("names", [["x"], ["x", "y", "z"]])
def test_as_many_stored_class_names_as_features(names) -> None:
    stored = as_json(CHANGED)
    stored["data"]["class_names"] = names
    message = rf"^config\.json: {len(names)} class_names for n_cfeat=2"
    with pytest.raises(InputError, match=message):
        Config.from_dict(stored, "config.json")


@pytest.mark.parametrize("fingerprint", [["x"], ["1", "2", "3"], 4, [1, 2, 3, 4], [[]] * 4])
def test_a_stored_fingerprint_is_four_texts(fingerprint) -> None:
    stored = as_json(CHANGED)
    stored["data"]["fingerprint"] = fingerprint
    with pytest.raises(InputError, match="fingerprint="):
        Config.from_dict(stored, "config.json")


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


@pytest.mark.parametrize(
    ("text", "vector"),
    [("2", [0, 0, 1]), ("0", [1, 0, 0]), ("2,0", [1, 0, 1]), ("1=0.5", [0, 0.5, 0])],
)
def test_classes_may_be_called_by_numbers(text: str, vector: list) -> None:
    assert contexts.parse(text, ("0", "1", "2")).tolist() == [vector]
    assert contexts.parse("0.0,1.0,0.0", ("0", "1", "2")).tolist() == [[0, 1, 0]]
    assert contexts.parse("7", ("7",)).tolist() == [[1]]
    with pytest.raises(InputError, match=r"'0,1,0' could be names or numbers: write 0=1 for the c"):
        contexts.parse("0,1,0", ("0", "1", "2"))


def test_a_name_may_hold_the_signs_of_contexts() -> None:
    assert contexts.parse("a,b=1; c", ("a,b=1", "c")).tolist() == [[1, 0], [0, 1]]


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
