"""Inject faults into a run. Whatever happens, the same command must end it with the same bits.

Faults are damage at rest, failures of writing, and kills. No fault may lose or change a run, and
the app must report every fault that costs something.
"""

import contextlib
import errno
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
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from diffusion_jax import runs
from diffusion_jax.data.batches import indices
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.runs import checkpoints, metrics
from diffusion_jax.typing import InputError, RunWarning
from tests import conftest
from tests.apps import compile_once
from tests.models import TINY
from tests.processes import Forked

ROOT = Path(__file__).parent.parent
FLAGS = (
    *(f"--network={TINY.network}", "--schedule=course:steps=20", "--batch_size=8"),
    *("--ema=exponential:0.5", "--save_every=1", "--keep=9", "--report=False"),
)
STEPS = (3, 5, 8)  # checkpoints of three epochs of 20 images in batches of 8
KILLS = 12
DISKS = ("", "50k", "200k", "300k", "400k", "600k")  # sizes of small disks


# ------------------------------------------------------------------------------- the app here


def train(run: Path, data: Path) -> tuple[object, str]:
    """Run the app in this process. Return its exit code and what it wrote to stderr."""
    from absl import flags

    from experiments import app
    from experiments.train import main

    flags.FLAGS.unparse_flags()
    where = (f"--data=npy:images={data}", f"--run={run}", "--cpu_devices=1")
    sys.argv = ["train", *FLAGS, "--epochs=3", *where]
    code, err = 0, io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            app.run(main)
        except SystemExit as stopped:
            code = stopped.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
    return code, err.getvalue()


def content(run: Path, step: int) -> list[np.ndarray]:
    """Return all arrays of a checkpoint, and the losses up to it."""
    items = checkpoints.restore(run, step, model=None, training=None)
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
OTHER_DAMAGES = (
    *((cut, name) for name in ("metrics.jsonl", "environment.json")),
    *((remove, name) for name in ("metrics.jsonl", "environment.json")),
    *((flip, "config.json"), (cut, "config.json")),
)


def damage(rng: random.Random, run: Path) -> str:
    """Damage a part of a run: one or more of its checkpoints, or one of its other files."""
    if rng.random() < 0.25:
        how, name = rng.choice(OTHER_DAMAGES)
        how(rng, run / name)
        return f"{how.__name__} {name}"
    how = rng.choice(CHECKPOINT_DAMAGES)
    folders = sorted((run / "state").iterdir(), key=lambda path: int(path.name))
    for folder in folders[-rng.choice((1, 1, 1, 2, len(folders))) :]:
        how(rng, pick(rng, folder))
    return f"{how.__name__} checkpoint"


def loads_right_or_not(run: Path, models: dict[int, Model]) -> bool:
    """Return whether load_model returns the model of a checkpoint, or refuses."""
    try:
        model = runs.load_model(run)
    except InputError:
        return True
    leaves = jax.tree.leaves(model.variables)
    return any(
        model.network == whole.network
        and np.array_equal(model.schedule[0], whole.schedule[0])
        and equal(leaves, jax.tree.leaves(whole.variables))
        for whole in models.values()
    )


