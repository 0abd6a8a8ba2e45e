"""Jobs of several processes over the loopback, and how they end when something is wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import checkpoints, metrics, parallel
from diffusion_jax.runs import load_model
from diffusion_jax.typing import InputError
from experiments.cluster_demo import TRAINING, finish, start
from tests.processes import HANGS

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("somewhere", 2, 0), "coordinator='somewhere': it must be HOST:PORT, or auto"),
        (("host:", 2, 0), "it must be HOST:PORT"),
        (("host:70000", 2, 0), "it must be HOST:PORT"),
        (("host:1234", 2), "give --num_processes and --process_id"),
        (("host:1234", None, 0), "give --num_processes and --process_id"),
        (("host:1234", 2, 2), "process_id=2, num_processes=2: processes are numbered from 0"),
        (("auto", 2), "coordinator=auto finds num_processes and process_id: leave them out"),
    ],
)
def test_processes_that_cannot_be_are_named(given, message) -> None:
    with pytest.raises(InputError, match=message):
        parallel.start_processes(*given)


def test_the_coordinator_listens_where_it_is_told_to(monkeypatch) -> None:
    given = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: given.update(kwargs))
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"coordinator={where}: another program listens there"):
            parallel.start_processes(where, 2, 0)
        assert not given
        parallel.start_processes(where, 2, 1)
    parallel.start_processes(where, 2, 0)
    assert given["coordinator_bind_address"] == given["coordinator_address"] == where


@pytest.mark.parametrize("count", [-1, 0, 1025, 10**12])
def test_cpu_devices_that_cannot_be_are_named(count: int) -> None:
    with pytest.raises(InputError, match=f"^cpu_devices={count}: it must be at least 1, at most"):
        parallel.use_cpu_cores(count)


def test_in_one_process_everything_is_local() -> None:
    assert parallel.is_first()
    assert parallel.agree(7) == parallel.largest(7) == 7
    parallel.wait_for_all()
    with pytest.raises(InputError, match="as it was"), parallel.alike():
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
    """Training in two processes, each with flags of its own."""
    return start("train", *TRAINING, f"--run={folder / 'run'}", processes=2, own=own)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


LONG = ("--epochs=100000", "--save_every=4")


@pytest.fixture
def training(tmp_path) -> Iterator[list[subprocess.Popen]]:
    """Two processes that train, with a checkpoint behind them."""
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
            job.communicate()  # closes its pipe


def test_processes_with_other_data_refuse_alike(tmp_path) -> None:
    ended = finish(begin(tmp_path, (), ("--data_seed=1",)))
    for code, output in ended:
        assert code == 2, output
        assert last_line(output) == (
            "error: the processes have different settings or data: start them alike"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(tmp_path) -> None:
    ended = finish(begin(tmp_path, (), ("--images=nowhere.npy",)))
    assert [code for code, _ in ended] == [2, 2]
    fault = "n_images: a run on --images does not read it: leave it out"
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
    assert any(words in output for words in ("another one was lost", "another task died")), output


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
    said = f"{signal.Signals(number).name}: {tmp_path}/run/state/{newest} is the last checkpoint"
    assert said in outputs[0]
    assert metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == newest


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once_and_leaves_a_whole_checkpoint(training, tmp_path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        training[0].send_signal(number)
    assert "is the last checkpoint" not in training[0].communicate(timeout=HANGS)[0]
    assert training[0].returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    output = training[1].communicate(timeout=HANGS)[0]
    assert training[1].returncode not in (0, 2)
    assert any(words in output for words in ("another one was lost", "another task died")), output
    load_model(tmp_path / "run", checkpoints.newest(tmp_path / "run"))


@pytest.mark.slow
def test_the_demo_shows_that_processes_change_nothing(tmp_path) -> None:
    command = [sys.executable, "-m", "experiments.cluster_demo", f"--out={tmp_path / 'demo'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("losses differ by") == 3
