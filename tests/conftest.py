"""All tests: 8 CPU devices, strict promotion of types, shapes checked, warnings as errors."""

from collections import Counter
from typing import Any

import jax
import pytest
from jaxtyping import install_import_hook

from tests import checker

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("diffusion_jax", f"{checker.__name__}.check")

TRIED: Counter[str] = Counter()  # by the tests of hostile input
FAULTS: Counter[str] = Counter()  # injected by the slow tests of faults; what was wrong: WRONG ...

HANGS = 1800  # seconds after which a process counts as hanging: a slow machine needs many

LONG = ("test_apps.py", "test_training.py", "test_faults.py", "test_trust.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: two processes share the files out."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def model() -> Any:
    """A small network with its initial weights."""
    from tests.models import untrained  # the library, with the hook in place

    return untrained()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many hostile inputs and faults there were."""
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
