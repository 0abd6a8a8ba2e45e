"""The apps as a user runs them, end to end, and how each answers what cannot be."""

import contextlib
import importlib
import io
import json
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

from diffusion_jax import checkpoints, evaluation, samplers
from diffusion_jax.data import UNKNOWN
from diffusion_jax.networks import export_state_dict, write_state_dict
from diffusion_jax.runs import load_config, load_model, save_model
from diffusion_jax.sampling import sample
from tests.processes import HANGS, run_app

ROOT = Path(__file__).parent.parent
N, T = 20, 20
STEPS = (3, 5, 8)  # that complete epochs of 20 images in batches of 8
TRAINING = (
    *("--n_feat=8", f"--timesteps={T}", "--epochs=3", "--batch_size=8", "--ema_decay=0.5"),
    *("--save_every=1", "--keep=9", "--cpu_devices=2"),
)
CONTEXTS = "class0; class1=0.6,class2=0.4; 1,0,0.6"
SAMPLING = (
    "--sampler=ddim",
    "--steps=10",
    "--eta=0.5",
    "--n=7",
    "--seed=3",
    f"--context={CONTEXTS}",
)


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
        "many": rng.integers(0, 256, (220, 8, 8, 3), np.uint8),
        "many_labels": np.arange(220) % 3,
        "tall": np.zeros((220, 12, 12, 3), np.uint8),
        "whole": np.zeros((220, 8, 8, 3), np.int64),
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
def app():
    """Run an app to its end."""

    def run(*args: str, code: int = 0) -> str:
        done = run_app(*args)
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


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_every_app_explains_itself(path: Path) -> None:
    if "__main__" in path.read_text():
        command = [sys.executable, "-m", f"experiments.{path.stem}", "--helpshort"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
        assert f"python -m experiments.{path.stem}" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------- training


def test_a_run_holds_its_configuration_checkpoints_losses_and_report(run) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "environment.json", "state", "metrics.jsonl", "report.html")
    }
    config = load_config(run)
    assert config.network.image_shape == (8, 8, 3)
    assert (config.network.n_cfeat, config.network.n_feat) == (3, 8)
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


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_snapshots_of_averages_survive_a_cut_and_make_other_averages(app, data, folder) -> None:
    """--ema_snapshots=4 of 8 steps: at 2, 4, 6, 8. The run is cut after the checkpoint of 5."""
    whole, again, wider = (folder / name for name in ("averaged", "averaged-again", "wider"))
    extra = [flag for flag in TRAINING if "ema_decay" not in flag]
    extra += ["--ema_snapshots=4", "--ema_profile=power", "--report=False"]
    app("experiments.train", *data, *extra, f"--run={whole}")
    shutil.copytree(whole, again)
    shutil.rmtree(again / "state" / "8")
    shutil.rmtree(again / "averages" / "8")
    app("experiments.train", *data, *extra, f"--run={again}")
    for one, two in zip(saved(again, 8), saved(whole, 8), strict=True):
        np.testing.assert_array_equal(one, two, strict=True)
    assert sorted(int(path.name) for path in (again / "averages").iterdir()) == [2, 4, 6, 8]

    out = app("experiments.ema", f"--run={again}", "--sigma_rel=0.1", f"--to={wider}")
    assert "the average of sigma_rel 0.1 at step 8; its weights over the steps are met to 0." in out
    made, kept = load_model(wider), load_model(whole)  # which sampled from sigma_rel = 0.1
    for one, two in zip(*map(jax.tree.leaves, (made.variables, kept.variables)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    assert made.config.training.ema_sigma_rel == 0.1

    refused = {
        ("--sigma_rel=0.3", f"--run={whole}", "--to=x"): "sigma_rel=0.3: it must be above 0 and",
        ("--sigma_rel=0.1", f"--run={wider}", "--to=x"): f"run='{wider}' has no snapshots of aver",
        ("--sigma_rel=0.1", f"--run={whole}", "--to=x", "--step=3"): "step=3: the snapshots of",
        ("--sigma_rel=0.1", f"--run={whole}", f"--to={wider}"): f"run='{wider}' is not empty",
        ("--sigma_rel=0.1", "--run=none", f"--to={wider}"): f"run='{wider}' is not empty",
    }
    for flags, message in refused.items():
        assert app("experiments.ema", *flags, code=2).startswith(f"error: {message}")


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
    (folder,) = (run / "samples").iterdir()
    assert folder.name.startswith("ddim-10-eta=0.5-n=7-seed=3-context=")
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
    assert [path.name for path in tmp_path.iterdir()] == ["compare-ddpm-20-ddim-5-n=6.png"]


# ----------------------------------------------------------------------------------- editing


@pytest.mark.parametrize(
    ("flags", "images"),
    [
        (("--edit=sdedit", "--pick=0,3", "--options=eta=1"), 2),
        (("--edit=inpaint", "--mask=top"), 8),
        (("--edit=reconstruct", "--pick=5"), 1),
        (("--edit=interpolate", "--pick=2,3", "--between=3", "--guidance=2"), 3),
        (("--edit=interpolate", "--seeds=1,2", "--context=class1", "--between=4"), 4),
        (("--edit=contexts", "--context=class0;class1", "--between=3"), 3),
    ],
)
def test_edits_write_a_picture_and_their_images(app, run, tmp_path, flags, images) -> None:
    out = app("experiments.edit", f"--run={run}", f"--out={tmp_path}", "--steps=5", *flags)
    assert f"written: {tmp_path}/edited.png, {tmp_path}/edited.npy" in out
    edited = np.load(tmp_path / "edited.npy")
    assert edited.shape == (images, 8, 8, 3)
    assert np.all(np.isfinite(edited))
    with Image.open(tmp_path / "edited.png") as picture:
        assert min(picture.size) > 80
    if "--mask=top" in flags:
        pixels = np.load(run.parent / "images.npy")[:8].astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(edited[:, :4], pixels[:, :4])


# ----------------------------------------------------------------------------------- weights


def test_weights_go_out_and_come_back_to_the_same_samples_bit_for_bit(
    app, run, drawn, tmp_path
) -> None:
    file, back = tmp_path / "weights.safetensors", tmp_path / "back"
    app("experiments.weights", f"--from={run}", f"--to={file}")
    app("experiments.weights", f"--from={file}", f"--to={back}", f"--timesteps={T}")
    assert load_config(back).network == load_config(run).network
    assert load_config(back).data.fingerprint == UNKNOWN
    images = sampled(app, back, tmp_path / "drawn", "--frames=none")
    np.testing.assert_array_equal(images, drawn)


# --------------------------------------------------------------------------------- bad input

COMMANDS = {
    "train": ("--images={}/images.npy", "--labels={}/labels.npy", *TRAINING, "--run={}/new"),
    "sample": ("--run={}/run", "--cpu_devices=2", "--out={}/new"),
    "edit": ("--run={}/run", "--cpu_devices=2", "--out={}/new", "--steps=4"),
    "weights": ("--from={}/run", "--to={}/new.safetensors"),
    "evaluate": ("--run={}/many", "--cpu_devices=2", "--out={}/new", "--real_n=100"),
    "likelihood": ("--run={}/many", "--cpu_devices=2", "--out={}/new", "--n=3"),
    "recipes": (
        *("--images={}/many.npy", "--labels={}/many_labels.npy", "--out={}/recipes", "--epochs=1"),
        *("--n_feat=8", "--steps=2", "--n=100", "--real_n=100", "--cpu_devices=2"),
    ),
}
EVALUATION = ("--steps=2", "--guidance=2", "--options=order=2", "--n=100")
EVALUATED = "sa_solver-2-options=order=2-guidance=2.0-n=100-real_n=100"
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
        ("--images={}/height10.npy",): r"height=10: give a multiple of 4 from 8 up",
        ("--images={}/floats.npy",): r"floats\.npy.*type float64: they must be uint8",
        ("--images={}/text.npy",): r"text\.npy is not a \.npy file",
        ("--images={}/empty",): r"labels\.npy: the labels are the subfolders",
        ("--labels={}/short.npy",): r"short\.npy: 20 images but labels of shape \(19,\)",
        ("--labels={}/nan.npy",): r"nan\.npy: labels must be finite numbers",
        ("--images=",): r"labels='.*labels\.npy' without images",
        ("--n_images=5",): r"n_images: a run on --images does not read it: leave it out",
        ("--class_frequencies=1,1,1,1,1",): r"class_frequencies: a run on --images does not",
        ("--image_size=8",): r"image_size=8: only a folder of images can be scaled",
        ("--images=", "--labels=", "--class_frequencies=1,2"): r"\(1\.0, 2\.0\); it must be 5 numb",
        ("--class_frequencies=1,x,1,1,1",): r"class_frequencies=1,x,1,1,1: they must be numbers",
        ("--class_names=a,b",): r"class number 2, but there are 2 class names",
        ("--class_names=a,a,b",): r"class_names=a,a,b: each must be another",
        ("--epochs=0",): r"epochs=0: it must be at least 1",
        ("--epochs=two",): r"--epochs=two: invalid literal",
        ("--epochs=1000000000",): r"epochs=1000000000: it must be at most 1000000",
        ("--timesteps=0",): r"schedule of 0 steps: it must have at least 1",
        ("--learning_rate=-1",): r"learning_rate=-1\.0: it must be above 0",
        ("--lr_schedule=step",): r"--lr_schedule=step: value should be one of <notes\|",
        ("--flips=hero",): r"flips=hero: there is no class hero: choose none, all, or some of clas",
        ("--flips=all,class0",): r"flips=all,class0: it must be none, all, or the names of cla",
        ("--seed=-1",): r"seed=-1: it must be at least 0",
        ("--preset=huge",): r"--preset=huge: value should be one of <notes\|demo\|best>",
        ("--save_every=0",): r"save_every=0: it must be at least 1",
        ("--keep=0",): r"keep=0: it must be at least 1",
        ("--n_feats=8",): r"Unknown command line flag 'n_feats'",
        ("surplus",): r"'surplus' is no flag: flags are --name=value",
        ("--run={}/run", "--epochs=4"): r"started with another configuration: epochs: 3 -> 4\.",
        ("--run={}/run", "--seed=1", "--norm=group"): r"norm: 'batch' -> 'group'; seed: 0 -> 1",
        ("--run={}/run", "--images={}/many.npy", "--labels={}/many_labels.npy"): (
            r"another configuration: data: 220 images, where there were 20; images: .*labels: "
        ),
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
        ("--guidance=nan",): r"guidance=nan: it must be finite",
        ("--run={}/uncond", "--guidance=2"): r"guidance=2\.0: this run was trained only with",
        ("--guidance_interval=1,2",): r"guidance_interval needs --guidance, its scale",
        ("--guidance=2", "--guidance_interval=1"): r"it must be two numbers, LOW,HIGH",
        ("--guidance=2", "--guidance_interval=2,1"): r"interval 2\.0,1\.0: it must obey 0 <= low",
        ("--guidance=2", "--cfg_plus_plus"): r"guidance=2\.0: CFG\+\+ takes it from \[0, 1\]",
        ("--guidance=2", "--autoguidance={}/none"): r"run='.*none': there is no such folder",
        ("--threshold=soft",): r"--threshold=soft: value should be one of <none\|clip\|dynamic>",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--run={}/empty",): r"run='.*empty' is not a run: there is no config\.json in it",
        ("--run={}/text.npy",): r"run='.*text\.npy': there is no such folder",
        ("--run={}/broken",): r"broken/config\.json is not JSON",
        ("--run={}/unfinished",): r"run='.*unfinished' has no checkpoint yet",
        ("--step=4",): r"step=4: the checkpoints of .*run are \[3, 5, 8\]",
        ("--batch_size=0",): r"batch_size=0: it must be at least 1",
        ("--devices=3",): r"devices=3: this machine has 2",
        ("--devices=0",): r"devices=0: this machine has 2",
        ("--sampler=ddim", "--eta=2"): r"eta=2\.0: it must be in \[0, 1\]",
        ("--sampler=ddpm", "--eta=0.5"): r"sampler ddpm takes no eta: it takes variance",
        ("--variance=posterior",): r"sampler sa_solver takes no variance: it takes ",
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
    "edit": {
        ("--edit=dream",): r"--edit=dream: value should be one of <sdedit\|inpaint",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
        ("--strength=0",): r"strength=0\.0: it must be above 0 and at most 1",
        ("--strength=0.1",): r"strength=0\.1: on this grid the last step starts at 0\.25",
        ("--steps=21",): r"steps=21: it must be in 1\.\.20",
        ("--options=eta=2",): r"eta=2: it must be in \[0, 1\]",
        ("--pick=20",): r"pick=20: the images are numbered 0 to 19",
        ("--pick=x",): r"pick=x: they must be whole numbers",
        ("--pick=1,2,3", "--edit=interpolate"): r"pick=1,2,3: interpolation takes two images",
        ("--seeds=1", "--edit=interpolate"): r"seeds=1: it must be two numbers",
        ("--seeds=1,-1", "--edit=interpolate"): r"seeds=-1: it must be in 0\.\.4294967295",
        ("--between=1", "--edit=interpolate"): r"between=1: it must be at least 2",
        ("--images={}/height10.npy",): r"images of shape \(10, 10, 3\): this run's are \(8, 8, 3\)",
        ("--images={}/none.npy",): r"none\.npy: there is no such file",
        ("--edit=contexts",): r"contexts needs two of them",
        ("--edit=contexts", "--context=class0"): r"context='class0': it must be two",
        ("--run={}/uncond", "--context=class0"): r"context='class0': this run was trained without",
        ("--edit=inpaint", "--mask=middle"): r"mask='middle' is unknown: choose from left, right",
        ("--edit=inpaint", "--mask={}/none.npy"): r"none\.npy: there is no such file",
        ("--edit=inpaint", "--mask={}/labels.npy"): r"shape \(20,\): it must be \(8, 8\), of 0 and",
        ("--edit=inpaint", "--repeats=0"): r"repeats=0: it must be at least 1",
        ("--edit=reconstruct", "--iterations=0"): r"iterations=0: it must be at least 1",
        ("--seed=-1",): r"seed=-1: it must be in 0\.\.4294967295",
    },
    "weights": {
        (
            "--to={}/imported",
        ): r"from='.*run', to='.*imported': one of them must be a \.pth, \.pt, \.saf",
        ("--to={}/text.safetensors",): r"to='.*text\.safetensors' exists: name a new file",
        ("--from={}/none",): r"run='.*none': there is no such folder",
        ("--from={}/none.safetensors", "--to={}/imported"): r"none\.safetensors: No such file",
        (
            "--from={}/text.safetensors",
            "--to={}/imported",
        ): r"text\.safetensors is not a file of tens",
        ("--from={}/good.safetensors", "--to={}/run"): r"run='.*run' is not empty: name a new fol",
        ("--from={}/good.safetensors", "--to={}/text.npy"): r"run='.*text\.npy' is not a folder",
        (
            "--from={}/good.safetensors",
            "--to={}/imported",
            "--class_names=a,b",
        ): r"3 context features",
        ("--step=4",): r"step=4: the checkpoints of .*run are \[3, 5, 8\]",
        ("--form=x",): r"Unknown command line flag 'form'",
        ("surplus",): r"'surplus' is no flag",
    },
    "evaluate": {
        ("--n=99",): r"n=99: it must be at least 100",
        ("--n=1000000000",): r"n=1000000000: it must be at most 100000",
        ("--real_n=99",): r"real_n=99: it must be at least 100",
        ("--batch_size=0",): r"batch_size=0: it must be at least 1",
        ("--seed=-1",): r"seed=-1: it must be in 0\.\.4294967295",
        (
            "--samples={}/many.npy",
            "--guidance=3",
            "--n=100",
        ): r"guidance: --samples, which are not drawn here, does not",
        (
            "--samples={}/many.npy",
            "--step=5",
        ): r"step: --samples, which are not drawn here",
        ("--steps=21",): r"steps=21: it must be in 1\.\.20",
        ("--options=eta=1",): r"sampler sa_solver takes no eta: it takes ",
        ("--options=eta",): r"options=eta: write them as order=3",
        ("--guidance=nan",): r"guidance=nan: it must be finite",
        ("--run={}/uncond", "--guidance=2"): r"guidance=2\.0: this run was trained only with or",
        ("--run={}/run",): r"images\.npy' holds 20 images: measuring takes two sets of 100",
        ("--run={}/other",): r"images of shape \(12, 12, 3\) with 3 context features; this run was",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--run={}/unfinished",): r"run='.*unfinished' has no checkpoint yet",
        ("--step=4",): r"step=4: the checkpoints of .*many are \[0\]",
        ("--samples={}/none.npy",): r"none\.npy: there is no such file",
        ("--samples={}/text.npy",): r"text\.npy is not a \.npy file of numbers",
        ("--samples={}/tall.npy",): r"shape \(220, 12, 12, 3\): they must be \(n, 8, 8, 3\)",
        ("--samples={}/whole.npy",): r"whole\.npy: images of type int64: float32 in \[-1, 1\], or",
        ("--samples={}/images.npy",): r"images\.npy: n=20: it must be at least 100",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
        ("--name=a/b",): r"name='a/b': it must be a file's name, without a folder",
        ("--devices=3",): r"devices=3: this machine has 2",
        ("--samplers=ddim",): r"Unknown command line flag 'samplers'",
    },
    "likelihood": {
        ("--n=1",): r"n=1: it must be at least 2",
        ("--n=1000000000",): r"n=1000000000: it must be at most 100000",
        ("--probes=0",): r"probes=0: it must be at least 1",
        ("--batch_size=0",): r"batch_size=0: it must be at least 1",
        ("--seed=-1",): r"seed=-1: it must be in 0\.\.4294967295",
        ("--by=flow,elbo",): r"by=flow,elbo: choose from bound, flow",
        ("--by=",): r"by=: choose from bound, flow",
        ("--run={}/run",): r"images\.npy' holds 20 images: measuring takes two sets of 100",
        ("--run={}/other",): r"images of shape \(12, 12, 3\) with 3 context features; this run was",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--step=4",): r"step=4: the checkpoints of .*many are \[0\]",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
        ("--devices=3",): r"devices=3: this machine has 2",
    },
    "recipes": {
        ("--recipes=worst",): r"recipes='worst' is unknown: choose from notes, notes\+learning_ra",
        ("--epochs=0",): r"epochs=0: it must be at least 1",
        ("--n=99",): r"n=99: it must be at least 100",
        ("--real_n=20",): r"real_n=20: it must be at least 100",
        ("--steps=0",): r"steps=0",
        ("--devices=3",): r"devices=3: this machine has 2",
        ("--images={}/none.npy",): r"none\.npy: there is no such file",
        ("--images={}/images.npy", "--labels={}/labels.npy"): r"holds 20 images: measuring takes",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
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
def answers(run, folder) -> dict:
    """What the apps answer to everything in REFUSED, and at the end to a good command."""
    model = load_model(run)
    write_state_dict(folder / "good.safetensors", export_state_dict(model.variables))
    save_model(folder / "uncond", model.config.override(null_context=True), model.variables)
    checkpoints.write_config(folder / "unfinished", model.config.to_dict())
    many = {
        "fingerprint": (),
        "images": f"{folder}/many.npy",
        "labels": f"{folder}/many_labels.npy",
    }
    save_model(folder / "many", model.config.override(**many), model.variables)
    tall = {"images": f"{folder}/tall.npy", "labels": "", "fingerprint": ()}
    save_model(folder / "other", model.config.override(**tall), model.variables)
    good = {
        "sample": ("--frames=none", "--steps=2", "--n=3"),
        "evaluate": EVALUATION,
        "recipes": ("--recipes=notes,notes+guidance=1.5",),
    }
    assert REFUSED.keys() == COMMANDS.keys()
    found = {}
    for name, command in COMMANDS.items():
        cases = [*REFUSED[name], *([good[name]] if name in good else [])]
        lines = [[flag.replace("{}", str(folder)) for flag in (*command, *case)] for case in cases]
        text = json.dumps((name, str(folder), lines))
        answer = [sys.executable, "-c", "from tests.test_apps import answer_all; answer_all()"]
        done = subprocess.run(
            answer, cwd=ROOT, input=text, stdout=subprocess.PIPE, text=True, check=True
        )
        found |= {(name, case): a for case, a in zip(cases, json.loads(done.stdout), strict=True)}
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


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sample", ("--frames=none", "--steps=2", "--n=3")),
        ("evaluate", EVALUATION),
        ("recipes", ("--recipes=notes,notes+guidance=1.5",)),
    ],
)
def test_good_input_does_compile_and_write(answers, name: str, flags) -> None:
    """The control of the test before."""
    code, err, compiled, changed = answers[name, flags]
    assert (code, compiled, changed) == (0, True, True), err


def test_an_evaluation_holds_every_measure_and_a_report(answers, app, folder) -> None:
    record = json.loads((folder / "new" / f"{EVALUATED}.json").read_text())
    measures = record["measures"]
    assert {"KID, classifier", "Frechet, pixels", "precision", "class accuracy"} <= set(measures)
    numbers = [n for row in measures.values() for side in row.values() for n in side.values()]
    assert len(numbers) == 4 * len(measures)
    assert np.isfinite(numbers).all()
    assert (record["flags"]["guidance"], record["flags"]["n"]) == (2, 100)
    assert "class accuracy" in (folder / "new" / f"{EVALUATED}.html").read_text()
    command = [flag.replace("{}", str(folder)) for flag in COMMANDS["evaluate"]]
    out = app("experiments.evaluate", *command, f"--samples={folder}/many.npy")
    assert "classifier trained" not in out
    measures = json.loads((folder / "new" / "many.json").read_text())["measures"]
    assert "class accuracy" not in measures
    (folder / "new" / "same").mkdir()
    np.save(folder / "new" / "same" / "many.npy", np.load(folder / "many.npy"))
    samples = f"--samples={folder}/new/same/many.npy"
    err = app("experiments.evaluate", *command, samples, code=2)
    assert re.search(r"many\.json holds results of other settings: give another --name", err)
    distance = {side: e["value"] for side, e in measures["distance to training"].items()}
    # Of the 220 images, 100 are the other real set, and 120 are what counts as training images.
    assert distance["samples"] == pytest.approx(distance["real"] * 100 / 220, rel=1e-5)
    assert distance["real"] > 50


def test_recipes_are_trained_once_and_their_rows_make_a_table(answers, app, folder) -> None:
    out = folder / "recipes"
    assert {path.name for path in out.iterdir()} == {
        *("notes", "notes+guidance=1.5", "classifier.npz", "results.md")
    }
    assert load_config(out / "notes").training.batch_size == 64
    rows = [
        json.loads((out / name / "recipe.json").read_text())
        for name in ("notes", "notes+guidance=1.5")
    ]
    lines = (out / "results.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *("| real images", "| notes", "| notes+guidance=1.5")
    ]
    for row, line in zip(rows, lines[3:], strict=True):
        kid = evaluation.Estimate(**row["measures"]["KID, classifier"]["samples"])
        assert line.split(" | ")[1] == str(kid)
    assert rows[0]["measures"] != rows[1]["measures"], "guidance changes the samples"
    command = [flag.replace("{}", str(folder)) for flag in COMMANDS["recipes"]]
    assert "1 recipes finished, 0 to go" in app("experiments.recipes", *command, "--recipes=notes")
    err = app("experiments.recipes", *command, "--epochs=2", code=2)
    assert "holds results of epochs=1: name another folder, or the old settings" in err


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
    assert programs
    app(*command, "--frames=none", f"--compilation_cache_dir={kept}")
    assert {path.name for path in kept.glob("*-cache")} == programs
    err = app(*command, f"--compilation_cache_dir={file}", code=2)
    assert "is a file: name a folder" in err
