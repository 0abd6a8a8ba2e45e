"""Runs on disk restore the same bits, on other devices too. Errors name what is not a run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import parallel
from diffusion_jax.networks import variable_shapes
from diffusion_jax.runs import (
    checkpoints,
    load_config,
    load_model,
    manifests,
    reconstruct,
    save_model,
)
from diffusion_jax.training import Length, TrainState
from diffusion_jax.typing import InputError
from tests.models import SMALL

CONFIG = SMALL.override(schedule="linear:steps=30")


def drawn(shapes, seed: int):
    """Return arrays of these shapes and types, each with its own values."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray((100 * rng.normal(size=leaf.shape)).astype(leaf.dtype)),
        shapes,
    )


def assert_same_bits(one, two) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def files(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_model_comes_back_bit_for_bit(tmp_path) -> None:
    variables = drawn(variable_shapes(CONFIG.build_network()), 0)
    save_model(tmp_path / "new" / "run", CONFIG, variables)
    model = load_model(tmp_path / "new" / "run")
    assert_same_bits(model.variables, variables)
    assert load_config(tmp_path / "new" / "run") == CONFIG
    assert model.schedule.steps == 30
    assert model.network == CONFIG.build_network()
    assert model.class_names == CONFIG.class_names


@pytest.fixture(scope="module")
def shapes():
    """Return the shapes of few weights, which models have here."""
    tree = {"params": {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_jax.runs.models.variable_shapes", lambda network: tree)
        yield tree


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes) -> Path:
    """Return a run with checkpoints 3, 7 and 20, which are also the seeds of their variables."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints.write_config(folder, CONFIG.to_dict())
    for step in (3, 7, 20):
        checkpoints.save(folder, step, drawn(shapes, step))
    return folder


# ------------------------------------------------------------------------------------ models


def test_the_newest_checkpoint_is_loaded_or_the_one_asked_for(run, shapes) -> None:
    assert_same_bits(load_model(run).variables, drawn(shapes, 20))
    for step in (3, 7, 20):
        assert_same_bits(load_model(str(run), step).variables, drawn(shapes, step))


def test_reading_a_run_writes_nothing_into_it(run) -> None:
    before = files(run)
    load_config(run)
    load_model(run, 7)
    with pytest.raises(InputError):
        load_model(run, 8)
    assert files(run) == before


def test_a_run_is_not_overwritten(run, shapes) -> None:
    before = files(run)
    with pytest.raises(InputError, match=rf"run='{run}' is not empty: name a new folder"):
        save_model(run, CONFIG, drawn(shapes, 1))
    assert files(run) == before


def test_a_model_goes_into_an_empty_folder_but_onto_no_file(tmp_path, shapes) -> None:
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", CONFIG, drawn(shapes, 1))
    assert_same_bits(load_model(tmp_path / "empty").variables, drawn(shapes, 1))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"run='.*/file' is not a folder"):
        save_model(tmp_path / "file", CONFIG, drawn(shapes, 1))
    assert (tmp_path / "file").read_text() == "mine"


# ----------------------------------------------------------------------------- what is no run


def test_folders_that_are_no_runs_are_named(tmp_path, run) -> None:
    with pytest.raises(InputError, match=rf"run='{tmp_path}/none': there is no such folder"):
        load_model(tmp_path / "none")
    with pytest.raises(InputError, match=rf"'{tmp_path}' is not a run: there is no config\.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"config\.json': there is no such folder"):
        load_model(run / "config.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folders", [[], ["state"], ["state/7.orbax-checkpoint-tmp"]])
def test_a_run_without_a_checkpoint_is_named(tmp_path, folders) -> None:
    checkpoints.write_config(tmp_path, CONFIG.to_dict())
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    before = files(tmp_path)
    with pytest.raises(InputError, match=f"run='{tmp_path}' has no checkpoint yet"):
        load_model(tmp_path)
    assert files(tmp_path) == before


def test_a_step_without_a_checkpoint_is_named_with_those_there_are(run) -> None:
    with pytest.raises(InputError, match=rf"step=8: the checkpoints of {run} are \[3, 7, 20\]"):
        load_model(run, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json is not JSON"),
        ('{"data": {', r"config\.json is not JSON"),
        ("\0\1\2\xff", r"config\.json is not JSON"),
        ("[1, 2]", r"config\.json does not hold a configuration"),
        ("{}", r"config\.json does not have fields augment, "),
        (json.dumps(CONFIG.to_dict()).replace("n_feat", "width"), "context_unet has no option wid"),
        (json.dumps(CONFIG.to_dict()).replace("=30", "=0"), "steps=0: a schedule must have 1 to"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)
    assert files(tmp_path) == {"config.json": text.encode()}


def copy_with(run: Path, copy: Path, **fields) -> None:
    shutil.copytree(run, copy)
    checkpoints.write_config(copy, CONFIG.override(**fields).to_dict())
    for folder in (copy / "state").iterdir():
        shutil.copyfile(copy / "config.json", folder / "config.json")
        manifests.seal(folder)


LOAD_ALL = """
import sys
from diffusion_jax.runs import load_model
from diffusion_jax.typing import InputError
for path in sys.argv[1:]:
    try:
        load_model(path)
    except InputError as error:
        print(*str(error).split())
"""


def test_weights_of_another_network_are_named(tmp_path) -> None:
    """Use a separate process, because orbax leaves threads behind that end in errors."""
    run = tmp_path.with_name("whole")
    save_model(run, CONFIG, drawn(variable_shapes(CONFIG.build_network()), 0))
    copy_with(run, tmp_path / "wider", network="context_unet:n_feat=16")
    copy_with(run, tmp_path / "group", network="context_unet:n_feat=8:norm=group")
    runs = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", LOAD_ALL, *runs]
    messages = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).splitlines()
    for path, message in zip(runs, messages, strict=True):
        assert f"{path}/state/0 does not hold this run's model: " in message


def test_a_configuration_is_written_whole_or_not_at_all(tmp_path) -> None:
    checkpoints.write_config(tmp_path, CONFIG.to_dict())
    with pytest.raises(TypeError):
        checkpoints.write_config(tmp_path, {"not": {1, 2}})
    assert load_config(tmp_path) == CONFIG
    assert list(files(tmp_path)) == ["config.json"]


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("keep", "kept"), [(1, [9]), (2, [4, 9]), (None, [1, 2, 4, 9])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, kept) -> None:
    for step in (1, 2, 4, 9):
        checkpoints.save(tmp_path, step, {"x": np.full(3, step)}, keep=keep)
    assert sorted(int(path.name) for path in (tmp_path / "state").iterdir()) == kept


@pytest.fixture(scope="module")
def state(shapes) -> TrainState:
    config = CONFIG.override(optimizer="adam:clip=1", ema="exponential:0.9")
    optimizer = config.task(Length(24, 8, 2)).optimizer.transformation
    inner = jax.eval_shape(optimizer.init, shapes["params"])
    stats = {"mean": np.zeros(3, np.float32)}
    step, model = np.zeros((), np.int32), shapes | {"batch_stats": stats}
    return drawn(TrainState(step, model["params"], stats, model, inner), 5)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 2), (2, 1), (2, 8)])
def test_a_training_state_comes_back_bit_for_bit_on_other_devices(
    tmp_path, state, saved_on: int, restored_on: int
) -> None:
    there = parallel.replicate(state, jax.local_devices()[:saved_on])
    checkpoints.save(tmp_path, 4, there.ema, there._replace(ema=None))
    devices = jax.local_devices()[:restored_on]
    sharding = parallel.replicate(0, devices).sharding
    shapes = checkpoints.template(state, sharding)
    stored = shapes._replace(ema=None)
    items = checkpoints.restore(tmp_path, 4, model=shapes.ema, training=stored)
    back = TrainState(*items["training"])._replace(ema=items["model"])
    assert_same_bits(jax.device_get(back), jax.device_get(state))
    assert all(leaf.sharding.device_set == set(devices) for leaf in jax.tree.leaves(back))


def test_a_checkpoint_without_training_continues_nothing(run, state) -> None:
    shapes = checkpoints.template(state, parallel.replicate(0, jax.local_devices()).sharding)
    with pytest.raises(InputError, match="state/20 does not hold this run's model, training"):
        checkpoints.restore(run, 20, model=shapes.ema, training=shapes._replace(ema=None))


def test_an_average_is_made_of_stored_ones(tmp_path, shapes) -> None:
    """Use snapshots of the steps 4 and 8. Storing one twice must not change it."""
    checkpoints.write_config(tmp_path, CONFIG.to_dict())
    with pytest.raises(InputError, match="has no snapshots of averages: train it with --ema=power"):
        reconstruct(tmp_path, 0.1)
    for step in (4, 8, 8):
        pair = tuple(drawn(shapes, step + i) for i in (0, 1))
        checkpoints.save_averages(tmp_path, step, pair)
    checkpoints.save_averages(tmp_path, 4, pair)
    for step, seed in ((None, 9), (4, 5)):
        found = reconstruct(tmp_path, 0.1, step)
        leaves = (jax.tree.leaves(tree) for tree in (found.variables, drawn(shapes, seed)))
        for one, two in zip(*leaves, strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-3)  # the values are around 100
    with pytest.raises(InputError, match=r"step=5: the snapshots of .* are \[4, 8\]"):
        reconstruct(tmp_path, 0.1, 5)
