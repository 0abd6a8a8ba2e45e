"""The apps as a user runs them, end to end, and how each answers what cannot be."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import checkpoints, samplers
from diffusion_jax.networks import export_state_dict, write_state_dict
from diffusion_jax.runs import load_config, load_model, save_model
from diffusion_jax.sampling import sample

ROOT = Path(__file__).parent.parent
N, T = 20, 20
STEPS = (3, 5, 8)  # that complete epochs of 20 images in batches of 8
TRAINING = (
    *("--n_feat=8", f"--timesteps={T}", "--epochs=3", "--batch_size=8", "--ema_decay=0.5"),
    *("--save_every=1", "--keep=9", "--cpu_devices=2"),
)
CONTEXTS = "class0; class1=0.6,class2=0.4; 1,0,0.6"
SAMPLING = ("--steps=10", "--eta=0.5", "--n=7", "--seed=3", f"--context={CONTEXTS}")


def files(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data, good and bad."""
    folder = tmp_path_factory.mktemp("apps")
    rng = np.random.default_rng(0)
    for name, images in {
        "images": rng.integers(0, 256, (N, 8, 8, 3), np.uint8),
        "height10": np.zeros((N, 10, 10, 3), np.uint8),
        "floats": np.zeros((N, 8, 8, 3)),
        "labels": np.arange(N) % 3,
        "short": np.arange(N - 1) % 3,
        "nan": np.full((N, 3), np.nan),
    }.items():
        np.save(folder / f"{name}.npy", images)
    (folder / "text.npy").write_text("no numbers")
    (folder / "text.safetensors").write_text("no tensors")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"data": ')
    return folder


