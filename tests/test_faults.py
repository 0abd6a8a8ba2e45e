"""A campaign of faults: whatever happens to a run, the same command ends it to the same bits.

Damage at rest, failures while it writes, and kills, injected into the app. No fault may lose a run
or change it, and none that costs anything may pass in silence.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import checkpoints, metrics, runs, training
from diffusion_jax.data.batches import indices
from diffusion_jax.typing import InputError, RunWarning

ROOT = Path(__file__).parent.parent
FLAGS = (
    *("--n_feat=8", "--timesteps=20", "--batch_size=8", "--ema_decay=0.5", "--cpu_devices=2"),
    *("--save_every=1", "--keep=9", "--report=False"),
)
STEPS = (3, 5, 8)  # of the checkpoints in three epochs of 20 images in batches of 8
AT_REST, IN_FLIGHT, KILLS = 130, 60, 12


# ------------------------------------------------------------------------------- the app here


def once(make: Callable) -> Callable:
    """Make each thing once, by the text of what it is made of: nothing compiles twice."""
    made: dict[str, object] = {}

    def made_before(*args):
        key = repr(args)
        if key not in made:
            made[key] = make(*args)
        return made[key]

    return made_before


def train(run: Path, data: Path) -> tuple[object, str]:
    """Run the app in this process. Returns its exit code and what it wrote to stderr."""
    from absl import flags

    from experiments import flags as shared
    from experiments.train import main

    flags.FLAGS.unparse_flags()
    sys.argv = ["train", *FLAGS, "--epochs=3", f"--images={data}", f"--run={run}"]
    code, err = 0, io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            shared.run(main)
        except SystemExit as stopped:
            code = stopped.code or 0
    return code, err.getvalue()


def content(run: Path, step: int) -> list[np.ndarray]:
    """All arrays of a checkpoint, and the losses up to it."""
    with checkpoints.open_checkpoints(run) as manager:
        items = checkpoints.restore(manager, step, model=None, training=None)
    losses = np.frombuffer((run / "metrics.jsonl").read_bytes(), np.uint8)
    return [*map(np.asarray, jax.tree.leaves((items["model"], items["training"]))), losses]


def equal(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


# ------------------------------------------------------------------------------ faults at rest


def pick(rng: random.Random, folder: Path) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return rng.choice([path for path in files if path.stat().st_size])


def flip(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(rng: random.Random, path: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(rng: random.Random, path: Path) -> None:
    path.unlink()


def remove_folder(rng: random.Random, path: Path) -> None:
    shutil.rmtree(path.parent)


CHECKPOINT_DAMAGES = (flip, cut, remove, remove_folder)
OTHER_DAMAGES = ("metrics.jsonl", "environment.json")


def damage(rng: random.Random, run: Path) -> str:
    """Damage some of a run: one to all of its checkpoints, or another of its files."""
    if rng.random() < 0.25:
        name, how = rng.choice(OTHER_DAMAGES), rng.choice((cut, remove))
        how(rng, run / name)
        return f"{how.__name__} {name}"
    how = rng.choice(CHECKPOINT_DAMAGES)
    folders = sorted((run / "state").iterdir(), key=lambda path: int(path.name))
    for folder in folders[-rng.choice((1, 1, 1, 2, len(folders))) :]:
        how(rng, pick(rng, folder))
    return f"{how.__name__} checkpoint"


def loads_right_or_not(run: Path, averages: dict[int, list]) -> bool:
    """Whether load_model gives the variables of one of the checkpoints, or refuses."""
    try:
        leaves = jax.tree.leaves(runs.load_model(run).variables)
    except InputError:
        return True
    return any(equal(leaves, average) for average in averages.values())


# ---------------------------------------------------------------------------- faults in flight


@contextlib.contextmanager
def failing(name: str, call: int) -> Iterator[mock.Mock]:
    """Let one call of a function fail as on a full disk, and those that follow within it."""
    module, function = name.rsplit(".", 1)
    original = getattr(sys.modules[module], function)
    counted = mock.Mock(count=0)

    def fail(*args, **kwargs):
        counted.count += 1
        if counted.count == call:
            if name.endswith("append"):
                args[0].open("a").write('{"step": 1, "ep')
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with mock.patch(name, fail):
        yield counted


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[mock.Mock]:
    """Refuse what would make a file larger than limit, as the system does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield mock.Mock(count=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


# What may fail, and about how often a run calls it.
FAILING = {
    "os.replace": 14,
    "os.fsync": 90,
    "shutil.copyfile": 3,
    "diffusion_jax.metrics.append": 4,
}


def disturbed(rng: random.Random, run: Path, data: Path) -> tuple[str, bool]:
    """Train while something fails. Returns what, and whether a failure was passed in silence."""
    name = rng.choice((*FAILING, "small files"))
    if name == "small files":
        call, fault = 0, small_files(rng.choice((200, 1_000, 10_000, 50_000)))
    else:
        call = rng.randint(1, FAILING[name])
        fault = failing(name, call)
    with fault as calls:
        code, err = train(run, data)
    fired = calls.count >= call
    return f"failing {name}", fired and code == 0 and "warning: " not in err


# -------------------------------------------------------------------------------- the campaign


def campaign(folder: Path, at_rest: int, in_flight: int) -> Counter:
    """In a process of its own: the faults that need no kill. Counts them, and what was wrong."""
    warnings.simplefilter("always", RunWarning)
    make_variables = once(training.init_variables)
    training.init_variables = lambda *args: jax.tree.map(jnp.copy, make_variables(*args))
    training.train_chunk = once(training.train_chunk)
    rng, counts, data = random.Random(0), Counter(), folder / "images.npy"
    assert train(folder / "whole", data) == (0, mock.ANY)
    whole = content(folder / "whole", 8)
    averages = {
        step: jax.tree.leaves(runs.load_model(folder / "whole", step).variables) for step in STEPS
    }
    for number in range(at_rest + in_flight):
        run = folder / f"run{number}"
        if number < at_rest:
            shutil.copytree(folder / "whole", run)
            if rng.random() < 0.5:
                shutil.rmtree(run / "state" / "8")
            name, wrong = damage(rng, run), []
            if not loads_right_or_not(run, averages):
                wrong.append("loaded wrong")
        else:
            name, silent = disturbed(rng, run, data)
            wrong = ["silent"] if silent else []
        code, err = train(run, data)
        if code or "Traceback" in err:
            wrong.append(f"lost: {err}")
        elif not equal(content(run, 8), whole):
            wrong.append("changed")
        counts[name] += 1
        for what in wrong:
            counts[f"WRONG {number} {name}: {what}"] += 1
        shutil.rmtree(run)
    return counts


def write_images(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.save(folder / "images.npy", images)


def run_campaign(folder: Path, at_rest: int, in_flight: int) -> Counter:
    write_images(folder)
    program = (
        "import json, sys, pathlib; from tests.test_faults import campaign; "
        f"print(json.dumps(campaign(pathlib.Path(sys.argv[1]), {at_rest}, {in_flight})))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Counter(json.loads(done.stdout.splitlines()[-1]))


def wrong(counts: Counter) -> list[str]:
    return [name for name in counts if name.startswith("WRONG")]


def test_a_few_faults(tmp_path) -> None:
    counts = run_campaign(tmp_path, 4, 4)
    assert counts.total() == 8
    assert not wrong(counts), counts


@pytest.mark.slow
def test_many_faults(tmp_path, capsys) -> None:
    counts = run_campaign(tmp_path, AT_REST, IN_FLIGHT)
    with capsys.disabled():
        print(f"\n{counts.total()} faults: {dict(counts)}")
    assert not wrong(counts), counts
    assert counts.total() == AT_REST + IN_FLIGHT


@pytest.fixture
def start(tmp_path):
    """Start the app on a run of 100 steps; compilations are shared."""
    write_images(tmp_path)
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compilations"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(run: Path, *more: str) -> subprocess.Popen:
        words = ("--epochs=40", f"--images={tmp_path}/images.npy", f"--run={run}", *more)
        command = [sys.executable, "-m", "experiments.train", *FLAGS, *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    while not list((run / "state").glob("*/manifest.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_kills_at_random_moments(start, tmp_path, capsys) -> None:
    for run in ("first", "whole"):  # the first one compiles
        begin = time.monotonic()
        with start(tmp_path / run) as process:
            process.communicate()
        seconds = time.monotonic() - begin
    assert process.returncode == 0
    whole = content(tmp_path / "whole", 100)
    run, rng, kills = tmp_path / "killed", random.Random(1), 0
    for _ in range(KILLS):
        with start(run) as process:
            moment = time.monotonic() + rng.uniform(0.2, 1.1) * seconds
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:  # it was faster: begin anew
            assert equal(content(run, 100), whole)
            shutil.rmtree(run)
    with start(run) as process:
        err = process.communicate()[1]
    assert process.returncode == 0, err
    assert equal(content(run, 100), whole)
    with capsys.disabled():
        print(f"\n{kills} kills, {len(list(tmp_path.glob('killed/damaged/*')))} set aside")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_says_where(start, tmp_path, number, code: int) -> None:
    run = tmp_path / "run"
    with start(run) as process:
        wait_for_checkpoint(run, process)
        process.send_signal(number)
        err = process.communicate()[1]
    assert process.returncode == code, err
    step = max(int(path.name) for path in (run / "state").iterdir())
    assert f"{number.name}: {run}/state/{step} is the last checkpoint" in err
    assert step < 100
    assert metrics.read(run / "metrics.jsonl")[-1]["step"] == step
    assert not (run / "lock").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_divergence_stops_or_is_skipped(start, tmp_path) -> None:
    """One image's label overflows in the network: the steps that see it are not finite."""
    labels = np.eye(3, dtype=np.float32)[np.arange(20) % 3]
    labels[5] = 3e38
    np.save(tmp_path / "labels.npy", labels)
    run = tmp_path / "run"
    flags = (f"--labels={tmp_path}/labels.npy", "--keep_probability=1", "--deterministic")
    order = indices(0, 20, 8, 0, 100)
    bad = [step + 1 for step, chosen in enumerate(order) if 5 in chosen]
    with start(run, *flags) as process:
        err = process.communicate()[1]
    assert process.returncode == 2
    assert f"the loss or its gradient is not finite in step {bad[0]}: try" in err
    with start(run, *flags, "--on_nan=skip") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{len(bad)} of them were skipped" in out
    records = metrics.read(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["loss"] is None] == bad
    assert all(np.isfinite(leaf).all() for leaf in content(run, 100))
