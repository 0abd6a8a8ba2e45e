"""Which results are the same to the bit, and which only up to rounding (docs/trusted_runs.md).

  python -m tests.test_reproducibility

prints how far images of the project's own model are apart that differ only by rounding.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import parallel, samplers
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.runs import environment, load_model
from diffusion_jax.sampling import sample
from tests.models import SMALL, untrained

ROOT = Path(__file__).parent.parent


def make_model() -> Model:
    return untrained(SMALL)


def draw(model: Model, n: int = 8, devices: int = 2, name: str = "ddpm", **options) -> np.ndarray:
    table = samplers.build(name, model.schedule, 5)
    context = np.eye(3, dtype=np.float32)[np.arange(n) % 3]
    devices = jax.devices()[:devices]
    return sample(model, table, n, context=context, devices=devices, **options).images


def digest(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(scope="module")
def drawn(model) -> np.ndarray:
    return draw(model)


# --------------------------------------------------------------------------------- to the bit


def test_another_process_gives_the_same_bits(drawn) -> None:
    """Use equally many CPU devices, because XLA's threads split their work by that number."""
    program = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8);"
        "from tests.test_reproducibility import *; print(digest(draw(make_model())))"
    )
    out = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert out.split()[-1] == digest(drawn)


def test_what_ran_before_changes_no_bit(model, drawn) -> None:
    draw(model, name="heun")
    np.testing.assert_array_equal(draw(model), drawn, strict=True)


def test_either_way_of_mapping_gives_the_same_bits(model, drawn, shard_map) -> None:
    np.testing.assert_array_equal(draw(model), drawn, strict=True)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 3), (8, 8)])
def test_the_noise_of_an_image_is_the_same_everywhere(devices: int, batch_size: int) -> None:
    model = untrained()
    start = draw(model, 11, 1, rows=0)
    again = draw(model, 11, devices, rows=0, batch_size=batch_size)
    np.testing.assert_array_equal(again, start, strict=True)
    np.testing.assert_array_equal(draw(model, 3, rows=0), start[:3], strict=True)


def test_as_many_images_on_each_device_give_the_same_bits(model, drawn) -> None:
    """Draw 4 images on each of 2 devices, or 4 and then 4 on one."""
    np.testing.assert_array_equal(draw(model, devices=1, batch_size=4), drawn, strict=True)


# ---------------------------------------------------------------------------- up to rounding


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 3), (8, 8)])
def test_other_parts_of_a_batch_change_only_roundings(
    model, drawn, devices: int, batch_size: int
) -> None:
    """Expect rounding: a program for a different number of images sums in a different order."""
    again = draw(model, devices=devices, batch_size=batch_size)
    assert np.abs(again - drawn).max() < 1e-5 * np.abs(drawn).max()


# ------------------------------------------------------------------------------ what is kept


def test_deterministic_kernels_are_asked_of_xla_before_it_starts(tmp_path) -> None:
    program = (
        "import sys; from absl import flags; from experiments import train;"
        "from jax._src import xla_bridge; from experiments.app import run;"
        "started = xla_bridge.backends_are_initialized;"
        "train.parallel.make_deterministic = lambda: sys.exit(9 + started());"
        "run(train.main)"
    )
    dump = {"XLA_FLAGS": f"--xla_dump_to={tmp_path}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, "--deterministic", f"--run={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **dump}, capture_output=True)
    assert done.returncode == 9, done.stderr
    program = (
        "import jax; from diffusion_jax import parallel; parallel.make_deterministic();"
        "jax.jit(lambda x: x + 1)(1.0)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | dump, check=True)
    options = next(tmp_path.glob("*debug_options")).read_text()
    assert "xla_gpu_deterministic_ops: true" in options


def test_settings_of_jax_and_xla_are_kept(monkeypatch) -> None:
    monkeypatch.setenv("XLA_ANY", "1")
    monkeypatch.setenv("OTHER", "1")
    entry = json.loads(json.dumps(environment.describe(["train"], jax.devices())))
    assert ROOT == environment.ROOT, "the folder of the commit"
    assert entry["variables"]["XLA_ANY"] == "1"
    assert "OTHER" not in entry["variables"]


def main() -> None:
    """Print the largest differences between images of the shipped model, by their cause."""
    parallel.use_cpu_cores(2)
    model = load_model("checkpoints/sprites")
    context = np.eye(5, dtype=np.float32)[np.arange(32) % 5]
    table = samplers.build("ddim", model.schedule, 25)

    def images(devices: int, batch_size: int) -> np.ndarray:
        given = {"context": context, "devices": jax.devices()[:devices]}
        return sample(model, table, 32, **given, batch_size=batch_size).images

    whole = images(2, 32)
    print("32 images by DDIM-25, on 2 devices at once against")
    for devices, batch_size in ((2, 32), (1, 16), (1, 32), (2, 8), (1, 1)):
        far = np.abs(images(devices, batch_size) - whole).max()
        print(f"batches of {batch_size} on {devices}: {far:.1e}")


if __name__ == "__main__":
    main()