@pytest.fixture(scope="module")
def app(folder):
    """Run an app in a process of its own; compilations are shared between them."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compilations"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*args: str, code: int = 0, start=("-m",), text: str = "") -> str:
        done = subprocess.run(
            [sys.executable, *start, *args], cwd=ROOT, env=env, input=text, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run


@pytest.fixture(scope="module")
def data(folder) -> tuple[str, str]:
    return f"--images={folder}/images.npy", f"--labels={folder}/labels.npy"


@pytest.fixture(scope="module")
def run(app, folder, data) -> Path:
    """A trained run."""
    path = folder / "run"
    out = app("experiments.train", *data, *TRAINING, f"--run={path}")
    assert f"{path}: 20 images of class0, class1, class2; 8 steps of 8 on 2 CPU cores" in out
    return path


def sampled(app, run: Path, out: Path, *flags: str) -> np.ndarray:
    app("experiments.sample", f"--run={run}", f"--out={out}", "--cpu_devices=2", *SAMPLING, *flags)
    return np.load(out / "samples.npy")


@pytest.fixture(scope="module")
def drawn(app, run, folder) -> np.ndarray:
    return sampled(app, run, folder / "drawn", "--frames=none")


# ---------------------------------------------------------------------------------- training


def test_a_run_holds_its_configuration_checkpoints_losses_and_report(run) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "state", "metrics.jsonl", "report.html")
    }
    config = load_config(run)
    assert (config.network.height, config.network.n_cfeat, config.network.n_feat) == (8, 3, 8)
    assert (config.diffusion.timesteps, config.training.epochs) == (T, 3)
    assert sorted(int(path.name) for path in (run / "state").iterdir()) == list(STEPS)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert all(np.isfinite(record["loss"]) for record in records)
    report = (run / "report.html").read_text()
    for part in ("class0", "class2", "DDIM, 20 steps", "DDPM, 20 steps", "image/gif", "n_feat"):
        assert part in report


def test_checkpoints_differ_and_are_of_the_average(run) -> None:
    kernels = [load_model(run, s).variables["params"]["out_3"]["kernel"] for s in STEPS]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])


def test_the_same_command_again_finds_it_complete(app, run, data) -> None:
    before = files(run)
    out = app("experiments.train", *data, *TRAINING, f"--run={run}", "--report=False")
    assert f"{run} is complete: 8 steps" in out
    assert files(run) == before


def saved(run: Path, step: int) -> list[np.ndarray]:
    """All arrays of a checkpoint, for training to continue and for sampling."""
    with checkpoints.open_checkpoints(run) as manager:
        items = checkpoints.restore(manager, step, model=None, training=None)
        return [np.asarray(leaf) for leaf in jax.tree.leaves((items["model"], items["training"]))]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_cut_short_ends_as_the_uninterrupted_one_bit_for_bit(app, run, data, folder) -> None:
    """It was cut after the checkpoint of step 5, in the middle of writing a line and of saving."""
    again = folder / "again"
    shutil.copytree(run, again)
    (again / "state" / "8").rename(again / "state" / "8.orbax-checkpoint-tmp-1")
    losses = (again / "metrics.jsonl").read_text()
    (again / "metrics.jsonl").write_text(losses[:-9])
    out = app("experiments.train", *data, *TRAINING, f"--run={again}", "--report=False")
    assert "continuing from step 5" in out
    assert (again / "metrics.jsonl").read_text() == losses
    ours, theirs = saved(again, 8), saved(run, 8)
    assert len(ours) > 100
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two, strict=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_killed_run_ends_as_the_uninterrupted_one_bit_for_bit(app, run, data, folder) -> None:
    flags = [*data, *TRAINING, "--epochs=40", "--report=False"]
    app("experiments.train", *flags, f"--run={folder}/whole")
    killed = folder / "killed"
    cache = f"--compilation_cache_dir={folder.parent}/compilations"
    command = [sys.executable, "-m", "experiments.train", *flags, f"--run={killed}", cache]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not (killed / "state" / "13").is_dir():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "state" / "100").exists()
    assert "continuing from step" in app("experiments.train", *flags, f"--run={killed}")
    for one, two in zip(saved(killed, 100), saved(folder / "whole", 100), strict=True):
        np.testing.assert_array_equal(one, two, strict=True)
    assert (killed / "metrics.jsonl").read_text() == (folder / "whole/metrics.jsonl").read_text()


# ---------------------------------------------------------------------------------- sampling


def test_sampling_writes_pictures_and_says_what_it_took(app, run, folder) -> None:
    before = {name: file for name, file in files(run).items() if "samples" not in name}
    out = app("experiments.sample", f"--run={run}", *SAMPLING, "--cpu_devices=2")
    assert re.search(
        r"ddim-10: 7 images in [\d.]+ s, [\d.]+ images/s, 10 network evaluations; "
        r"compilation [\d.]+ s",
        out,
    )
    folder = run / "samples" / "ddim-10"
    names = ["denoising.gif", "denoising.html", "samples.npy", "samples.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(str(folder / name) in out for name in names)
    images = np.load(folder / "samples.npy")
    assert images.shape == (7, 8, 8, 3)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    assert len({image.tobytes() for image in images}) == 7
    with Image.open(folder / "denoising.gif") as animation:
        assert animation.n_frames == 10
    with Image.open(folder / "samples.png") as picture:
        assert min(picture.size) > 8
    assert "<html" in (folder / "denoising.html").read_text()
    assert {name: file for name, file in files(run).items() if "samples" not in name} == before


@pytest.mark.parametrize("flags", [("--batch_size=3",), ("--cpu_devices=1", "--batch_size=2")])
def test_batches_and_devices_change_nothing_but_rounding(app, run, drawn, tmp_path, flags) -> None:
    """Convolutions of other batches round otherwise: by some 1e-6 here, of values up to 4."""
    images = sampled(app, run, tmp_path, "--frames=none", *flags)
    np.testing.assert_allclose(images, drawn, atol=1e-5, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npy", "samples.png"]


def test_flags_say_what_the_librarys_arguments_say(app, run, tmp_path) -> None:
    flags = ("--frames=none", "--seed=4", "--context=none;class0=200;0,300,0", "--step=3")
    images = sampled(app, run, tmp_path, *flags)
    model = load_model(run, 3)
    tableau = samplers.build("ddim", model.schedule, 10, eta=0.5)
    context = np.zeros((7, 3), np.float32)
    context[3:5, 0] = 200
    context[5:, 1] = 300

    def library(**arguments) -> np.ndarray:
        arguments = {"context": context, "seed": 4} | arguments
        return sample(model, tableau, 7, devices=jax.devices()[:1], **arguments).images

    np.testing.assert_allclose(images, library(), atol=2e-5, rtol=0)
    assert np.all(np.abs(images - library(context=None)).max((1, 2, 3))[3:] > 1e-3)
    assert np.all(np.abs(images - library(seed=3)).max((1, 2, 3)) > 0.1)


def test_compare_times_samplers_side_by_side(app, run, tmp_path) -> None:
    flags = ("--compare=ddpm:20,ddim:5", "--n=6", "--cpu_devices=2", f"--out={tmp_path}")
    out = app("experiments.sample", f"--run={run}", *flags)
    for name, evaluations in (("ddpm-20", 20), ("ddim-5", 5)):
        assert re.search(rf"^{name} +{evaluations} +[\d.]+ +[\d.]+ +[\d.]+ s$", out, re.MULTILINE)
    assert re.search(r"ddim-5 is [\d.]+ times as fast as the slowest", out)
    assert [path.name for path in tmp_path.iterdir()] == ["compare-ddpm-20-ddim-5.png"]


# ----------------------------------------------------------------------------------- weights


def test_weights_go_out_and_come_back_to_the_same_samples_bit_for_bit(
    app, run, drawn, tmp_path
) -> None:
    file, back = tmp_path / "weights.safetensors", tmp_path / "back"
    app("experiments.weights", f"--from={run}", f"--to={file}")
    app("experiments.weights", f"--from={file}", f"--to={back}", f"--timesteps={T}")
    assert load_config(back).network == load_config(run).network
    images = sampled(app, back, tmp_path / "drawn", "--frames=none")
    np.testing.assert_array_equal(images, drawn)


# --------------------------------------------------------------------------------- bad input

COMMANDS = {
    "train": ("--images={}/images.npy", "--labels={}/labels.npy", *TRAINING, "--run={}/new"),
    "sample": ("--run={}/run", "--cpu_devices=2", "--out={}/new"),
    "weights": ("--from={}/run", "--to={}/new.safetensors"),
}
# Flags that are added to those commands, where {} is the folder of the data, and the answer.
REFUSED = {
    "train": {
        ("--n_feat=12",): r"n_feat=12: give a multiple of 8 from 8 up",
        ("--batch_size=0",): r"batch_size=0: it must be at least 1",
        ("--batch_size=100", "--devices=3"): r"devices=3: this machine has 2",
        ("--batch_size=7", "--devices=2"): r"batch_size=7 is not divisible by devices=2: take 8 im",
        ("--devices=0",): r"devices=0: this machine has 2",
        ("--cpu_devices=0",): r"cpu_devices=0: it must be at least 1",
        ("--images={}/none.npy",): r"none\.npy: there is no such file",
        ("--images={}/height10.npy",): r"height10\.npy.*height 10: it must be a multiple of 4",
        ("--images={}/floats.npy",): r"floats\.npy.*type float64: they must be uint8",
        ("--images={}/text.npy",): r"text\.npy is not a \.npy file",
        ("--images={}/empty",): r"empty: no images in it: it must hold one subfolder",
        ("--labels={}/short.npy",): r"short\.npy: 20 images but labels of shape \(19, 3\)",
        ("--labels={}/nan.npy",): r"nan\.npy: labels must be finite numbers",
        ("--images=",): r"labels='.*labels\.npy' without images",
        ("--images=", "--labels=", "--class_frequencies=1,2"): r"\(1\.0, 2\.0\); it must be 5 numb",
        ("--class_frequencies=1,x,1,1,1",): r"class_frequencies=1,x,1,1,1: it must be numbers",
        ("--class_names=a,b",): r"class number 2, but there are 2 class names",
        ("--class_names=a,a,b",): r"class_names=a,a,b: each must be another",
        ("--epochs=0",): r"epochs=0: it must be at least 1",
        ("--epochs=two",): r"--epochs=two: invalid literal",
        ("--epochs=1000000000",): r"epochs=1000000000: too many",
        ("--timesteps=0",): r"schedule of 0 steps: it must have at least 1",
        ("--learning_rate=-1",): r"learning_rate=-1\.0: it must be above 0",
        ("--lr_schedule=step",): r"--lr_schedule=step: value should be one of <notes\|",
        ("--seed=-1",): r"seed=-1: it must be at least 0",
        ("--preset=huge",): r"--preset=huge: value should be one of <notes\|demo>",
        ("--save_every=0",): r"save_every=0: it must be at least 1",
        ("--keep=0",): r"keep=0: it must be at least 1",
        ("--n_feats=8",): r"Unknown command line flag 'n_feats'",
        ("surplus",): r"'surplus' is no flag: flags are --name=value",
        ("--run={}/run", "--epochs=4"): r"started with another configuration: epochs: 3 -> 4\.",
        ("--run={}/run", "--seed=1", "--norm=group"): r"norm: 'batch' -> 'group'; seed: 0 -> 1",
        ("--run={}",): r"run='.*' exists and is not a run: name another folder",
        ("--run={}/text.npy",): r"run='.*text\.npy' exists and is not a run",
        ("--run={}/broken",): r"broken/config\.json is not JSON",
    },
    "sample": {
        ("--sampler=newton",): r"--sampler=newton: value should be one of <ddpm\|ddim",
        ("--steps=0",): r"steps=0: it must be in 1\.\.20",
        ("--steps=21",): r"steps=21: it must be in 1\.\.20",
        ("--steps=ten",): r"--steps=ten: invalid literal",
        ("--context=knight",): r"context 'knight' is not understood: write 3 numbers, or names of",
        ("--context=class0;class1=x",): r"context 'class1=x' is not understood",
        ("--context=1,0",): r"context '1,0' has 2 numbers: write 3 numbers",
        ("--context=",): r"context='' is empty",
        ("--context=class0; class0",): r"context='class0; class0': each context must stand there",
        ("--run={}/uncond", "--context=class0"): r"context='class0': this run was trained without",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--run={}/empty",): r"run='.*empty' is not a run: there is no config\.json in it",
        ("--run={}/text.npy",): r"run='.*text\.npy': there is no such folder",
        ("--run={}/broken",): r"broken/config\.json is not JSON",
        ("--run={}/unfinished",): r"run='.*unfinished' has no checkpoint yet",
        ("--step=4",): r"step=4: the checkpoints of .*run are \[3, 5, 8\]",
        ("--batch_size=0",): r"batch_size=0: it must be at least 1",
        ("--devices=3",): r"devices=3: this machine has 2",
        ("--devices=0",): r"devices=0: this machine has 2",
        ("--eta=2",): r"eta=2\.0: it must be in \[0, 1\]",
        ("--sampler=ddpm", "--eta=0.5"): r"sampler ddpm takes no eta: it takes variance",
        ("--variance=posterior",): r"sampler ddim takes no variance: it takes eta",
        ("--n=2",): r"n=2: it must be at least 3, one image for each context",
        ("--n=0",): r"n=0: it must be at least",
        ("--seed=-1",): r"seed=-1: it must be in 0\.\.4294967295",
        ("--seed=4294967296",): r"seed=4294967296: it must be in 0\.\.4294967295",
        ("--grid=diagonal",): r"--grid=diagonal: value should be one of",
        ("--frames=some",): r"--frames=some: value should be one of <notes\|all\|none>",
        ("--compare=ddpm:x",): r"compare=ddpm:x: write samplers as ddpm:500,ddim:25",
        ("--compare=ddpm:²",): r"compare=ddpm:²: write samplers as",
        ("--compare=ddpm:5,newton:5",): r"sampler='newton' is unknown: choose from ddpm, ddim",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
        ("--stepps=5",): r"Unknown command line flag 'stepps'",
        ("surplus", "word"): r"'surplus word' is no flag",
    },
    "weights": {
        ("--to={}/new",): r"from='.*run', to='.*new': one of them must be a \.pth, \.pt, \.saf",
        ("--to={}/text.safetensors",): r"to='.*text\.safetensors' exists: name a new file",
        ("--from={}/none",): r"run='.*none': there is no such folder",
        ("--from={}/none.safetensors", "--to={}/new"): r"none\.safetensors: No such file",
        ("--from={}/text.safetensors", "--to={}/new"): r"text\.safetensors is not a file of tens",
        ("--from={}/good.safetensors", "--to={}/run"): r"run='.*run' is not empty: name a new fol",
        ("--from={}/good.safetensors", "--to={}/text.npy"): r"run='.*text\.npy' is not a folder",
        ("--from={}/good.safetensors", "--to={}/new", "--class_names=a,b"): r"3 context features",
        ("--step=4",): r"step=4: the checkpoints of .*run are \[3, 5, 8\]",
        ("--form=x",): r"Unknown command line flag 'form'",
        ("surplus",): r"'surplus' is no flag",
    },
}


def answer_all() -> None:
    """In a process of its own: run an app on many command lines, as if in one process each.

    stdin: JSON of the app, the folder, and lists of flags. stdout: JSON of (exit code, stderr,
    whether XLA compiled, whether a file of the folder changed), for each list.
    """
    from absl import flags

    from experiments import flags as shared

    app, folder, commands = json.load(sys.stdin)
    main = importlib.import_module(f"experiments.{app}").main
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    answers = []
    for command in commands:
        flags.FLAGS.unparse_flags()
        compilations.clear()
        sys.argv = [app, *command]
        before, code, err = files(Path(folder)), 0, io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                shared.run(main)
            except SystemExit as stopped:
                code = stopped.code or 0
            except Exception as bug:
                code = repr(bug)
        changed = files(Path(folder)) != before
        answers.append((code, err.getvalue(), bool(compilations), changed))
    print(json.dumps(answers))


@pytest.fixture(scope="module")
def answers(app, run, folder) -> dict:
    """What the apps answer to everything in REFUSED, and at the end to a good command."""
    model = load_model(run)
    write_state_dict(folder / "good.safetensors", export_state_dict(model.variables))
    save_model(folder / "uncond", model.config.override(null_context=True), model.variables)
    checkpoints.write_config(folder / "unfinished", model.config.to_dict())
    good = {"sample": ("--frames=none", "--steps=2", "--n=3")}
    found = {}
    for name, command in COMMANDS.items():
        cases = [*REFUSED[name], *([good[name]] if name in good else [])]
        lines = [[flag.replace("{}", str(folder)) for flag in (*command, *case)] for case in cases]
        text = json.dumps((name, str(folder), lines))
        out = app("from tests.test_apps import answer_all; answer_all()", start=("-c",), text=text)
        found |= {(name, case): a for case, a in zip(cases, json.loads(out), strict=True)}
    return found


@pytest.mark.parametrize(
    ("name", "flags"), [(name, flags) for name, cases in REFUSED.items() for flags in cases]
)
def test_bad_input_is_one_line_and_changes_nothing(answers, name: str, flags) -> None:
    code, err, compiled, changed = answers[name, flags]
    assert code == 2
    assert re.search(REFUSED[name][flags], err), err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert not compiled
    assert not changed


def test_good_input_does_compile_and_write(answers) -> None:
    """The control of the test before."""
    code, _, compiled, changed = answers["sample", ("--frames=none", "--steps=2", "--n=3")]
    assert (code, compiled, changed) == (0, True, True)


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("train", ["--n_feat=12"], "n_feat=12: give a multiple of 8 from 8 up"),
        ("sample", ["--run=none"], "run='none': there is no such folder"),
        ("weights", ["--to=a.pth"], "flag --from=None: Flag --from must have a value other than"),
    ],
)
def test_bad_input_in_a_process_of_its_own(app, name: str, flags: list, line: str) -> None:
    err = app(f"experiments.{name}", *flags, code=2)
    assert err.startswith(f"error: {line}")
    assert len(err.splitlines()) == 1


def test_compilations_are_kept_where_the_flag_says(app, run, folder) -> None:
    kept, file = folder / "kept", folder / "images.npy"
    command = ("experiments.sample", f"--run={run}", f"--out={folder}/cached", *SAMPLING)
    out = app(*command, "--frames=none", f"--compilation_cache_dir={kept}")
    assert re.search(r"the images were there [\d.]+ s after the start of the process", out)
    programs = {path.name for path in kept.glob("*-cache")}
    assert any("on_one_device" in name for name in programs)
    app(*command, "--frames=none", f"--compilation_cache_dir={kept}")
    assert {path.name for path in kept.glob("*-cache")} == programs
    err = app(*command, f"--compilation_cache_dir={file}", code=2)
    assert "is a file: name a folder" in err
