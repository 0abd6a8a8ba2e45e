"""Imports point only downwards, and only the apps import absl."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. A module may import from lower layers and from its own package.
LAYERS = (
    ("typing",),
    ("spec", "files"),
    ("diffusion", "networks", "data", "parallel", "pictures"),
    ("tableau",),
    ("samplers",),
    ("training", "sampling"),
    ("runs",),
    ("evaluation",),
    ("learning",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "diffusion_jax").rglob("*.py"))


def part(path: Path) -> str:
    """Return the module or package directly under diffusion_jax that contains a file."""
    return path.relative_to(ROOT / "diffusion_jax").parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_its_layer() -> None:
    assert {part(path) for path in MODULES} == {*HEIGHT, "__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    if part(path) == "__init__":
        return
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in ("absl", "experiments", "torch" if part(path) != "networks" else "")
        if top == "diffusion_jax" and rest[0] != part(path):
            assert HEIGHT[rest[0]] < HEIGHT[part(path)], f"{part(path)} imports {rest[0]}"


@pytest.mark.parametrize("package", ["networks", "data"])
def test_networks_and_data_know_no_other_room(package: str) -> None:
    for path in (ROOT / "diffusion_jax" / package).rglob("*.py"):
        for name in imported(path):
            if name.startswith("diffusion_jax."):
                assert name.split(".")[1] in (package, "typing", "spec", "files"), name
