import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from diffusion_jax.runs import load_config, models
from experiments import __main__

ROOT = Path(__file__).parents[1]
SOURCES = ("diffusion_jax", "experiments", "checkpoints/sprites")
MODEL = ("config.json", "learned-5.json", "metrics.jsonl", "README.md", "state")


def test_the_command_runs_every_app() -> None:
    files = Path(__main__.__file__).parent.glob("*.py")
    apps = {file.stem for file in files if 'if __name__ == "__main__"' in file.read_text()} - {
        "__main__"
    }
    assert set(__main__.APPS) == apps


def test_an_unknown_app_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["diffusion-jax", "nothing"])
    with pytest.raises(SystemExit, match="choose from analyse"):
        __main__.main()


def test_the_shipped_model_is_found_from_any_folder_unless_a_run_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(Path("checkpoints/sprites"))
    assert shipped.epochs == 28
    own = tmp_path / "checkpoints/sprites"
    own.mkdir(parents=True)
    (own / "samples").mkdir()  # results of the shipped model
    assert models.find_run("checkpoints/sprites") == ROOT / "checkpoints/sprites"
    models.checkpoints.write_config(own, shipped.override(epochs=3).to_dict())
    assert load_config(Path("checkpoints/sprites")).epochs == 3
    assert models.find_run("other") == Path("other")


def run(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command that must succeed, without this test's import path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def relative_files(folder: Path) -> set[str]:
    """Return the paths of all files in a folder except compiled ones."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.suffix != ".pyc"}


@pytest.mark.slow
def test_an_installed_wheel_samples_from_the_shipped_model_in_an_empty_folder(
    tmp_path: Path,
) -> None:
    source, venv, empty = tmp_path / "source", tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    for name in SOURCES:  # a copy, so that the build leaves nothing in the working tree
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "checkpoints/sprites/samples").mkdir(exist_ok=True)
    (source / "checkpoints/sprites/samples/mine.png").touch()
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "wheel", *offline, "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sent = {f"{name}/{file}" for name in SOURCES for file in relative_files(ROOT / name)}
    results = {n for n in sent if n.startswith(SOURCES[2]) and n.split("/")[2] not in MODEL}
    assert packed == sent - results

    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin/python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(
        run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=empty).strip()
    )
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    installed = relative_files(site)
    words = run(venv / "bin/diffusion-jax", "sample", "--n=5", "--sampler=ddim:2", cwd=empty)
    out = "checkpoints/sprites/samples/ddim-2-n=5"
    assert f"written: {out}/samples.npy" in words
    names = ("samples.npy", "samples.png", "denoising.gif", "denoising.html")
    assert relative_files(empty) == {f"{out}/{name}" for name in names}
    assert relative_files(site) == installed
    program = "import diffusion_jax; diffusion_jax.load_model(); print(diffusion_jax.__file__)"
    assert Path(run(python, "-c", program, cwd=empty).strip()).is_relative_to(site)
