"""The grammar of choices: specs are read, checked and written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from diffusion_jax import spec
from diffusion_jax.typing import InputError


def even(total: int, ends: bool = True) -> list:
    """Space them evenly."""
    return [total, ends]


def warped(total: int, rho: float = 7.0) -> list:
    """Space them by a power."""
    return [total, rho]


GRIDS = {"even": even, "warped": warped}


def on_grid(steps: int | None = None, grid: Annotated[Callable, GRIDS] = even) -> None:
    """Take the options that all have in common."""


def plain(model: object, kind: Literal["a", "b"] = "a", path: str = "") -> tuple:
    """Do nothing: a first line.

    More about it.
    """
    return model, kind, path


@dataclass
class Rich:
    """Hold options of every type."""

    size: int = 2
    scale: float = 1.5
    on: bool = False
    weights: tuple[float, ...] = ()
    order: int | None = None
    grid: Annotated[Callable, GRIDS] = even


REGISTRY = {"plain": plain, "rich": Rich}


def parse(text: str) -> spec.Spec:
    return spec.parse(text, REGISTRY, "thing", ("model", "total"))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("plain", {}),
        ("plain:b:path=x=1", {"kind": "b", "path": "x=1"}),
        (r"plain:path=C\:/a", {"path": "C:/a"}),
        ("rich:3:2.5:true:1,2.5", {"size": 3, "scale": 2.5, "on": True, "weights": (1.0, 2.5)}),
        ("rich:order=none", {"order": None}),
        ("rich:order=4:scale=1e-3", {"order": 4, "scale": 1e-3}),
    ],
)
def test_reads_options_by_their_types(text: str, options: dict) -> None:
    assert parse(text).options == options


def test_options_of_a_part_follow_it() -> None:
    found = parse("rich:grid=warped:rho=3:size=5")
    assert found.options["size"] == 5
    assert found.bind()().grid(10) == [10, 3.0]
    assert str(found) == "rich:size=5:grid=warped:rho=3"


def test_binds_what_is_supplied() -> None:
    assert parse("plain:b").bind()(model=7) == (7, "b", "")


@pytest.mark.parametrize("text", ["plain:kind=b", r"plain:path=C\:/a", "rich:weights=1,2.5"])
def test_canonical_text_reads_back(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(parse(text).full).options["path" if "plain" in text else "weights"] is not None
    assert str(parse(parse(text).full)) == text


def test_common_options_come_first_and_without_a_name() -> None:
    found = spec.parse(
        "plain:10:grid=warped:rho=2:kind=b", REGISTRY, "s", ("model", "total"), on_grid
    )
    assert found.options["steps"] == 10
    assert str(found) == "plain:10:kind=b:grid=warped:rho=2"
    assert found.slug == "plain-10-kind=b-grid=warped-rho=2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan", "thing='plan' is unknown: did you mean plain? choose from plain, rich"),
        ("plain:kinds=a", "thing=plain:kinds=a: plain has no option kinds: did you mean kind?"),
        ("plain:model=1", "plain has no option model"),
        ("plain:kind=c", "kind=c: it must be a, b"),
        ("plain:a:x:y", "plain has no option y: choose from kind, path"),
        ("rich:size=x", "size=x: it must be a whole number"),
        ("rich:scale=nan", "scale=nan: it must be a number"),
        ("rich:on=1", "on=1: it must be true or false"),
        ("rich:weights=1,a", "weights=1,a: it must be a number, one or more, with commas between"),
        ("rich:order=1.5", "order=1.5: it must be none or a whole number"),
        ("rich:size=1:size=2", "size is given twice"),
        ("rich:rho=2", "rich has no option rho"),
        ("rich:grid=wrapped", "grid=wrapped: it must be one of even, warped"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "c"}, "kind=c: it must be a, b"),
        ({"path": 3}, "path=3: it must be a word"),
        ({"knd": "a"}, "did you mean kind?"),
    ],
)
def test_checks_values_of_python(options: dict, message: str) -> None:
    spec.check(plain, {"kind": "b", "path": "x"}, "plain")
    with pytest.raises(InputError) as error:
        spec.check(plain, options, "plain")
    assert message in str(error.value)


def test_describes_a_registry() -> None:
    text = spec.describe(REGISTRY, ("model",))
    assert "plain  kind=a|b  path=" in text
    assert "Do nothing: a first line." in text
    assert "More about it" not in text
    assert "rich  size=2  scale=1.5  on=false  weights=  order=none  grid=even" in text
    assert "grid is even:ends=true, warped:rho=7" in text
