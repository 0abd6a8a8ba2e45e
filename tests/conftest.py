"""Set up all tests: 8 CPU devices, strict type promotion, shape checks, warnings as errors."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jaxtyping import install_import_hook

from tests import checker

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("diffusion_jax", f"{checker.__name__}.check")

# Test processes and the apps that they start share compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

TRIED: Counter[str] = Counter()  # counts of the tests of hostile input
FAULTS: Counter[str] = Counter()  # counts of the slow tests of faults; failures begin with WRONG

LONG = ("test_apps.py", "test_training.py")  # the longest files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, because two processes share the files."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def model() -> Any:
    """Return a small network with its initial weights."""
    from tests.models import untrained  # import the library only after the hook is in place

    return untrained()


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Initialise and compile training once for each configuration of a module."""
    from tests.apps import compile_once

    patch = compile_once()
    yield
    patch.undo()


@pytest.fixture
def shard_map(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Map functions as jobs of several processes do."""
    from diffusion_jax import parallel
    from diffusion_jax.sampling.draw import _compiled

    _compiled.cache_clear()
    monkeypatch.setattr(parallel, "is_distributed", lambda devices: True)
    yield
    _compiled.cache_clear()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the numbers of hostile inputs and faults."""
    if TRIED:
        terminalreporter.write_line(
            f"{TRIED['inputs']:,} generated inputs, {TRIED['refused']:,} of them refused"
        )
    if FAULTS:
        wrong = sum(count for name, count in FAULTS.items() if name.startswith("WRONG"))
        kinds = {name: count for name, count in FAULTS.items() if not name.startswith("WRONG")}
        terminalreporter.write_line(
            f"{sum(kinds.values())} injected faults, {wrong} runs lost or silently wrong: "
            + ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
        )
