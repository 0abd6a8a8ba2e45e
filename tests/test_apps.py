"""Run the apps as a user does, and test their answers to invalid input.

They run in this process, where one compilation serves all. Only a few need a separate process.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from diffusion_jax import samplers
from diffusion_jax.evaluation import classifier
from diffusion_jax.networks import export_state_dict, write_state_dict
from diffusion_jax.runs import checkpoints, load_config, load_model, overview, save_model
from diffusion_jax.sampling import draw, sample
from diffusion_jax.typing import InputError
from experiments import app
from experiments.__main__ import APPS
from tests.apps import call, output_of
from tests.models import SMALL, TINY, untrained
from tests.processes import finish, run_app, start

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parent.parent
N, T = 20, 40
STEPS = (3, 5, 8)  # the steps that complete epochs of 20 images in batches of 8
TRAINING = (
    *(f"--network={TINY.network}", f"--schedule=course:steps={T}", "--epochs=3"),
    *("--ema=power:snapshots=4", "--batch_size=8", "--save_every=1", "--keep=9"),
)
SAMPLING = ("--sampler=ddim:10:eta=0.5", "--n=7", "--seed=3", "--devices=2")
CONTEXTS = "--context=class0; class1=0.6,class2=0.4; 1,0,0.6"
FORWARD = {
    "course": {},
    "karras": {"schedule": "karras:steps=40", "prediction": "edm"},
    "flow": {"schedule": "flow:steps=40", "prediction": "v"},
}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and the time of every file in a folder."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return {str(path.relative_to(folder)): (s.st_size, s.st_mtime_ns) for path, s in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with data, valid and invalid."""
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
def data(folder) -> str:
    return f"--data=npy:images={folder}/images.npy:labels={folder}/labels.npy"


@pytest.fixture(scope="module")
def run(folder, data) -> Path:
    """Return a trained run."""
    path = folder / "run"
    out = output_of("train", data, *TRAINING, "--devices=2", f"--run={path}")
    assert f"{path}: 20 images of 8x8, RGB; 3 classes: class0 7, class1 7, class2 6" in out
    assert f"{path}: 3 epochs in batches of 8 on 2 CPU" in out
    return path


@pytest.fixture(scope="module")
def runs(folder, run, model) -> Path:
    """Return a folder of untrained runs: one for each forward process, and others."""
    variables = model.variables
    for name, fields in FORWARD.items():
        save_model(folder / name, TINY.override(**fields), variables)
    save_model(folder / "nan", TINY, jax.tree.map(lambda leaf: leaf * jnp.nan, variables))
    model, config = load_model(run), load_config(run)
    unet = export_state_dict(untrained(SMALL).variables)
    write_state_dict(folder / "good.safetensors", unet)
    save_model(folder / "uncond", config.override(null_context=True), model.variables)
    checkpoints.write_config(folder / "unfinished", config.to_dict())
    for name, text in {
        "few": config.data,
        "many": f"npy:images={folder}/many.npy:labels={folder}/many_labels.npy",
        "other": f"npy:images={folder}/tall.npy",
    }.items():
        save_model(folder / name, config.override(fingerprint=(), data=text), variables)
    return folder


def sampled(run: Path, out: Path, *flags: str) -> np.ndarray:
    call("sample", f"--run={run}", f"--out={out}", "--frames=none", *SAMPLING, CONTEXTS, *flags)
    return np.load(out / "samples.npy")


@pytest.fixture(scope="module")
def drawn(run, folder) -> np.ndarray:
    return sampled(run, folder / "drawn")


@pytest.mark.parametrize("name", APPS)
def test_every_app_explains_itself(name: str) -> None:
    """Expect all flags in the help, and at most 25 flags in train and sample."""
    done = run_app(f"experiments.{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m experiments.{name}" in done.stdout
    count = len(re.findall(r"^  --", done.stdout, re.MULTILINE))
    assert 0 < count <= (25 if name in ("train", "sample") else 30)
    assert max(map(len, done.stdout.splitlines())) <= 100


# ---------------------------------------------------------------------------------- training


def test_a_run_holds_its_configuration_checkpoints_losses_and_report(run) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "environment.json", "state", "averages", "metrics.jsonl", "report.html"),
        *("data.json", "data.png", "preview.png"),
    }
    config = load_config(run)
    assert (config.image_shape, config.n_cfeat, config.epochs) == ((8, 8, 3), 3, 3)
    assert (config.network, config.build_schedule().steps) == (TINY.network, T)
    assert sorted(int(path.name) for path in (run / "state").iterdir()) == list(STEPS)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert all(np.isfinite(record["loss"]) for record in records)
    report = (run / "report.html").read_text()
    for part in ("class0", "class2", "DDIM, 25 steps", "DDPM, 40 steps", "image/gif", "tiny"):
        assert part in report
    kernels = [load_model(run, s).variables["params"]["Conv_0"]["kernel"] for s in STEPS]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])


def test_the_same_command_again_finds_it_complete(run, data) -> None:
    before = files(run / "state")
    out = output_of("train", data, *TRAINING, f"--run={run}", "--report=False")
    assert f"{run} is complete: 8 steps" in out
    assert files(run / "state") == before


