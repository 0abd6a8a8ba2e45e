"""What the apps make of their flags, in this process: nothing is ignored, nothing is unbounded."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import samplers, sampling
from diffusion_jax.runs import load_model, save_model
from diffusion_jax.typing import InputError
from tests.apps import call

FORWARD = {
    "notes": {},
    "karras": {"schedule": "karras", "parameterization": "edm"},
    "flow": {"schedule": "flow", "parameterization": "v"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model) -> Path:
    """A folder of runs that were never trained, one for each forward process."""
    folder = tmp_path_factory.mktemp("runs")
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.save(folder / "images.npy", images)
    config = model.config.override(class_names=("a", "b", "c"))
    for name, fields in FORWARD.items():
        save_model(folder / name, config.override(**fields), model.variables)
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan, model.variables)
    save_model(folder / "nan", config, lost)
    return folder


@pytest.mark.parametrize("run", ["notes", "karras"])
@pytest.mark.parametrize("edit", ["interpolate", "contexts"])
def test_edits_of_noise_start_where_sampling_does(runs, tmp_path, run, edit) -> None:
    """On karras, noise has the first level's standard deviation of 80, not 1."""
    flags = (f"--run={runs}/{run}", "--steps=5", "--grid=trailing", f"--out={tmp_path}")
    own = {
        "interpolate": ("--seeds=3,7", "--context=a", "--between=2"),
        "contexts": ("--context=a;b", "--between=2"),  # its last row is of seed 0 + 3
    }
    call("edit", *flags, f"--edit={edit}", *own[edit])
    call("sample", *flags, "--sampler=ddim", "--seed=3", "--context=a", "--n=1", "--frames=none")
    edited, drawn = np.load(tmp_path / "edited.npy")[0], np.load(tmp_path / "samples.npy")[0]
    np.testing.assert_allclose(edited, drawn, atol=1e-4 * np.abs(drawn).max())


def test_options_of_the_grid_reach_the_grid_of_an_edit(runs, tmp_path) -> None:
    flags = (f"--run={runs}/notes", "--steps=5", "--grid=karras", "--options=rho=3")
    call(
        *("edit", *flags, "--edit=interpolate", "--seeds=3,7", "--context=none", "--between=2"),
        f"--out={tmp_path}",
    )
    model = load_model(runs / "notes")
    drawn = {
        rho: sampling.sample(
            model, samplers.build("ddim", model.schedule, 5, "karras", rho=rho), 1, seed=3
        ).images[0]
        for rho in (3.0, 7.0)
    }
    np.testing.assert_allclose(np.load(tmp_path / "edited.npy")[0], drawn[3.0], atol=1e-4)
    assert np.abs(drawn[3.0] - drawn[7.0]).max() > 1e-3


@pytest.mark.parametrize("edit", ["reconstruct", "interpolate"])
def test_the_default_grid_of_an_edit_serves_schedules_that_end_in_noise(
    runs, tmp_path, edit
) -> None:
    images = f"--images={runs}/images.npy"
    call("edit", f"--run={runs}/flow", f"--edit={edit}", images, f"--out={tmp_path}")
    assert np.isfinite(np.load(tmp_path / "edited.npy")).all()


UNREAD = {
    "train": {
        ("--schedule=cosine", "--beta_max=0.5"): "beta_max: --schedule=cosine does not read it",
        ("--ema_sigma_rel=0.2",): "ema_sigma_rel: --ema_profile=exponential does not",
        ("--ema_profile=power", "--ema_decay=0.9"): "ema_decay: --ema_profile=power does not",
        ("--null_context", "--keep_probability=0.5"): "keep_probability: --null_context does not",
    },
    "sample": {
        ("--guidance=2", "--autoguidance_step=3"): "autoguidance_step: guidance without --autog",
        ("--seed=-1",): "seed=-1: it must be in 0..4294967295",
        ("--autoguidance_step=3",): "autoguidance_step needs --guidance",
        ("--compare=ddpm:5", "--sampler=ddim"): "sampler: --compare does not read it",
        ("--compare=ddpm:5", "--steps=4"): "steps: --compare does not",
        ("--compare=ddpm:5", "--frames=all"): "frames: --compare does not",
    },
    "edit": {
        ("--edit=reconstruct", "--sampler=heun"): "sampler: --edit=reconstruct does not read it",
        ("--edit=inpaint", "--options=eta=1"): "grid trailing takes no eta: it takes none",
        ("--edit=interpolate", "--mask=top"): "mask: --edit=interpolate does not",
        ("--mask=bogus",): "mask: --edit=sdedit does not",
        ("--seeds=1,2",): "seeds: --edit=sdedit does not",
        ("--edit=reconstruct", "--seed=1"): "seed: --edit=reconstruct does not",
        ("--edit=interpolate", "--seeds=1,2", "--pick=0,1"): "pick: --seeds does not",
        ("--options=bogus=1",): "grid trailing takes no bogus",
        ("--context=a;b",): "context='a;b': it must be one, or one for each image",
    },
    "weights": {
        ("--from=a", "--to=a.pth", "--epochs=3"): "epochs: a run that becomes a file does not",
        ("--from=a.pth", "--to=a", "--step=3"): "step: a file that becomes a run does not",
    },
    "analyse": {("--grid=trailing", "--to_zero"): "to_zero: --grid=trailing does not"},
}
UNBOUNDED = {
    "edit": {
        ("--edit=interpolate", "--between=1001"): "between=1001: it must be at most 1000",
        ("--edit=reconstruct", "--iterations=2501"): "iterations=2501: it must be at most 2500",
        ("--edit=inpaint", "--repeats=1000000000"): "repeats=1000000000: it must be at most 2500",
        ("--edit=contexts", "--context=a;b", "--seed=4294967295"): "seed=4294967296: it must be",
    },
}


