"""Jobs of several processes over the loopback, and how they end after a fault."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import parallel
from diffusion_jax.runs import checkpoints, load_model, metrics
from diffusion_jax.typing import InputError
from tests.processes import HANGS, finish, start

ROOT = Path(__file__).parent.parent
TRAINING = (
    *("--data=sprites:n=80", "--schedule=course:steps=50", "--epochs=4", "--batch_size=16"),
    # Before BatchNorm, or groups of one channel, biases have gradients of zero, and Adam would make
    # whole steps of their rounding. So use neither.
    *("--network=context_unet:n_feat=16:norm=group", "--save_every=2", "--noreport"),
)
SAMPLING = ("--sampler=ddim:10", "--n=10", "--frames=none")


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("somewhere,2,0", "processes='somewhere,2,0': it must be HOST:PORT,COUNT,NUMBER, or"),
        ("host:,2,0", "it must be HOST:PORT"),
        ("host:70000,2,0", "numbered from 0 to COUNT - 1, and ports from 1 to 65535"),
        ("host:1234,2", "it must be HOST:PORT,COUNT,NUMBER"),
        ("host:1234,2,2", "processes='host:1234,2,2': processes are numbered from 0"),
    ],
)
def test_processes_that_cannot_be_are_named(given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parallel.start_processes(given)


def test_the_coordinator_listens_where_it_is_told_to(monkeypatch) -> None:
    given = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: given.update(kwargs))
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            InputError, match=f"processes={where},2,0: some program already listens there"
        ):
            parallel.start_processes(f"{where},2,0")
        assert not given
        parallel.start_processes(f"{where},2,1")
    parallel.start_processes(f"{where},2,0")
    assert given["coordinator_bind_address"] == given["coordinator_address"] == where


@pytest.mark.parametrize("count", [-1, 0, 1025, 10**12])
def test_cpu_devices_that_cannot_be_are_named(count: int) -> None:
    with pytest.raises(InputError, match=f"^cpu_devices={count}: it must be at least 1, at most"):
        parallel.use_cpu_cores(count)


def test_in_one_process_everything_is_local() -> None:
    assert parallel.is_first()
    assert parallel.agree(7) == parallel.largest(7) == 7
    parallel.wait_for_all()
    with pytest.raises(InputError, match="as it was"), parallel.sharing_errors():
        raise InputError("as it was")
    assert parallel.first_devices(3) == jax.devices()[:3]
    assert parallel.first_devices(0) == jax.devices()[:1]
    assert parallel.first_devices(99) == jax.devices()


def test_scattered_arrays_are_gathered() -> None:
    tree = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": None}
    on_devices = jax.device_put(
        parallel.scatter(tree, jax.devices()[:4]),
        parallel.replicate(0, jax.devices()[:4]).sharding,
    )
    back = parallel.gather(on_devices)
    np.testing.assert_array_equal(back["a"], tree["a"], strict=True)
    assert back["b"] is None


# --------------------------------------------------------------------------- two processes


def begin(folder: Path, *own: tuple[str, ...]) -> list[subprocess.Popen]:
    """Start training in two processes, each with its own flags."""
    return start("train", *TRAINING, f"--run={folder / 'run'}", processes=2, own=own)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


LONG = ("--epochs=100000", "--save_every=4")


@pytest.fixture
def training(tmp_path) -> Iterator[list[subprocess.Popen]]:
    """Yield two processes that train and have written a checkpoint."""
    jobs = begin(tmp_path, LONG, LONG)
    try:
        deadline = time.monotonic() + HANGS
        while not list(tmp_path.glob("run/state/*/manifest.json")):
            assert time.monotonic() < deadline, "training does not begin"
            assert all(job.poll() is None for job in jobs), [job.communicate() for job in jobs]
            time.sleep(0.2)
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.communicate()  # this closes its pipe


def test_processes_with_other_data_refuse_alike(tmp_path) -> None:
    ended = finish(begin(tmp_path, (), ("--data=sprites:n=80:seed=1",)))
    for code, output in ended:
        assert code == 2, output
        assert last_line(output) == (
            "error: the processes have different settings or data: start all with the same"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(tmp_path) -> None:
    ended = finish(begin(tmp_path, (), ("--data=npy:images=nowhere.npy",)))
    assert [code for code, _ in ended] == [2, 2]
    fault = f"{ROOT}/nowhere.npy: there is no such file"
    assert last_line(ended[0][1]) == f"error: process 1: {fault}"
    assert last_line(ended[1][1]) == f"error: {fault}"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_job(training, victim: int, how: int) -> None:
    os.kill(training[victim].pid, how)
    lost = time.monotonic()
    output = training[1 - victim].communicate(timeout=HANGS)[0]
    assert time.monotonic() - lost < 100, "JAX's own patience"
    assert training[1 - victim].returncode not in (0, 2)
    assert any(words in output for words in ("one of the others failed", "another task died")), (
        output
    )


@pytest.mark.slow
@pytest.mark.parametrize(("told", "number"), [([1], 15), ([0, 1], 2)])
def test_a_signal_to_any_process_ends_all_with_a_checkpoint(
    training, tmp_path, told: list[int], number: int
) -> None:
    for process in told:
        training[process].send_signal(number)
    outputs = [job.communicate(timeout=HANGS)[0] for job in training]
    assert [job.returncode for job in training] == [128 + number] * 2, outputs
    newest = checkpoints.newest(tmp_path / "run")
    message = f"{signal.Signals(number).name}: {tmp_path}/run/state/{newest} is the last checkpoint"
    assert message in outputs[0]
    assert metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == newest


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once_and_leaves_a_whole_checkpoint(training, tmp_path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        training[0].send_signal(number)
    assert "is the last checkpoint" not in training[0].communicate(timeout=HANGS)[0]
    assert training[0].returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    output = training[1].communicate(timeout=HANGS)[0]
    assert training[1].returncode not in (0, 2)
    assert any(words in output for words in ("one of the others failed", "another task died")), (
        output
    )
    load_model(tmp_path / "run", checkpoints.newest(tmp_path / "run"))


# -------------------------------------------------------------------- processes against one


def train(folder: Path, processes: int) -> None:
    """Train a run to its end, and sample from it."""
    for app, flags in (("train", TRAINING), ("sample", SAMPLING)):
        for code, output in finish(start(app, *flags, f"--run={folder}", processes=processes)):
            assert code == 0, output


def continue_from(source: Path, folder: Path, processes: int) -> None:
    """Train a run from its second-to-last checkpoint, in a different number of processes."""
    shutil.copytree(source, folder)
    shutil.rmtree(max((folder / "state").iterdir(), key=lambda path: int(path.name)))
    train(folder, processes)


def results(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses and the samples of a run."""
    (path,) = folder.glob("samples/*/samples.npy")
    losses = [record["loss"] for record in metrics.read(folder / "metrics.jsonl")]
    return np.array(losses), np.load(path)


@pytest.mark.slow
def test_processes_change_nothing_but_rounding(tmp_path) -> None:
    """Compare one process with 4 devices, 2 with 2 each, and runs that continue in the other way.

    `make cluster-demo` runs only this test, and shows its output.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, 1)
    train(two, 2)
    continue_from(two, tmp_path / "two_then_one", 1)
    continue_from(one, tmp_path / "one_then_two", 2)
    losses, images = results(one)
    assert (len(losses), len(images)) == (20, 10)
    print(f"\n{len(losses)} steps, {len(images)} images; one process with 4 devices against")
    for name in ("two", "two_then_one", "one_then_two"):
        far = [
            np.abs(ours - theirs).max() / np.abs(theirs).max()
            for ours, theirs in zip(results(tmp_path / name), (losses, images), strict=True)
        ]
        print(f"{name:12}: losses differ by {far[0]:.1e}, images by {far[1]:.1e}")
        assert max(far) < 1e-5  # relative to the largest value