# ---------------------------------------------------------------------------- faults in flight


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[mock.Mock]:
    """Refuse any write that would make a file larger than limit, as the system does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield mock.Mock(count=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@contextlib.contextmanager
def disk(run: Path, size: str) -> Iterator[mock.Mock]:
    """Put a run on a disk of this size, or on a read-only one, and enlarge it at the end."""
    run.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}" if size else "ro", "tmpfs", str(run))
    try:
        yield mock.Mock(count=10**6)
    finally:
        mount("-o", "remount,rw,size=1g", str(run))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


# Operations that can fail, and how; obstacles where a run writes; disturbances from outside.
OPERATIONS = (
    *("os.open", "os.replace", "os.rename", "os.fsync", "os.mkdir", "os.unlink", "os.rmdir"),
    *("os.listdir", "os.scandir", "os.stat", "io.open", "shutil.copyfile"),
    *("diffusion_jax.runs.metrics.append", "diffusion_jax.runs.manifests.seal"),
)
ERRORS = (errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EROFS)
PLACES = (
    *("lock", "config.json", "metrics.jsonl", "environment.json", "config.json.partial"),
    *("state", "damaged", "state/5", "state/5/manifest.json", "state/5/metrics.jsonl", "state/9"),
)
DISTURBANCES: dict[str, Callable[[Path], object]] = {
    "newest gone": lambda run: shutil.rmtree(newest_folder(run)),
    "newest unsealed": lambda run: (newest_folder(run) / "manifest.json").unlink(),
    "newest cut": lambda run: os.truncate(newest_folder(run) / "metrics.jsonl", 3),
    "all checkpoints gone": lambda run: [shutil.rmtree(path) for path in (run / "state").iterdir()],
    "foreign folder": lambda run: (run / "state" / "99").mkdir(),
    "foreign file": lambda run: (run / "state" / "7").write_text("mine"),
    "foreign save": lambda run: (run / "state" / ".7.partial").mkdir(),
    "lock gone": lambda run: (run / "lock").unlink(),
}
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fewer images": lambda images: images[:12],
    "more images": lambda images: np.concatenate([images, images[:4]]),
    "one pixel": lambda images: images ^ (np.indices(images.shape).sum(0) == 0),
    "another order": lambda images: images[::-1],
}


def newest_folder(run: Path) -> Path:
    folders = [path for path in (run / "state").iterdir() if path.name.isdecimal()]
    return max(folders, key=lambda path: int(path.name))


@contextlib.contextmanager
def intercepted(name: str, run: Path, act: Callable[[int], object]) -> Iterator[mock.Mock]:
    """Before each call of a function on files of a run, call act with the number of the call."""
    module, function = name.rsplit(".", 1)
    original = getattr(sys.modules[module], function)
    counted = mock.Mock(count=0)

    def call(*args, **kwargs):
        if name == "os.fsync" or (args and str(args[0]).startswith(str(run))):
            counted.count += 1
            act(counted.count)
        return original(*args, **kwargs)

    with mock.patch(name, call):
        yield counted


class Trial(NamedTuple):
    """The place of a fault: a new run, beside a complete one."""

    rng: random.Random
    run: Path
    whole: Path
    data: Path
    models: dict[int, Model]
    mounts: bool  # whether this process may mount file systems

    def begun(self) -> None:
        """Begin the run, up to its second-to-last checkpoint."""
        shutil.copytree(self.whole, self.run)
        shutil.rmtree(self.run / "state" / "8")


def damaged(trial: Trial) -> tuple[str, list[str]]:
    """Damage a run at rest, with or without its last checkpoint."""
    shutil.copytree(trial.whole, trial.run)
    if trial.rng.random() < 0.5:
        shutil.rmtree(trial.run / "state" / "8")
    name = damage(trial.rng, trial.run)
    return name, [] if loads_right_or_not(trial.run, trial.models) else ["loaded wrong"]


def failing(trial: Trial) -> tuple[str, list[str]]:
    """Make a file operation fail once, or from then on, in a new run or a begun one."""
    name, number = trial.rng.choice(OPERATIONS), trial.rng.choice(ERRORS)
    first, once = int(40 ** trial.rng.random()), trial.rng.random() < 0.5
    if trial.rng.random() < 0.5:
        trial.begun()

    def fail(count: int) -> None:
        if count == first or (count > first and not once):
            raise OSError(number, os.strerror(number), "somewhere")

    with intercepted(name, trial.run, fail):
        code, err = train(trial.run, trial.data)
    return f"failing {name}", unclear(code, err)


def short_of_room(trial: Trial) -> tuple[str, list[str]]:
    """Train where files must not grow, or on a disk that is small or read-only."""
    name = trial.rng.choice(("small files", *(["disk"] * 2 if trial.mounts else [])))
    if name == "small files":
        fault = small_files(trial.rng.choice((200, 1_000, 2_000, 5_000)))
    else:
        fault = disk(trial.run, trial.rng.choice(DISKS))
    with fault:
        code, err = train(trial.run, trial.data)
    return name, unclear(code, err)


def unclear(code: int, err: str) -> list[str]:
    """Return the faults in how a disturbed app ended."""
    in_one_line = code == 2 and err.count("error: ") == 1 and "Traceback" not in err
    return [] if code == 0 or in_one_line else [f"ends with {code}: {err[-1500:]}"]


def placed(trial: Trial) -> tuple[str, list[str]]:
    """Put a link to a victim, or a pipe, at the place of one of the run's files."""
    trial.begun()
    place, victim = trial.run / trial.rng.choice(PLACES), trial.run.with_suffix(".victim")
    how = trial.rng.choice(("symlink", "link", "mkfifo"))
    if place.is_dir():
        shutil.rmtree(place)
        shutil.copytree(trial.whole / "state", victim)
        how = "symlink"
    else:
        place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        victim.write_text("mine")
    getattr(os, how)(*([place] if how == "mkfifo" else [victim, place]))
    before = contents(victim)
    code, err = train(trial.run, trial.data)
    faults = unclear(code, err) + (["wrote elsewhere"] if contents(victim) != before else [])
    return f"{how} placed", faults


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {str(file): file.read_bytes() for file in files}


