"""Write every sampler as a file, and run the files with the reader in docs/."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.samplers import SAMPLERS
from diffusion_jax.tableau import XI, interchange
from diffusion_jax.typing import InputError
from tests.apps import call
from tests.interpreter import interpret, mixture

ROOT = Path(__file__).parent.parent
SCHEDULE = schedules.linear(1000)
X = np.linspace(-2, 2, 7)


def load_reader() -> Any:
    spec = importlib.util.spec_from_file_location("reader", ROOT / "docs" / "read_sampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load_reader()


def write(path: Path, text: str = "unipc:6", schedule=SCHEDULE) -> samplers.Tableau:
    tableau = samplers.build(text, schedule)
    interchange.write(path, tableau, text, "linear:steps=1000")
    return tableau


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_reader_runs_every_sampler(tmp_path: Path, name: str) -> None:
    """Run a nonlinear problem in float64. The reader draws noise only for rows that use it."""
    tableau = write(tmp_path / "a.json", f"{name}:7")
    noise = np.random.default_rng(0).standard_normal((tableau.rows, 7))
    used = noise[tableau.mix[:, :, XI].any(1)]
    drawn = reader.run(reader.read(tmp_path / "a.json"), mixture, iter([X, *used]).__next__)
    ours = interpret(tableau, mixture, tableau.noise_scale * X, noise)
    assert np.allclose(drawn, ours, rtol=1e-12, atol=1e-12)
    again = samplers.build(f"file:path={tmp_path}/a.json", SCHEDULE)
    assert all(np.array_equal(a, b) for a, b in zip(again, tableau, strict=True))


def test_the_reader_is_short_and_runs_pytorch(tmp_path: Path) -> None:
    assert len((ROOT / "docs" / "read_sampler.py").read_text().splitlines()) <= 40
    torch = pytest.importorskip("torch")
    tableau = write(tmp_path / "a.json")

    def denoise(x, t, alpha, sigma):
        eps = torch.tanh(x + t / 1000)
        return (x - sigma * eps) / alpha, eps

    def ours(x, t, alpha, sigma):
        eps = np.tanh(x + t / 1000)
        return (x - sigma * eps) / alpha, eps

    drawn = reader.run(reader.read(tmp_path / "a.json"), denoise, lambda: torch.tensor(X))
    assert np.allclose(drawn.numpy(), interpret(tableau, ours, tableau.noise_scale * X), 1e-12)


def test_the_stated_error_is_that_of_running_the_file(tmp_path: Path) -> None:
    """Run the affine denoiser of the stated Gaussian from 0 and from each unit of noise."""
    write(tmp_path / "a.json", "dpmpp_multistep:6")
    found = reader.read(tmp_path / "a.json")
    mean, variance = (np.array(found["error"][name]) for name in ("mean", "variance"))

    def denoise(x, t, alpha, sigma):
        prior, seen = 1 / variance, alpha**2 / sigma**2
        x0 = (prior * mean + alpha * x / sigma**2) / (prior + seen)
        return x0, (x - alpha * x0) / sigma

    alpha, sigma = found["alpha"][0], found["sigma"][0]
    scale = np.hypot(alpha, sigma)
    start = np.stack([alpha * mean, alpha * mean + np.sqrt(alpha**2 * variance + sigma**2)])
    low, high = (reader.run(found, denoise, lambda x=x: x / scale) for x in start)
    w2 = np.sqrt(np.sum((low - mean) ** 2 + (np.abs(high - low) - np.sqrt(variance)) ** 2))
    assert found["error"]["w2"] == pytest.approx(w2, rel=1e-9)
    assert w2 > 1e-3


def damage(path: Path, rehash: bool = True, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    if rehash:
        columns = [np.array(content[name], np.float64) for name in samplers.Tableau._fields]
        content["hash"] = interchange.digest_of(samplers.Tableau(*columns))
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other"}, "is not a sampler file"),
        ({"version": 2}, "is of version 2: this library reads version 1"),
        ({"rehash": False, "t": [1.0] * 6}, "is damaged: it does not fit its hash"),
        ({"rehash": False, "mix": None}, "is damaged: "),
        ({"rehash": False, "mix": [[[1.0]], [[2.0, 3.0]]]}, "is damaged: "),
        ({"rehash": False, "alpha": ["a"] * 6}, "is damaged: "),
        ({"rehash": False, "alpha": [10**400] * 6}, "is damaged: "),
        ({"rehash": False, "sigma": [[1.0]] * 6}, r"is damaged: sigma has shape \(6, 1\)"),
        ({"rehash": False, "mix": np.full((6, 3, 6), np.nan).tolist()}, "mix is not finite"),
        (
            {"t": [2000.0, 800.0, 600.0, 400.0, 200.0, 1.0]},
            r"rows \[0\] of .* outside the schedule",
        ),
        ({"sigma": [1.0, 0.9, 0.8, 0.7, 0.6, 0.0]}, r"rows \[5\] of .* sigma above 0"),
        ({"alpha": [0.1] * 6}, "is for a different schedule: alpha, sigma are 0.1 and"),
        ({"ends_step": [1, 1, 1, 1, 1, 0]}, "the last row must end a step"),
    ],
    ids=str,
)
def test_bad_files_are_refused_in_one_line(tmp_path, changes: dict, message: str) -> None:
    path = tmp_path / "a.json"
    write(path)
    damage(path, **changes)
    with pytest.raises(InputError, match=message) as error:
        samplers.build(f"file:path={path}", SCHEDULE)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_levels_must_descend_and_belong_to_the_schedule(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    columns = grids.trailing(SCHEDULE, 4)
    back = grids.Grid(*(column[[0, 2, 1, 3, 4]] for column in columns))
    for eta in (0.0, 1.0):  # noise may lead to a higher level, as in restart
        interchange.write(path, samplers.ddim(SCHEDULE, columns, eta), "", "")
        damage(path, **{name: column[:-1].tolist() for name, column in back._asdict().items()})
        if eta == 0:
            with pytest.raises(InputError, match=r"rows \[2\] of .* a step that does not descend"):
                samplers.build(f"file:path={path}", SCHEDULE)
        else:
            samplers.build(f"file:path={path}", SCHEDULE)
    with pytest.raises(InputError, match="is for a different schedule"):
        samplers.build(f"file:path={path}", schedules.course(1000))


def test_a_file_is_a_sampler_with_levels_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    tableau = write(path)
    text = f"file:path={path}"
    chosen = samplers.parse(text, SCHEDULE)
    assert str(chosen) == f"{text}:digest={interchange.digest_of(tableau)[:12]}"
    assert samplers.spread(text, SCHEDULE, (5, 50)) == [chosen]
    assert samplers.split(f"ddim:5,{text}") == ["ddim:5", text]
    for given in ({"steps": 5}, {"grid": "trailing"}):
        with pytest.raises(InputError, match="a file has levels of its own"):
            samplers.build(text, SCHEDULE, **given)
    with pytest.raises(InputError, match="give path=FILE"):
        samplers.build("file", SCHEDULE)
    with pytest.raises(InputError, match="file has no option grid"):
        samplers.build(f"{text}:grid=karras", SCHEDULE)
    write(path, "ddim:6")
    with pytest.raises(InputError, match="has changed: its hash is"):
        samplers.build(chosen, SCHEDULE)


def test_the_app_writes_a_file_for_the_schedule_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    where = ("--from=checkpoints/sprites", f"--to={path}", "--sampler=unipc:6:grid=quadratic")
    call("convert", *where)
    found = json.loads(path.read_text())
    assert found["sampler"] == "unipc:6:grid=quadratic"
    assert found["schedule"].startswith("cosine:steps=500")
    expected = samplers.build("unipc:6:grid=quadratic", schedules.cosine(500))
    assert np.array_equal(found["mix"], expected.mix)
    with pytest.raises(InputError, match="exists: name a new file"):
        call("convert", *where)