def test_the_steps_that_fit_are_laid_out_once(data, folder, monkeypatch) -> None:
    """Expect the stored epochs to give the same run, and a continued run to keep them."""
    monkeypatch.setattr("diffusion_jax.training.measure_speed", lambda chunks, seconds: 10.0)
    tiny = (data, "--network=tiny", "--batch_size=8", "--devices=2", "--noreport", "--save_every=5")
    timed, counted = folder / "timed", folder / "counted"
    out = output_of("train", *tiny, f"--run={timed}", "--minutes=0.1")
    (steps,) = map(int, re.findall(r"(\d+) steps fit", out))
    assert 0.97 * 3 * 10 - 1 <= steps <= 0.97 * 6 * 10  # half of 6 s is kept for steps
    epochs = load_config(timed).epochs
    assert (epochs, epochs * N) == (steps * 8 / N, steps * 8)
    output_of("train", *tiny, f"--run={counted}", f"--epochs={epochs!r}")
    assert_same(counted, timed, steps, least=5)
    shutil.rmtree(timed / "state" / str(steps))
    out = output_of("train", *tiny, f"--run={timed}", "--minutes=7")
    assert f"keeping the {steps} steps that were planned when the run began" in out
    assert_same(timed, counted, steps, least=5)


def full(*args, **kwargs) -> None:
    raise OSError(28, "No space left on device")


def saved(run: Path, step: int) -> list[np.ndarray]:
    """Return all arrays of a checkpoint, those for training and those for sampling."""
    items = checkpoints.restore(run, step, model=None, training=None)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((items["model"], items["training"]))]