def disturbed(trial: Trial) -> tuple[str, list[str]]:
    """Disturb a run from outside while it trains."""
    name, moment = trial.rng.choice([*DISTURBANCES]), trial.rng.randint(1, 8)

    def disturb(count: int) -> None:
        if count == moment:
            with contextlib.suppress(OSError, ValueError):  # the file does not exist yet
                DISTURBANCES[name](trial.run)

    with intercepted("diffusion_jax.runs.metrics.append", trial.run, disturb):
        code, err = train(trial.run, trial.data)
    return f"disturbed: {name}", unclear(code, err)


def changed(trial: Trial) -> tuple[str, list[str]]:
    """Continue a run on other data, and then restore the data."""
    trial.begun()
    name, images = trial.rng.choice([*CHANGES]), np.load(trial.data)
    np.save(trial.data, CHANGES[name](images))
    code, err = train(trial.run, trial.data)
    np.save(trial.data, images)
    return name, [] if code == 2 and not unclear(code, err) else [f"taken: {code}, {err[-500:]}"]


FAULTS: dict[Callable[[Trial], tuple[str, list[str]]], int] = {
    **{damaged: 150, failing: 170, short_of_room: 50, placed: 60, disturbed: 40, changed: 30},
}


def mend(run: Path, err: str) -> None:
    """Do what the messages ask for: remove links and pipes, and move damaged files away."""
    for path in [*run.rglob("*")]:
        if path.is_symlink() or path.is_fifo() or (path.is_file() and path.stat().st_nlink > 1):
            path.unlink()
    if "To begin anew, move" in err:
        (run / "state").rename(run.with_suffix(".moved"))
    elif "config.json" in err or not (run / "config.json").exists():
        shutil.copyfile(newest_folder(run) / "config.json", run / "config.json")


# -------------------------------------------------------------------------------- the campaign


def campaign(folder: Path, counts: dict[str, int], mounts: bool) -> Counter:
    """Inject a number of faults of each kind, in a separate process. Count faults and failures."""
    warnings.simplefilter("always", RunWarning)
    compile_once()
    rng, seen, data = random.Random(f"{folder.name}"), Counter(), folder / "images.npy"
    assert train(folder / "whole", data) == (0, mock.ANY)
    whole = content(folder / "whole", 8)
    models = {step: runs.load_model(folder / "whole", step) for step in STEPS}
    kinds = [kind for kind in FAULTS for _ in range(counts.get(kind.__name__, 0))]
    for number, kind in enumerate(kinds):
        signal.alarm(600)  # stop a campaign that hangs
        run = folder / f"run{number}"
        name, faults = kind(Trial(rng, run, folder / "whole", data, models, mounts))
        code, err = train(run, data)
        if code == 2 and "Traceback" not in err:
            mend(run, err)
            code, err = train(run, data)
        if code or "Traceback" in err:
            faults.append(f"lost: {err[-1000:]}")
        elif not equal(content(run, 8), whole):
            faults.append("changed")
        seen[name] += 1
        for what in faults:
            seen[f"WRONG {number} {name}: {what}"] += 1
        if os.path.ismount(run):
            subprocess.run(["umount", str(run)], check=True)
        shutil.rmtree(run)
    return seen


def write_images(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.save(folder / "images.npy", images)


def run_campaigns(folder: Path, parts: int, **counts: int) -> Counter:
    """Run several campaigns side by side, in namespaces if the system allows them."""
    own = ["unshare", "-rm"]
    test = [*own, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    mounts = bool(shutil.which("unshare")) and not subprocess.run(test).returncode
    processes = []
    for number in range(parts):
        place = folder / f"part{number}"
        place.mkdir()
        write_images(place)
        program = (
            "import json, sys, pathlib; from tests.test_faults import campaign; "
            f"c = campaign(pathlib.Path(sys.argv[1]), {counts}, {mounts}); print(json.dumps(c))"
        )
        command = [*(own if mounts else []), sys.executable, "-W", "ignore", "-c", program]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*command, str(place)], cwd=ROOT, **pipes))
    seen: Counter = Counter()
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        seen += Counter(json.loads(out.splitlines()[-1]))
    return seen


