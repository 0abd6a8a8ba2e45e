"""Runs that can be trusted: damage is found and skipped, divergence stops, and one process writes.

Here are the faults of one checkpoint. test_faults.py runs hundreds of faults (make test-slow).
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import files, sampling, training
from diffusion_jax.data.batches import indices
from diffusion_jax.networks import init_variables
from diffusion_jax.parallel import choose_devices
from diffusion_jax.runs import (
    checkpoints,
    environment,
    load_model,
    locks,
    metrics,
    reconstruct,
    save_model,
    signals,
)
from diffusion_jax.runs.trainer import check_folder
from diffusion_jax.samplers import build
from diffusion_jax.sampling import draw, sample
from diffusion_jax.training import Length
from diffusion_jax.typing import InputError, RunWarning
from tests.models import SMALL as CONFIG
from tests.models import TINY
from tests.processes import HANGS

STEPS = (3, 7, 20)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    """Give models few weights."""
    monkeypatch.setattr("diffusion_jax.runs.models.variable_shapes", lambda network: drawn(0))


def drawn(seed: int):
    rng = np.random.default_rng(seed)
    return {"params": {name: rng.normal(size=3000).astype(np.float32) for name in ("a", "b")}}


def is_drawn(variables, seed: int) -> bool:
    pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(drawn(seed)), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "run"
    checkpoints.write_config(folder, CONFIG.to_dict())
    for step in STEPS:
        checkpoints.save(folder, step, drawn(step))
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def largest(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


# Damage to a checkpoint's folder, and the warning about it.
DAMAGES = {
    "bit": (lambda folder: flip(largest(folder)), "is damaged"),
    "cut": (lambda folder: os.truncate(largest(folder), 100), "is damaged"),
    "gone": (lambda folder: largest(folder).unlink(), "is missing"),
    "item gone": (lambda folder: shutil.rmtree(folder / "model"), "is missing"),
    "added": (lambda folder: (folder / "model" / "x").write_text(""), "model/x does not belong"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "never finished"),
    "manifest cut": (lambda folder: os.truncate(folder / "manifest.json", 50), "manifest.json is"),
    "manifest": (lambda folder: flip(folder / "manifest.json"), "is damaged|is missing"),
    "nested": (lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "is not JSON"),
    "pipe": (lambda folder: replace_by_pipe(folder / "manifest.json"), "is not a file"),
    "pipe inside": (lambda folder: replace_by_pipe(largest(folder)), "is not a file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_sound_checkpoint_is_used_and_the_damaged_one_named(run, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(run / "state" / "20")
    with pytest.warns(RunWarning, match=rf"state/20 is skipped: .*({message})"):
        model = load_model(run)
    assert is_drawn(model.variables, 7)
    with pytest.raises(InputError, match=rf"step=20: .*state/20 is damaged: .*({message})"):
        load_model(run, 20)
    assert is_drawn(load_model(run, 3).variables, 3)


def test_a_run_without_a_sound_checkpoint_loads_nothing(run) -> None:
    for step in STEPS:
        flip(largest(run / "state" / str(step)))
    with (
        pytest.warns(RunWarning),
        pytest.raises(InputError, match=r"no sound checkpoint, only damaged ones: \[3, 7, 20\]"),
    ):
        load_model(run)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("name", ["manifest.json", "_METADATA"])
def test_what_cannot_be_read_is_not_damaged(run, monkeypatch, number: int, name: str) -> None:
    """Expect training and sampling to stop, and every file to stay in its place."""
    opened = os.open

    def refuse(path, *args, **kwargs):
        if os.fspath(path).endswith(name):
            raise OSError(number, os.strerror(number), path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("os.open", refuse)
    message = rf"state/20 cannot be read: .*{name}: {os.strerror(number)}\. Nothing was changed"
    for read in (checkpoints.newest, load_model, lambda run: load_model(run, 20)):
        with pytest.raises(InputError, match=message):
            read(run)


def test_a_folder_that_cannot_be_listed_is_not_damaged(run, monkeypatch) -> None:
    listed = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("20/model"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=r"20 cannot be read: .*/model: Permission denied"):
        checkpoints.newest(run)


def test_training_never_begins_anew_beside_checkpoints(run) -> None:
    for step in STEPS:
        flip(largest(run / "state" / str(step)))
    with pytest.warns(RunWarning):
        assert checkpoints.newest(run) is None
    with pytest.raises(InputError, match=r"only damaged ones: \[3, 7, 20\]\. To begin anew, move"):
        checkpoints.set_aside(run, None)
    assert len(list((run / "state").iterdir())) == 3
    for step in (3, 7):
        shutil.rmtree(run / "state" / str(step))
    (run / "state/20").rename(run / "state/.20.partial")  # a first one that was never finished
    checkpoints.set_aside(run, None)
    assert not list((run / "state").iterdir())


def vanishing(run: Path):
    """Replace the checkpoint 7 by 20, as training with --keep=1 does."""
    (run.parent / "20").rename(run / "state" / "20")
    shutil.rmtree(run / "state" / "7")


@pytest.mark.parametrize(
    "when",
    [
        "diffusion_jax.runs.manifests.fault",
        "diffusion_jax.runs.checkpoints._check_config",
        "shutil.copytree",
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_checkpoint_that_vanishes_while_it_is_read_is_not_damaged(run, monkeypatch, when) -> None:
    module, name = when.rsplit(".", 1)
    original = getattr(sys.modules[module], name)
    shutil.move(run / "state" / "20", run.parent / "20")

    def first(*args, **kwargs):
        if (run / "state" / "7").exists():
            vanishing(run)
        return original(*args, **kwargs)

    monkeypatch.setattr(when, first)
    assert is_drawn(load_model(run).variables, 20)


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(run, monkeypatch) -> None:
    def refuse(path, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        with pytest.warns(RunWarning, match=r"state/\d+ cannot be removed: Permission denied"):
            checkpoints.save(run, 21, drawn(21), keep=1)
    assert is_drawn(load_model(run).variables, 21)


def test_a_run_that_is_made_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    """Kill the app while it makes a run. The same command must then succeed."""

    def killed(*args, **kwargs):
        raise SystemExit

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("diffusion_jax.runs.checkpoints.save", killed)
            with pytest.raises(SystemExit):
                save_model(tmp_path / "run", CONFIG, drawn(1))
    save_model(tmp_path / "run", CONFIG, drawn(1))
    assert is_drawn(load_model(tmp_path / "run").variables, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


WRITERS = {
    "lock": lambda run: locks.only_writer(run).__enter__(),
    "config.json": lambda run: checkpoints.write_config(run, CONFIG.to_dict()),
    "metrics.jsonl": lambda run: metrics.append(run / "metrics.jsonl", [{"step": 1}]),
    "environment.json": lambda run: environment.record(run, {}),
    "samples.npy": lambda run: files.save_npy(run / "samples.npy", np.zeros(3)),
}


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path, name: str, link) -> None:
    victim = tmp_path / "victim"
    victim.write_text("[]")
    (tmp_path / "run").mkdir()
    link(victim, tmp_path / "run" / name)
    if (name, link) == ("metrics.jsonl", os.link):  # training replaces it at its start
        metrics.restore(tmp_path / "run" / name, None)
    with contextlib.suppress(InputError, OSError):
        WRITERS[name](tmp_path / "run")
    assert victim.read_text() == "[]"


def test_damaged_checkpoints_are_set_aside_and_their_steps_written_again(run) -> None:
    flip(largest(run / "state" / "20"))
    (run / "state" / ".30.partial" / "model.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints.set_aside(run, 7)
    assert sorted(path.name for path in (run / "state").iterdir()) == ["3", "7"]
    assert (run / "damaged" / "20" / "model").is_dir()
    checkpoints.save(run, 20, drawn(4))
    assert is_drawn(load_model(run).variables, 4)


@pytest.mark.parametrize("name", ["bit", "gone", "no manifest"])
def test_a_damaged_average_is_left_out_and_named(tmp_path, name: str) -> None:
    damage, message = DAMAGES[name]
    checkpoints.write_config(tmp_path, CONFIG.to_dict())
    for step in STEPS:
        checkpoints.save_averages(tmp_path, step, (drawn(step), drawn(step)))
    folder = tmp_path / "averages" / "20"
    damage(folder)
    with pytest.warns(RunWarning, match=rf"averages/20 is skipped: .*({message})"):
        assert reconstruct(tmp_path, 0.1).step == 7
    with (
        pytest.warns(RunWarning),
        pytest.raises(InputError, match=r"step=20: the snapshots of .* are \[3, 7\]"),
    ):
        reconstruct(tmp_path, 0.1, 20)
    checkpoints.save_averages(tmp_path, 20, (drawn(20), drawn(20)))
    assert reconstruct(tmp_path, 0.1).step == 20


def test_a_configuration_that_is_not_the_checkpoints_own_is_refused(run) -> None:
    """Flip a bit so that the file is still valid JSON with valid settings."""
    path = run / "config.json"
    text = path.read_text()
    assert text.count("beta_max=0.02") == text.count("sprites:n=89400:seed=0") == 1
    path.write_text(text.replace("beta_max=0.02", "beta_max=0.03"))
    message = rf"{path} differs from .* in schedule: replace it by {run}/state/20/config\.json"
    with pytest.raises(InputError, match=message):
        load_model(run)
    with pytest.raises(InputError, match=message):  # not: was started with another configuration
        check_folder(run, CONFIG)
    path.write_text(text.replace("beta_max=0.02", "zeta_max=0.02"))
    with pytest.raises(InputError, match=rf"^{path}: .*no option zeta_max: did you mean beta_max"):
        load_model(run)
    path.write_text(text.replace("sprites:n=89400:seed=0", "sprites:n=9:seed=7"))
    assert is_drawn(load_model(run).variables, 20)


def test_a_checkpoint_whose_parts_orbax_did_not_merge_is_not_kept(run, monkeypatch) -> None:
    """Refuse to list the checkpoint once, where orbax takes the refusal for an empty folder."""
    real, refused = os.scandir, []

    def scandir(path=".", *args):
        if "/model" in str(path) and not refused:
            refused.append(path)
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="could not be written"):
        checkpoints.save(run, 30, drawn(30))
    assert refused
    assert checkpoints.newest(run) == 20
    assert is_drawn(load_model(run).variables, 20)


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["shutil.copyfile", "os.replace", "os.fsync", "os.rename"])
def test_a_save_that_fails_says_so_and_loses_nothing(run, monkeypatch, tmp_path, what) -> None:
    """Make any part of a save fail, while only one checkpoint is kept."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("1\n")
    with monkeypatch.context() as patch:
        patch.setattr(what, full)
        with pytest.raises(OSError, match=r"could not be written: .*No space left"):
            checkpoints.save(run, 21, drawn(21), files=[metrics], keep=1)
    assert sorted(path.name for path in (run / "state").iterdir()) == ["20", "3", "7"]
    assert checkpoints.latest(run) == 20
    checkpoints.save(run, 21, drawn(21), files=[metrics], keep=1)
    assert [path.name for path in (run / "state").iterdir()] == ["21"]
    assert (run / "state/21/metrics.jsonl").read_text() == "1\n"
    assert is_drawn(load_model(run).variables, 21)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written_are_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    locks.check_writable(tmp_path / "new" / "run", "out")
    with pytest.raises(InputError, match=r"out='.*file/a' cannot be written: .*file: Not a dir"):
        locks.check_writable(tmp_path / "file" / "a", "out")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    message = rf"out='{tmp_path}/a' cannot be written: {tmp_path}: Permission denied"
    with pytest.raises(InputError, match=message):
        locks.check_writable(tmp_path / "a", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -------------------------------------------------------------------------------- one writer

HOLD = """
import sys, time
from pathlib import Path
from diffusion_jax.runs.locks import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1800)
"""


def test_a_folder_has_one_writer_and_outlives_it(tmp_path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        message = (
            rf"run='{tmp_path}' is being written by process {holder.pid} on {os.uname().nodename}"
        )
        with pytest.raises(InputError, match=message), locks.only_writer(tmp_path):
            pass
        holder.kill()
    assert (tmp_path / "lock").exists()
    with locks.only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
        with pytest.raises(InputError, match="is being written"), locks.only_writer(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ("", True),
        ("{host} {dead}", True),
        ("{host} {alive}", False),
        ("other 1", False),
        ("{host} 9" + "9" * 30, False),
    ],
)
def test_without_locks_of_the_file_system_the_process_is_looked_for(
    tmp_path, monkeypatch, holder: str, free: bool
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = {"host": os.uname().nodename, "dead": ended.pid, "alive": os.getpid()}
    (tmp_path / "lock").write_text(holder.format(**names))

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    if free:
        with locks.only_writer(tmp_path):
            pass
        return
    with (
        pytest.raises(InputError, match="is being written by process"),
        locks.only_writer(tmp_path),
    ):
        pass


# ---------------------------------------------------------------------- signals, environment


TWICE = """
import hashlib, os, signal, sys, time
from diffusion_jax.runs.signals import on_signals
with on_signals() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    while request.by is None:
        time.sleep(0.01)
    print(request.by.name, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # no handler of Python's own runs in it
    print("late")
"""


def test_the_first_signal_asks_and_the_second_ends_at_once() -> None:
    command = [sys.executable, "-c", TWICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout) == (130, "SIGTERM\n"), done.stderr


def test_handlers_are_as_before_after_a_signal() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.on_signals() as request:
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + HANGS
        while request.by is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert request.by == signal.SIGTERM
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_environment_of_each_start_is_kept(tmp_path) -> None:
    for command in (["train", "--seed=1"], ["train"]):
        environment.record(tmp_path, environment.describe(command, jax.devices()))
    first, second = environment.read(tmp_path)
    assert (first["command"], second["command"]) == (["train", "--seed=1"], ["train"])
    assert first["versions"]["jax"] == jax.__version__
    assert first["devices"] == ["cpu"] * 8
    os.truncate(tmp_path / "environment.json", 30)
    with pytest.warns(RunWarning, match=r"environment\.json is damaged"):
        environment.record(tmp_path, first)
    assert environment.read(tmp_path) == [first]


def test_the_commit_is_that_of_the_working_tree(tmp_path) -> None:
    assert environment.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert environment.commit(tmp_path) == head
    (tmp_path / "new").write_text("")
    assert environment.commit(tmp_path) == head + "+"


PINNED = """
import diffusion_jax, jax
print(jax.random.normal(jax.random.split(jax.random.key(7), 3)[1], (2,), "float32"))
"""


def test_variables_of_jax_change_no_random_number() -> None:
    given = {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    words = {"env": os.environ | given, "text": True, "cwd": ROOT}
    want = jax.random.normal(jax.random.split(jax.random.key(7), 3)[1], (2,), "float32")
    assert subprocess.check_output([sys.executable, "-c", PINNED], **words) == f"{want}\n"


def test_float64_elsewhere_changes_no_sample(model) -> None:
    tableau = build("ddpm", model.schedule, 3)
    want = sample(model, tableau, 2, seed=3).images
    jax.clear_caches()
    draw._compiled.cache_clear()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(sample(model, tableau, 2, seed=3).images, want, strict=True)
        assert sampling.initial_noise(model, 2).dtype == np.float32
        leaves = jax.tree.leaves(init_variables(TINY.build_network(), 0))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


# -------------------------------------------------------------------------------- divergence


def test_a_step_that_is_not_finite_changes_only_the_step_number() -> None:
    """Let one image's label overflow in the network. Only the steps that see it must diverge."""
    n, batch = 24, 8
    config = TINY.override(ema="exponential:0.9", keep_probability=1.0)
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    labels = np.eye(3, dtype=np.float32)[np.arange(n) % 3]
    labels[5] = 3e38
    task, length = config.task(Length(n, batch, 2)), Length(n, batch, 2)
    state, devices = training.init(task), choose_devices(batch, 2)
    before, skipped = jax.device_get(state), []
    order = indices(config.seed, n, batch, 0, 6)
    for chunk in training.fit(task, length, images, labels, state, devices, seconds=0.0):
        after = jax.device_get(chunk.state)
        for loss in chunk.losses:
            skipped.append(bool(np.isnan(loss)))
            same = [
                np.array_equal(old, new)
                for old, new in zip(
                    jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True
                )
            ]
            assert all(same) if skipped[-1] else not any(same)
            assert after.step == before.step + 1
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        before = after
    assert skipped == [5 in chosen for chosen in order]
    assert sum(skipped) == 2