@pytest.mark.parametrize(
    ("app", "flags", "message"),
    [
        (app, flags, message)
        for table in (UNREAD, UNBOUNDED)
        for app, cases in table.items()
        for flags, message in cases.items()
    ],
)
def test_what_an_app_would_ignore_or_not_survive_is_refused(
    runs, tmp_path, app: str, flags, message: str
) -> None:
    common = [f"--out={tmp_path}/new"] if app in ("edit", "sample") else []
    common += (
        [f"--images={runs}/images.npy"] if app == "edit" and "--seed" not in str(flags) else []
    )
    common += [f"--run={runs}/notes"] if app in ("edit", "sample") else []
    with pytest.raises(InputError) as refused:
        call(app, *common, *flags)
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "new").exists()


def test_results_of_other_settings_have_folders_of_their_own(runs) -> None:
    for flags in ([], ["--seed=4"], ["--guidance=2", "--context=a;none"]):
        flags = [f"--run={runs}/notes", "--sampler=ddim", "--steps=1", "--frames=none", *flags]
        call("sample", *flags, "--n=3")
    names = sorted(path.name for path in (runs / "notes" / "samples").iterdir())
    assert (names[0], names[2]) == ("ddim-1-n=3", "ddim-1-n=3-seed=4")
    assert re.fullmatch("ddim-1-n=3-context=a_none-guidance=2.0-[0-9a-f]{8}", names[1])


def test_many_images_are_drawn_in_batches_and_few_are_shown(
    runs, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sampling, "PIXELS", 8 * 8 * 64)
    flags = ("--sampler=ddim", "--steps=1", "--n=300", f"--out={tmp_path}")
    call("sample", f"--run={runs}/notes", *flags)
    assert "the pictures show 255 of the 300 images" in capsys.readouterr().out
    model = load_model(runs / "notes")
    context = np.eye(3, dtype=np.float32)[np.arange(300) // 100]
    table = samplers.build("ddim", model.schedule, 1)
    drawn = sampling.sample(model, table, 300, context=context, batch_size=300).images
    np.testing.assert_allclose(np.load(tmp_path / "samples.npy"), drawn, atol=1e-4)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size[1] < 3 * 6 * 110  # 85 images of a class are 6 rows


def test_samples_that_are_not_numbers_leave_the_earlier_file(runs, tmp_path) -> None:
    (tmp_path / "samples.npy").write_text("mine")
    with pytest.raises(InputError, match="its samples are not finite numbers"):
        call("sample", f"--run={runs}/nan", "--steps=1", f"--out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npy"]
    assert (tmp_path / "samples.npy").read_text() == "mine"


def test_a_report_shows_some_of_many_classes(model) -> None:
    from experiments import report

    names = tuple(f"class{number}" for number in range(300))
    many = model._replace(config=model.config.override(class_names=names, n_cfeat=300))
    shown, vectors = report.class_contexts(many)
    assert (len(shown), vectors.shape) == (16, (16, 300))
    said = report.summary(Path("nowhere"), many)["classes"]
    assert said == "300, of which the first 16 are shown"
    assert "classes" not in report.summary(Path("nowhere"), model)


def test_a_picture_goes_where_the_flag_says_or_nowhere(tmp_path) -> None:
    for out in (tmp_path, tmp_path / "a.pdf"):
        with pytest.raises(InputError, match=r"it must be a file that ends in \.png"):
            call("analyse", f"--out={out}")
    assert not list(tmp_path.iterdir())
    assert not tmp_path.with_name(f"{tmp_path.name}.png").exists()
    call("analyse", "--schedule=flow", "--steps=5,10", f"--out={tmp_path}/new/a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