def wrong(counts: Counter) -> list[str]:
    return [name for name in counts if name.startswith("WRONG")]


def test_a_few_faults(tmp_path) -> None:
    few = {kind.__name__: 2 if kind in (damaged, failing) else 1 for kind in FAULTS}
    counts = run_campaigns(tmp_path, 1, **few)
    assert not wrong(counts), counts
    assert counts.total() == sum(few.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_many_faults(tmp_path, kind: Callable) -> None:
    counts = run_campaigns(tmp_path, 2, **{kind.__name__: FAULTS[kind] // 2})
    conftest.FAULTS.update(counts)
    assert not wrong(counts), counts
    assert counts.total() == FAULTS[kind]


@pytest.fixture
def start(tmp_path):
    """Start the app on a run of 100 steps."""
    write_images(tmp_path)

    def start(run: Path, *more: str) -> Forked:
        where = (f"--data=npy:images={tmp_path}/images.npy", f"--run={run}")
        words = ("--epochs=40", "--cpu_devices=2", *where, *more)
        return Forked("experiments.train", *FLAGS, *words)

    return start


def wait_for_checkpoint(run: Path, process: Forked) -> None:
    while not list((run / "state").glob("*/manifest.json")):
        assert process.poll() is None, process.end()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_kills_at_random_moments(start, tmp_path) -> None:
    for run in ("first", "whole"):  # the first run compiles
        begin = time.monotonic()
        with start(tmp_path / run) as process:
            assert process.end().returncode == 0
        seconds = time.monotonic() - begin
    whole = content(tmp_path / "whole", 100)
    run, rng, kills = tmp_path / "killed", random.Random(1), 0
    for _ in range(KILLS):
        with start(run) as process:
            moment = time.monotonic() + rng.uniform(0.1, 0.8) * seconds
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.01)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            code = process.end().returncode
        kills += code == -signal.SIGKILL
        if code == 0:  # the app ended before the kill: start again
            assert equal(content(run, 100), whole)
            shutil.rmtree(run)
    with start(run) as process:
        done = process.end()
    assert done.returncode == 0, done.stderr
    assert equal(content(run, 100), whole)
    conftest.FAULTS["kill"] += kills
    assert kills > KILLS // 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_says_where(start, tmp_path, number, code: int) -> None:
    run = tmp_path / "run"
    with start(run) as process:
        wait_for_checkpoint(run, process)
        process.send_signal(number)
        done = process.end()
    assert done.returncode == code, done.stderr
    step = max(int(path.name) for path in (run / "state").iterdir())
    assert f"{number.name}: {run}/state/{step} is the last checkpoint" in done.stderr
    assert step < 100
    assert metrics.read(run / "metrics.jsonl")[-1]["step"] == step
    assert not (run / "lock").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_second_signal_leaves_the_last_whole_checkpoint(start, tmp_path) -> None:
    run = tmp_path / "run"
    with start(run) as process:
        wait_for_checkpoint(run, process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        done = process.end()
    conftest.FAULTS["second signal"] += 1
    assert done.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT), done.stderr
    assert "is the last checkpoint" not in done.stderr
    assert checkpoints.newest(run) is not None
    runs.load_model(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_divergence_stops_or_is_skipped(start, tmp_path) -> None:
    """Use an image whose label overflows in the network: steps that see it are not finite."""
    labels = np.eye(3, dtype=np.float32)[np.arange(20) % 3]
    labels[5] = 3e38
    np.save(tmp_path / "labels.npy", labels)
    run = tmp_path / "run"
    flags = (
        *("--keep_probability=1", "--deterministic"),
        f"--data=npy:images={tmp_path}/images.npy:labels={tmp_path}/labels.npy",
    )
    order = indices(0, 20, 8, 0, 100)
    bad = [step + 1 for step, chosen in enumerate(order) if 5 in chosen]
    with start(run, *flags) as process:
        done = process.end()
    assert done.returncode == 2
    assert f"the loss or its gradient is not finite in step {bad[0]}: try" in done.stderr
    with start(run, *flags, "--on_nan=skip") as process:
        done = process.end()
    assert done.returncode == 0, done.stderr
    assert f"{len(bad)} of 100 steps were skipped" in done.stdout
    records = metrics.read(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["loss"] is None] == bad
    assert all(np.isfinite(leaf).all() for leaf in content(run, 100))