def assert_same(run: Path, whole: Path, step: int, least: int = 40) -> None:
    ours, theirs = saved(run, step), saved(whole, step)
    assert len(ours) > least
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two, strict=True)
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_cut_short_ends_as_the_uninterrupted_one_bit_for_bit(run, data, folder) -> None:
    """Cut the run after the checkpoint of step 5, while it writes a line and a checkpoint.

    Its snapshots of averages, at the steps 2, 4, 6 and 8, must then give equal other averages.
    """
    again, wider = folder / "again", folder / "wider"
    shutil.copytree(run, again)
    (again / "state" / "8").rename(again / "state" / ".8.partial")
    shutil.rmtree(again / "averages" / "8")
    losses = (again / "metrics.jsonl").read_text()
    (again / "metrics.jsonl").write_text(losses[:-9])
    flags = ("--devices=2", "--report=False")
    assert "continuing from step 5" in output_of("train", data, *TRAINING, *flags, f"--run={again}")
    assert_same(again, run, 8)
    assert sorted(int(path.name) for path in (again / "averages").iterdir()) == [2, 4, 6, 8]

    out = output_of("convert", f"--from={again}", "--sigma_rel=0.1", f"--to={wider}")
    assert "the average of sigma_rel 0.1 at step 8; its weights over the steps are met to 0." in out
    made, kept = load_model(wider), load_model(run)  # it sampled with sigma_rel = 0.1
    for one, two in zip(*map(jax.tree.leaves, (made.variables, kept.variables)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    assert load_config(wider).ema == "power:sigma_rel=0.1:snapshots=0"


def test_a_full_disk_ends_a_run_and_names_the_last_checkpoint(data, folder, monkeypatch) -> None:
    saved, run = checkpoints.save, folder / "full"

    def save(folder: Path, step: int, *args, **options) -> None:
        if step == STEPS[1]:
            monkeypatch.setattr("shutil.copyfile", full)
        saved(folder, step, *args, **options)

    monkeypatch.setattr(checkpoints, "save", save)
    last = f"{run}/state/{STEPS[0]} is the last checkpoint"
    with pytest.raises(OSError, match=f"could not be written: No space left on device; {last}"):
        call("train", data, *TRAINING, "--devices=2", f"--run={run}")
    monkeypatch.undo()
    load_model(run, STEPS[0])


def test_training_that_skips_every_step_has_learned_nothing(folder, tmp_path) -> None:
    np.save(tmp_path / "huge.npy", np.full((N, 3), 3e38, np.float32))
    data = f"--data=npy:images={folder}/images.npy:labels={tmp_path}/huge.npy"
    flags = ("--devices=2", "--on_nan=skip", f"--run={tmp_path}/run")
    with pytest.raises(InputError, match="has learned nothing: every step was skipped"):
        call("train", data, *TRAINING, *flags)


# ---------------------------------------------------------------------------------- sampling


def test_sampling_writes_pictures_and_says_what_it_took(run) -> None:
    before = {name: file for name, file in files(run).items() if "samples" not in name}
    out = output_of("sample", f"--run={run}", *SAMPLING, CONTEXTS)
    assert re.search(
        r"ddim-10-eta=0.5: 7 images in [\d.]+ s, [\d.]+ images/s, 10 network evaluations; "
        r"compilation [\d.]+ s",
        out,
    )
    assert re.search(r"the images were there [\d.]+ s after the start of the process", out)
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
    now = {name: file for name, file in files(run).items() if "samples" not in name}
    assert now.keys() == before.keys()
    assert [name for name in now if now[name] != before[name]] == ["."] * ("." in now)


def test_batches_and_devices_change_nothing_but_rounding(run, drawn, tmp_path) -> None:
    """Allow for rounding in convolutions of other batches: about 1e-6 here, for values up to 4."""
    images = sampled(run, tmp_path, "--devices=1", "--batch_size=2")
    np.testing.assert_allclose(images, drawn, atol=1e-5, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npy", "samples.png"]


def test_flags_say_what_the_librarys_arguments_say(run, tmp_path) -> None:
    flags = ("--seed=4", "--context=none;class0=200;0,300,0", "--step=3")
    images = sampled(run, tmp_path, *flags)
    model = load_model(run, 3)
    tableau = samplers.build("ddim", model.schedule, 10, eta=0.5)
    context = np.zeros((7, 3), np.float32)
    context[3:5, 0] = 200
    context[5:, 1] = 300

    def library(**arguments) -> np.ndarray:
        arguments = {"context": context, "seed": 4} | arguments
        return sample(model, tableau, 7, devices=jax.devices()[:2], **arguments).images

    np.testing.assert_allclose(images, library(), atol=2e-5, rtol=0)
    assert np.all(np.abs(images - library(context=None)).max((1, 2, 3))[3:] > 1e-3)
    assert np.all(np.abs(images - library(seed=3)).max((1, 2, 3)) > 0.1)


def test_compare_times_samplers_side_by_side(run, tmp_path) -> None:
    flags = ("--compare=ddpm:20,ddim:5", "--n=7", "--devices=2", f"--out={tmp_path}")
    out = output_of("sample", f"--run={run}", *flags)
    for name, evaluations in (("ddpm-20", 20), ("ddim-5", 5)):
        assert re.search(rf"{name}: 7 images in .* {evaluations} network evaluations; comp", out)
    assert re.search(r"ddim-5 is [\d.]+ times as fast as the slowest", out)
    assert [path.name for path in tmp_path.iterdir()] == ["compare-ddpm-20-ddim-5-n=7.png"]


def test_results_of_other_settings_have_folders_of_their_own(runs) -> None:
    common = (f"--run={runs}/course", "--sampler=ddim:1", "--frames=none", "--n=7", "--devices=2")
    for own in ([], ["--seed=4"], ["--guidance=2", "--context=a;none"]):
        call("sample", *common, *own)
    names = sorted(path.name for path in (runs / "course" / "samples").iterdir())
    assert (names[0], names[2]) == ("ddim-1-n=7", "ddim-1-n=7-seed=4")
    assert re.fullmatch("ddim-1-n=7-context=a_none-guidance=2-[0-9a-f]{8}", names[1])


def test_many_images_are_drawn_in_batches_and_few_are_shown(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(draw, "PIXELS", 8 * 8 * 64)
    flags = ("--sampler=ddim:1", "--n=300", f"--out={tmp_path}", "--frames=none")
    out = output_of("sample", f"--run={runs}/course", *flags)
    assert "the pictures show 255 of the 300 images" in out
    model = load_model(runs / "course")
    context = np.eye(3, dtype=np.float32)[np.arange(300) // 100]
    table = samplers.build("ddim", model.schedule, 1)
    images = sample(model, table, 300, context=context, batch_size=300).images
    np.testing.assert_allclose(np.load(tmp_path / "samples.npy"), images, atol=1e-4)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size[1] < 3 * 6 * 110  # 85 images of a class are 6 rows


@pytest.mark.parametrize(
    ("app", "flags", "name"),
    [
        ("sample", ("--sampler=ddim:1", "--n=7", "--devices=2", "--frames=none"), "samples.npy"),
        ("edit", ("--edit=interpolate:seeds=1,2:between=2", "--devices=1"), "edited.npy"),
    ],
)
def test_images_that_are_not_numbers_leave_the_earlier_file(runs, tmp_path, app, flags, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"not finite|NaN or infinite"):
        call(app, *flags, f"--run={runs}/nan", f"--out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


# ----------------------------------------------------------------------------------- editing


@pytest.mark.parametrize(
    "flags",
    [
        ("--edit=sdedit", "--pick=0,3", "--sampler=ddim:5:eta=1"),
        ("--edit=inpaint:mask=top", "--pick=0,1"),
        ("--edit=reconstruct", "--pick=5,6"),
        ("--edit=interpolate:between=2", "--pick=2,3", "--guidance=2"),
        ("--edit=interpolate:seeds=1,2:between=2", "--context=class1"),
        ("--edit=contexts:between=2", "--context=class0;class1"),
    ],
)
def test_edits_write_a_picture_and_their_images(runs, tmp_path, flags) -> None:
    flags = (f"--out={tmp_path}", "--devices=1", "--sampler=ddim:5", *flags)
    out = output_of("edit", f"--run={runs}/few", *flags)
    assert f"written: {tmp_path}/edited.png, {tmp_path}/edited.npy" in out
    edited = np.load(tmp_path / "edited.npy")
    assert edited.shape == (2, 8, 8, 3)
    assert np.all(np.isfinite(edited))
    with Image.open(tmp_path / "edited.png") as picture:
        assert min(picture.size) > 80
    if "inpaint" in str(flags):
        pixels = np.load(runs / "images.npy")[:2].astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(edited[:, :4], pixels[:, :4])


@pytest.mark.parametrize("kind", ["course", "karras"])
@pytest.mark.parametrize("edit", ["interpolate:seeds=3,7", "contexts:seed=3"])
def test_edits_of_noise_start_where_sampling_does(runs, tmp_path, kind, edit) -> None:
    """Use the schedule karras, where the first level of noise has standard deviation 80, not 1.

    The options of the sampler's grid must reach the edit.
    """
    sampler = "ddim:5:grid=karras:rho=3" if kind == "course" else "ddim:5"
    flags = (f"--run={runs}/{kind}", f"--sampler={sampler}", f"--out={tmp_path}", "--devices=1")
    context = "--context=a" if "interpolate" in edit else "--context=a;a=0.5"
    call("edit", *flags, f"--edit={edit}:between=2", context)
    call("sample", *flags, "--seed=3", "--context=a", "--n=2", "--frames=none")
    drawn = np.load(tmp_path / "samples.npy")[0]
    edited = np.load(tmp_path / "edited.npy")[0] if "interpolate" in edit else None
    if edited is None:  # its last row has the seed 3 + 3
        call("sample", *flags, "--seed=6", "--context=a", "--n=2", "--frames=none")
        drawn, edited = np.load(tmp_path / "samples.npy")[0], np.load(tmp_path / "edited.npy")[0]
    np.testing.assert_allclose(edited, drawn, atol=1e-4 * np.abs(drawn).max())


@pytest.mark.parametrize("edit", ["reconstruct", "interpolate:between=2"])
def test_the_default_grid_of_an_edit_serves_schedules_that_end_in_noise(runs, tmp_path, edit):
    images = (f"--data=npy:images={runs}/images.npy", "--pick=0,1", "--devices=1")
    call("edit", f"--run={runs}/flow", f"--edit={edit}:iterations=1", *images, f"--out={tmp_path}")
    assert np.isfinite(np.load(tmp_path / "edited.npy")).all()


# -------------------------------------------------------------------------------- converting


def test_weights_go_out_and_come_back_bit_for_bit(tmp_path) -> None:
    unet, file, back = tmp_path / "unet", tmp_path / "weights.safetensors", tmp_path / "back"
    save_model(unet, SMALL, untrained(SMALL).variables)
    call("convert", f"--from={unet}", f"--to={file}")
    call("convert", f"--from={file}", f"--to={back}", f"--schedule=course:steps={T}")
    assert load_config(back).network == load_config(unet).network
    models = load_model(back), load_model(unet)
    assert len(jax.tree.leaves(models[0].variables)) > 100
    jax.tree.map(np.testing.assert_array_equal, *(model.variables for model in models))


def test_a_picture_goes_where_the_flag_says_or_nowhere(tmp_path) -> None:
    for out in (tmp_path, tmp_path / "a.pdf"):
        with pytest.raises(InputError, match=r"it must be a file that ends in \.png"):
            call("analyse", f"--out={out}")
    assert not list(tmp_path.iterdir())
    assert not tmp_path.with_name(f"{tmp_path.name}.png").exists()


def test_analyse_prints_the_orders_and_draws(tmp_path: Path) -> None:
    steps = ("--steps=20,40,80,160", f"--out={tmp_path}/new/a.png")
    out = output_of("analyse", "--samplers=ddim,heun", "--grid=karras:rho=5:to_zero=false", *steps)
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert 0.8 < float(rows["ddim"][1]) < 1.2
    assert 1.6 < float(rows["heun"][1]) < 2.4
    assert (rows["ddim"][-1], rows["heun"][-1]) == ("(160)", "(320)")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    call("analyse", "--schedule=flow", "--steps=5,10", f"--out={tmp_path}/flow.png")
    steps = ("--steps=5", "--samplers=ddim", f"--out={tmp_path}/data.png")
    out = output_of("analyse", "--data=sprites:n=40", *steps)
    assert out.startswith("40 images: deviation ")
    out = output_of("analyse", "--identify", "--samplers=ddim,heun,euler", "--steps=5,10")
    assert "at 5, 10: ddim = euler\n" in out


# --------------------------------------------------------------------------------- bad input

SPEC = "npy:images={}/"  # data
UNET = f"--network={SMALL.network}"
COMMANDS = {
    "train": (f"--data={SPEC}images.npy:labels={{}}/labels.npy", *TRAINING, UNET, "--run={}/new"),
    "sample": ("--run={}/run", "--out={}/new"),
    "edit": ("--run={}/run", "--out={}/new", "--sampler=ddim:4"),
    "convert": ("--from={}/run", "--to={}/new.safetensors"),
    "evaluate": ("--run={}/many", "--out={}/new", "--real_n=100"),
    "likelihood": ("--run={}/many", "--out={}/new", "--n=3"),
    "analyse": ("--out={}/new.png",),
}
# Flags that are added to these commands, and the answer. {} is the folder of the data.
REFUSED = {
    "train": {
        ("--network=context_unet:n_feat=12",): r"n_feat=12: give a multiple of 8 from 8 up",
        ("--batch_size=0",): r"batch_size=0: it must be in 1\.\.65536",
        ("--batch_size=100", "--devices=9"): r"devices=9: this machine has 8",
        ("--batch_size=7", "--devices=2"): r"batch_size=7 is not divisible by devices=2: take 8 im",
        ("--devices=0",): r"devices=0: this machine has 8",
        (f"--data={SPEC}none.npy",): r"none\.npy: there is no such file",
        (f"--data={SPEC}height10.npy",): r"height=10: give a multiple of 4 .*size=N",
        (f"--data={SPEC}floats.npy",): r"floats\.npy.*type float64: they must be uint8",
        (f"--data={SPEC}text.npy",): r"text\.npy is not a \.npy file",
        ("--data=npy:labels=a.npy",): r"data=npy: give images=FILE\.npy",
        ("--data=folder:path={}/empty",): r"empty: no images in it: it must hold images, or one",
        ("--data=unknown",): r"data=unknown: these images are not recorded: name others with",
        (f"--data={SPEC}images.npy:labels={{}}/short.npy",): r"20 images but labels of shape \(19,",
        (f"--data={SPEC}images.npy:labels={{}}/nan.npy",): r"nan\.npy: labels must be finite num",
        (
            f"--data={SPEC}images.npy:labels={{}}/labels.npy:class_names=a,b",
        ): r"class number 2, but there are 2 class names",
        (f"--data={SPEC}images.npy:held_out=1",): r"held_out=1\.0: it must be in \[0, 1\)",
        ("--data=sprites:frequencies=1,2",): r"frequencies=\(1\.0, 2\.0\): give 5 numbers",
        ("--epochs=0",): r"epochs=0: it must be above 0, and at most 1000000",
        ("--epochs=two",): r"--epochs=two: could not convert string to float",
        ("--epochs=1000000001",): r"epochs=1000000001: it must be above 0, and at most 1000000",
        ("--optimizer=adam:-1",): r"learning_rate=-1\.0: it must be above 0, and at least 1e-12",
        ("--augment=flips:classes=hero",): r"classes='hero' is unknown: choose from class0, class1",
        ("--minutes=0",): "minutes=0: it must be above 0, and at most 1000000",
        ("--minutes=-1",): "minutes=-1: it must be above 0",
        ("--minutes=nan",): "minutes=nan: it must be above 0",
        ("--minutes=inf",): "minutes=inf: it must be above 0, and at most",
        ("--minutes=2", "--epochs=3"): "minutes=2: give it or --epochs, not both",
        ("--seed=-1",): r"seed=-1: it must be in 0\.\.",
        (
            "--preset=huge",
        ): r"--preset=huge: value should be one of <course\|demo\|best\|digits\|unet>",
        ("--save_every=0",): r"save_every=0: 0 is not a positive integer",
        ("--keep=0",): r"keep=0: 0 is not a positive integer",
        ("--n_feats=8",): r"Unknown command line flag 'n_feats'",
        (
            *("--run={}/run", "--epochs=4"),
            f"--network={TINY.network}",
        ): r"started with a different configuration: epochs: 3 -> 4\.",
        ("--run={}/run", "--seed=1", "--schedule=cosine"): r"schedule: course.*; seed: 0 -> 1",
        ("--run={}",): r"run='.*' exists and is not a run: name a different folder",
        ("--run=/proc/new/run",): r"run='/proc/new/run' cannot be written: /proc: ",
        (f"--run={'x' * 300}",): r"run='x+' cannot be written: .*: File name too long",
        ("--run={}/text.npy",): r"run='.*text\.npy' exists and is not a run",
        ("--run={}/broken",): r"broken/config\.json is not JSON",
    },
    "sample": {
        ("--sampler=newton",): r"sampler='newton' is unknown: .*choose from ddpm, ddim",
        ("--sampler=ddim:0",): r"steps=0: it must be in 1\.\.40",
        ("--sampler=ddim:41",): r"steps=41: it must be in 1\.\.40",
        ("--sampler=ddim:eta=2",): r"eta=2\.0: it must be in \[0, 1\]",
        ("--context=knight",): r"context 'knight' is not understood: write 3 numbers, or names of",
        ("--context=class0; class0",): r"context='class0; class0': each context must occur once",
        ("--run={}/uncond", "--context=class0"): r"context: this run was trained without",
        ("--guidance=nan",): r"guidance: scale=nan: it must be finite",
        ("--guidance=cfg:low=2:high=1",): r"low=2\.0, high=1\.0: they must obey 0 <= low < high",
        ("--guidance=cfg_pp:2",): r"scale=2\.0: for CFG\+\+ it must be in \[0, 1\]",
        ("--guidance=cfg_pp", "--sampler=ddpm:5"): r"CFG\+\+ .*: its steps do not end in",
        ("--guidance=auto",): r"guidance=auto: give the weaker model, run=FOLDER",
        ("--guidance=auto:run={}/none",): r"run='.*none': there is no such folder",
        ("--run={}/uncond", "--guidance=2"): r"guidance=2: this run was trained only with",
        ("--threshold=soft",): r"threshold='soft' is unknown: choose from none, clip, dynamic",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--run={}/empty",): r"run='.*empty' is not a run: there is no config\.json in it",
        ("--run={}/unfinished",): r"run='.*unfinished' has no checkpoint yet",
        ("--step=4",): r"step=4: the checkpoints of .*run are \[3, 5, 8\]",
        ("--batch_size=0",): r"batch_size=0: 0 is not a positive integer",
        ("--devices=9",): r"devices=9: this machine has 8",
        ("--n=2",): r"n=2: it must be at least 3, one for each context",
        ("--n=1000001",): r"n=1000001: it must be at least 3, .* and at most 1000000",
        ("--seed=-1",): r"seed=-1: -1 is not an integer in the range \[0, 4294967295\]",
        ("--frames=some",): r"--frames=some: value should be one of <course\|all\|none>",
        ("--compare=ddpm:x",): r"sampler=ddpm:x: steps=x: it must be",
        ("--compare=ddpm:5,newton:5",): r"newton",
        ("--compare=ddpm:5", "--sampler=ddim"): r"--sampler: --compare does not read it",
        ("--compare=ddpm:5", "--frames=all"): r"--frames: --compare does not read it",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
        ("--stepps=5",): r"Unknown command line flag 'stepps'",
    },
    "edit": {
        ("--edit=dream",): r"edit='dream' is unknown: .*choose from sdedit, inpaint",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--out={}/text.npy",): r"out='.*text\.npy' is a file: name a folder",
        ("--edit=sdedit:strength=0",): r"strength=0\.0: it must be above 0 and at most 1",
        ("--edit=sdedit:strength=0.1",): r"strength=0\.1: on this grid the last step starts at 0\.",
        ("--sampler=ddim:41",): r"steps=41: it must be in 1\.\.40",
        ("--sampler=ddim:4:eta=2",): r"eta=2\.0: it must be in \[0, 1\]",
        ("--edit=reconstruct", "--sampler=heun"): r"sampler=heun: reconstruct walks by DDIM: give",
        ("--edit=inpaint", "--sampler=ddim:4:eta=1"): r"sampler=ddim:4:eta=1: inpaint walks by",
        ("--pick=20",): r"pick=20: the images are numbered 0 to 19",
        ("--pick=x",): r"pick=x: they must be whole numbers",
        ("--pick=1,2,3", "--edit=interpolate"): r"3 images: interpolate takes two",
        ("--edit=interpolate:seeds=1",): r"seeds=\(1,\): it must be two numbers",
        ("--edit=interpolate:seeds=1,-1",): r"seeds=-1: it must be in 0\.\.4294967295",
        ("--edit=interpolate:seeds=1,2", "--pick=0,1"): r"--pick: --edit=.* does not read it",
        ("--edit=interpolate", "--seed=1"): r"--seed: --edit=interpolate does not read it",
        ("--edit=interpolate:between=1",): r"between=1: it must be in 2\.\.1000",
        ("--edit=interpolate:between=1001",): r"between=1001: it must be in 2\.\.1000",
        ("--edit=contexts",): r"contexts needs two of them",
        ("--edit=contexts", "--context=class0"): r"context='class0': it must be two",
        ("--edit=contexts:seed=4294967295", "--context=class0;class1"): r"seed=4294967296: it must",
        ("--context=class0;class1",): r"context='class0;class1': it must be one, or one for each",
        ("--run={}/uncond", "--context=class0"): r"context: this run was trained without",
        (f"--data={SPEC}none.npy",): r"none\.npy: there is no such file",
        (f"--data={SPEC}tall.npy",): r"images of shape \(12, 12, 3\): this run's are \(8, 8, 3\)",
        ("--edit=inpaint:mask=middle",): r"mask='middle' is unknown: choose from left, right",
        ("--edit=inpaint:mask={}/none.npy",): r"none\.npy: there is no such file",
        ("--edit=inpaint:mask={}/labels.npy",): r"shape \(20,\): it must be \(8, 8\), of 0 and",
        ("--edit=inpaint:repeats=0",): r"repeats=0: it must be at least 1",
        ("--edit=inpaint:repeats=1000000000",): r"repeats=1000000000: it must be at most 25000",
        ("--edit=reconstruct:iterations=0",): r"iterations=0: it must be in 1\.\.25000",
        ("--edit=reconstruct:iterations=25001",): r"iterations=25001: it must be in 1\.\.25000",
        ("--seed=-1",): r"seed=-1: -1 is not an integer in the range \[0, 4294967295\]",
    },
    "convert": {
        ("--to={}/imported",): r"imported: a new run takes --sigma_rel, or name a file",
        ("--to={}/text.safetensors",): r"to='.*text\.safetensors' exists: name a new file",
        ("--from={}/none",): r"run='.*none': there is no such folder",
        ("--from={}/none.safetensors", "--to={}/imported"): r"none\.safetensors.*[Nn]o such file",
        (
            "--from={}/text.safetensors",
            "--to={}/imported",
        ): r"text\.safetensors is not a file of only tens",
        ("--from={}/good.safetensors", "--to={}/run"): r"run='.*run' is not empty: name a new fol",
        ("--from={}/good.safetensors", "--to={}/text.npy"): r"run='.*text\.npy' is not a folder",
        (
            *("--from={}/good.safetensors", "--to={}/imported"),
            f"--data={SPEC}tall.npy",
        ): r"images, features \(\(12, 12, 3\), 1\): not the network's \(\(8, 8, 3\), 3\)",
        ("--step=4",): r"step=4: the checkpoints of .*run are \[3, 5, 8\]",
        ("--epochs=3",): r"--epochs: a conversion to PyTorch does not read it",
        ("--from={}/good.safetensors", "--to={}/a", "--step=3"): r"--step: a conversion from PyTor",
        ("--from={}/good.safetensors", "--to={}/a", "--network=unet"): r"network: the weights dec",
        ("--to={}/x", "--sigma_rel=0.3"): r"sigma_rel=0\.3: it must be above 0 and",
        ("--from={}/many", "--to={}/x", "--sigma_rel=0.1"): r"has no snapshots of averages: train",
        ("--to={}/x", "--sigma_rel=0.1", "--step=3"): r"step=3: the snapshots of .* are \[2, 4, 6,",
        ("--from=none", "--to={}/many", "--sigma_rel=0.1"): r"run='.*many' is not empty",
        ("--to={}/a.sampler", "--sampler=newton"): r"sampler='newton' is unknown",
        ("--to={}/a.sampler", "--sigma_rel=0.1"): r"--sigma_rel: the conversion to a \.sampler",
        ("--form=x",): r"Unknown command line flag 'form'",
    },
    "evaluate": {
        ("--n=99",): r"--n=99: 99 is not an integer in the range \[100, 100000\]",
        ("--n=1000000000",): r"n=1000000000: .* in the range \[100, 100000\]",
        ("--real_n=99",): r"real_n=99: 99 is not an integer in the range",
        ("--batch_size=0",): r"batch_size=0: 0 is not an integer in the range",
        ("--seed=-1",): r"seed=-1: -1 is not an integer in the range \[0, 4294967295\]",
        ("--samples={}/many.npy", "--guidance=3"): r"--guidance: --samples does not read it",
        ("--samples={}/many.npy", "--step=5"): r"--step: --samples does not read it",
        ("--sampler=ddim:41",): r"steps=41: it must be in 1\.\.40",
        ("--guidance=nan",): r"scale=nan: it must be finite",
        ("--run={}/uncond", "--guidance=2", f"--data={SPEC}many.npy"): r"guidance=2: this run|feat",
        ("--run={}/run",): r"20 images",
        ("--run={}/other",): r"\(12, 12, 3\)",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--run={}/unfinished", f"--data={SPEC}many.npy:labels={{}}/many_labels.npy"): r"no checkp",
        ("--step=4",): r"step=4: the checkpoints of .*many are \[0\]",
        ("--samples={}/none.npy",): r"none\.npy: there is no such file",
        ("--samples={}/tall.npy",): r"shape \(220, 12, 12, 3\): they must be \(n, 8, 8, 3\)",
        ("--samples={}/whole.npy",): r"whole\.npy: images of type int64: float32 in \[-1, 1\], or",
        ("--samples={}/images.npy",): r"images\.npy.*20",
        ("--name=a/b",): r"name='a/b': it must be a file's name, without a folder",
        ("--devices=9",): r"devices=9: this machine has 8",
    },
    "likelihood": {
        ("--n=1",): r"--n=1: 1 is not an integer in the range \[2, ",
        ("--probes=0",): r"probes=0: 0 is not an integer in the range \[1, ",
        ("--batch_size=0",): r"batch_size=0: 0 is not an integer in the range \[1, ",
        ("--seed=-1",): r"seed=-1: -1 is not an integer in the range \[0, 4294967295\]",
        ("--by=flow,elbo",): r"by=flow,elbo: choose from bound, flow",
        ("--by=",): r"by=: choose from bound, flow",
        ("--run={}/run",): r"20 images",
        ("--run={}/other",): r"\(12, 12, 3\)",
        ("--run={}/none",): r"run='.*none': there is no such folder",
        ("--step=4",): r"step=4: the checkpoints of .*many are \[0\]",
        ("--devices=9",): r"devices=9: this machine has 8",
    },
    "analyse": {
        ("--samplers=lms:order=9",): r"order=9: it must be in 1\.\.4",
        ("--grid=trailing:to_zero=true",): r"trailing has no option to_zero",
        ("--data=unknown",): r"data=unknown: these images are not recorded",
        ("--data=sprites:n=9", "--mean=1"): r"--mean: --data does not read it",
        ("--identify", "--deviation=1"): r"--deviation: --identify does not read it",
    },
}
CASES = [(name, given) for name, cases in REFUSED.items() for given in cases]
GOOD = {
    "train": ("--augment=flips:classes=class0", f"--network={TINY.network}"),
    "sample": ("--sampler=ddim:2", "--n=3"),
    "evaluate": ("--sampler=ddim:2", "--n=100"),
}


class CompilesError(Exception):
    """An app has reached a step that it compiles."""


@pytest.fixture
def nothing_compiles(monkeypatch) -> None:
    def refuse(*_) -> None:
        raise CompilesError

    monkeypatch.setattr(draw, "_compiled", refuse)
    monkeypatch.setattr("diffusion_jax.training.loop.train_chunk", refuse)
    monkeypatch.setattr("diffusion_jax.evaluation.classifier.obtain", refuse)
    monkeypatch.setattr("diffusion_jax.evaluation.likelihood.bits_per_dim", refuse)


def command(folder: Path, name: str, given: tuple[str, ...]) -> list[str]:
    return [flag.replace("{}", str(folder)) for flag in (*COMMANDS[name], *given)]


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(("name", "given"), CASES)
def test_bad_input_is_named_and_changes_nothing(runs, name: str, given) -> None:
    before = files(runs)
    with pytest.raises((InputError, flags.Error)) as refused:
        output_of(name, *command(runs, name, given))
    assert re.search(REFUSED[name][given], str(refused.value)), refused.value
    assert files(runs) == before


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("name", GOOD)
def test_good_input_does_compile(runs, tmp_path, name: str) -> None:
    """Repeat the test above with valid input, as its control."""
    where = f"--run={tmp_path}" if name == "train" else f"--out={tmp_path}"
    with pytest.raises(CompilesError):
        output_of(name, *command(runs, name, GOOD[name]), where)


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("train", ["--keep=0"], "flag --keep=0: 0 is not a positive integer"),
        ("sample", ["--run=none", "--cpu_devices=2"], "run='none': there is no such folder"),
        ("sample", ["--cpu_devices=0"], "cpu_devices=0: it must be at least 1"),
        ("sample", ["surplus", "word"], "'surplus word' is not a flag: flags are --name=value"),
        ("sample", ["--sampler=ddimm"], "sampler='ddimm' is unknown: did you mean ddim?"),
        ("convert", ["--to=a.pth"], "flag --from=None: Flag --from must have a value other than"),
    ],
)
def test_bad_input_is_one_line_and_the_exit_code_2(name: str, given: list, line: str) -> None:
    done = run_app(f"experiments.{name}", *given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1 == done.stderr.count("error")


def test_compilations_are_kept_where_the_variable_of_jax_says(tmp_path, monkeypatch) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(kept))
    flags = (f"--out={tmp_path}/out", "--sampler=ddim:1", "--n=5")
    before: set[str] = set()
    for _ in range(2):
        ((code, out),) = finish(start("sample", *flags, "--frames=none", devices=1))
        assert code == 0, out
        programs = {path.name for path in kept.glob("*-cache")}
        assert programs == (before or programs) != set()
        before = programs


# -------------------------------------------------------------------------------- measuring


def test_an_evaluation_holds_every_measure_and_a_report(runs, monkeypatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 20)
    monkeypatch.setattr(classifier, "CHANNELS", (8, 16))  # this compiles faster
    call("evaluate", *command(runs, "evaluate", ("--sampler=ddim:2", "--guidance=2", "--n=100")))
    name = "ddim-2-guidance=2-n=100-real_n=100"
    record = json.loads((runs / "new" / f"{name}.json").read_text())
    measures = record["measures"]
    assert {"KID, classifier", "Frechet, pixels", "precision", "class accuracy"} <= set(measures)
    numbers = [n for row in measures.values() for side in row.values() for n in side.values()]
    assert len(numbers) == 4 * len(measures)
    assert np.isfinite(numbers).all()
    assert (record["settings"]["guidance"], record["settings"]["n"]) == ("2", 100)
    assert "class accuracy" in (runs / "new" / f"{name}.html").read_text()
    out = output_of("evaluate", *command(runs, "evaluate", ("--samples={}/many.npy",)))
    assert "classifier trained" not in out
    measures = json.loads((runs / "new" / "many.json").read_text())["measures"]
    assert "class accuracy" not in measures
    distance = {side: e["value"] for side, e in measures["distance to training"].items()}
    # Of the 220 images, 100 are the other real set, and 120 count as training images.
    assert distance["samples"] == pytest.approx(distance["real"] * 100 / 220, rel=1e-5)
    assert distance["real"] > 50


# ---------------------------------------------------------------------------------- reports


def test_a_report_of_many_classes_shows_some(runs, model) -> None:
    names = tuple(f"c{i}" for i in range(300))
    many = model._replace(class_names=names, network=model.network.clone(n_cfeat=300))
    shown, vectors = overview.class_contexts(many)
    assert (len(shown), vectors.shape) == (16, (16, 300))
    said_of = overview.summary([], many)["classes"]
    assert said_of == "300, of which the first 16 are shown"
    assert "classes" not in overview.summary([], model)


@pytest.mark.parametrize(("file", "shown"), [("/lib/orbax/reader.py", 0), ("/mine/reader.py", 1)])
def test_what_orbax_leaves_after_a_failure_is_not_shown(file: str, shown: int) -> None:
    """Close a coroutine of a file, as orbax's are after a failed restore."""
    scope: dict = {}
    exec(compile("async def read(): pass", file, "exec"), scope)
    (left := scope["read"]()).close()
    seen: list = []
    hook = app._without_orbax(seen.append)
    hook(SimpleNamespace(object=left, exc_value=Exception("Encountered error")))
    assert len(seen) == shown
