"""An exported sampler is one file that draws sample's images in a process without this library."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from diffusion_jax import samplers
from diffusion_jax.runs import load_model
from diffusion_jax.sampling import sample
from diffusion_jax.sampling.exporting import check_new, export_sampler, read_sampler, write_sampler
from diffusion_jax.typing import InputError
from tests.apps import call
from tests.processes import HANGS

pytest.importorskip("flatbuffers")

ROOT = Path(__file__).parent.parent
SHIPPED = "checkpoints/sprites"
ALONE = """
import sys
from pathlib import Path
import numpy as np
from jax import export
folder = Path(sys.argv[1])
sampler = export.deserialize((folder / "a.sampler").read_bytes())
assert sampler.platforms == ("cpu", "cuda")
context = np.load(folder / "context.npy")
scale = [np.float32(3)] if len(sampler.in_avals) == 3 else []
for n in map(int, sys.argv[2:]):
    np.save(folder / f"{n}.npy", sampler.call(np.uint32(7), context[:n], *scale))
assert not [name for name in sys.modules if name.startswith(("diffusion_jax", "flax"))]
"""


def test_the_file_draws_the_same_images_without_this_library(tmp_path, model) -> None:
    context = np.random.default_rng(0).normal(size=(4, 3), scale=30).astype(np.float32)
    np.save(tmp_path / "context.npy", context)
    tableau, guidance = samplers.build("ddpm", model.schedule, 4), 3.0
    sampler = export_sampler(model, tableau, guidance=True)
    write_sampler(tmp_path / "a.sampler", sampler)
    command = [sys.executable, "-c", ALONE, str(tmp_path), "1", "4"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=HANGS)
    expected = sample(model, tableau, 4, context=context, guidance=guidance, seed=7).images
    other = sample(model, tableau, 4, context=context, guidance=guidance, seed=8).images
    for n in (1, 4):
        assert np.allclose(np.load(tmp_path / f"{n}.npy"), expected[:n], atol=1e-5)
    assert np.abs(other - expected).max() > 0.1


def test_the_app_exports_the_projects_own_model(tmp_path) -> None:
    """Export a model whose layers are wide enough for Winograd, here for any number of images."""
    context = np.eye(5, dtype=np.float32)[[3, 0, 1, 4]]
    np.save(tmp_path / "context.npy", context)
    flags = (f"--from={ROOT / SHIPPED}", f"--to={tmp_path}/a.sampler", "--sampler=sa_solver:2")
    call("convert", *flags, "--platforms=cpu,cuda")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path), "4"], check=True, timeout=HANGS)
    model = load_model(ROOT / SHIPPED)
    tableau = samplers.build("sa_solver", model.schedule, 2)
    expected = sample(model, tableau, 4, context=context, seed=7).images
    assert np.allclose(np.load(tmp_path / "4.npy"), expected, atol=1e-5)


def test_a_file_that_exists_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(InputError, match="exists: name a new file"):
        check_new(tmp_path / "a")
    with pytest.raises(InputError, match="there is no folder"):
        check_new(tmp_path / "none" / "a")


def small(model) -> Any:
    return export_sampler(model, samplers.build("ddim", model.schedule, 2), platforms=("cpu",))


def test_a_file_is_read_only_as_it_was_written(tmp_path: Path, model) -> None:
    path = tmp_path / "a.sampler"
    digest = write_sampler(path, small(model))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "a.sampler.sha256").read_text() == f"{digest}  a.sampler\n"
    context = np.zeros((1, 3), np.float32)
    assert read_sampler(path).call(np.uint32(7), context).shape == (1, 8, 8, 3)
    assert read_sampler(path, digest.upper()).platforms == ("cpu",)
    with pytest.raises(InputError, match=f"its SHA-256 is {digest}, not 0{{64}}"):
        read_sampler(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="it was changed"):
        read_sampler(path)
    path.write_bytes(b"no program")
    with pytest.raises(InputError, match="is not a sampler that this JAX reads"):
        read_sampler(path, hashlib.sha256(b"no program").hexdigest())
    (tmp_path / "a.sampler.sha256").unlink()
    with pytest.raises(InputError, match="cannot be read with its digest"):
        read_sampler(path)


def test_calls_of_code_outside_the_file_are_refused(tmp_path: Path) -> None:
    matrix = jax.ShapeDtypeStruct((3, 3), np.float32)
    write_sampler(tmp_path / "a", export.export(jax.jit(jnp.linalg.cholesky))(matrix))
    with pytest.raises(InputError, match="calls lapack_spotrf_ffi: no exported sampler does"):
        read_sampler(tmp_path / "a")


def test_an_unknown_dtype_is_named(model) -> None:
    tableau = samplers.build("ddim", model.schedule, 4)
    with pytest.raises(InputError, match="dtype='half' is unknown: choose from float32, tf32"):
        export_sampler(model, tableau, dtype="half")
