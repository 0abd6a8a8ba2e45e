"""Which samplers are the same map: the table in docs/samplers.md, and what the comparison sees."""

from pathlib import Path

import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.tableau.identity import EQUAL, canonical, group, is_same
from tests.interpreter import interpret, mixture

LINEAR = "linear:steps=1000"
SETTINGS = {  # schedule, grid, steps
    "linear": (LINEAR, "trailing", 12),
    "few": (LINEAR, "trailing", 5),
    "course": ("course", "course", 25),
    "karras": ("karras", "karras", 10),
    "flow": ("flow", "trailing", 11),
    "cosine": ("cosine", "uniform_logsnr:to_zero=false", 15),
    "pure noise": ("linear:zero_snr=true", "trailing", 10),
}
HOLDS = {
    "always": SETTINGS.keys(),
    "where the grid ends at clean data": SETTINGS.keys() - {"cosine"},
    "where the grid ends above clean data": {"cosine"},
    "in fewer than 10 steps": {"few"},
    "where alpha is constant, as in the schedule karras": {"karras"},
}


def lines() -> list[str]:
    """Return the table of docs/samplers.md."""
    rows = (
        f"| {' = '.join(f'`{one}`' for one in same.split())} | {when} |" for when, same in EQUAL
    )
    return ["| the same map | when |", "|---|---|", *rows]


def build(text: str, setting: str) -> Tableau:
    schedule, grid, n = SETTINGS[setting]
    return samplers.build(text, schedules.build(schedule), n, grid)


@pytest.mark.filterwarnings("ignore::diffusion_jax.typing.RunWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("when", "same"), EQUAL)
def test_documented_samplers_are_the_same_map_where_they_should(when, same, setting) -> None:
    first, *others = (canonical(build(text, setting)) for text in same.split())
    for other in others:
        assert is_same(first, other) == (setting in HOLDS[when])


def test_the_courses_first_beta_makes_ddpm_another_map() -> None:
    for name, same in (("course", False), ("linear", True)):
        schedule = schedules.build(f"{name}:steps=50")
        texts = ("ddim:50:eta=1", "ddpm:50:variance=posterior")
        assert is_same(*(canonical(samplers.build(text, schedule)) for text in texts)) == same


def test_the_documented_table_is_this_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "samplers.md").read_text()
    assert "\n".join(lines()) in page


@pytest.mark.parametrize("same", [same for when, same in EQUAL if when == "always"])
def test_samplers_of_the_same_map_draw_the_same_images(same: str) -> None:
    """Run a nonlinear problem without noise, in float64."""
    x = np.linspace(-2, 2, 7)
    first, *others = (interpret(build(text, "linear"), mixture, x) for text in same.split())
    for other in others:
        assert np.allclose(first, other, rtol=0, atol=1e-9)


def test_the_defaults_that_differ_are_kept_apart() -> None:
    """Expect one group for each default, apart from the two that are documented as the same."""
    names = [name for name in samplers.SAMPLERS if name not in ("euler", "dpm_solver")]
    assert [len(same) for same in group({name: build(name, "linear") for name in names})] == [
        1 for _ in names
    ]


def test_registers_columns_and_the_split_of_noise_do_not_matter_but_levels_do() -> None:
    grid = grids.trailing(schedules.build(LINEAR), 2)
    first, middle, _ = grid.levels
    s = symbols(1)
    plain = [Row(first, [middle.alpha * s.x0 + 0.5 * s.xi]), Row(middle, [s.x0 + 0.3 * s.eps])]
    x0 = (s.x - first.sigma * s.eps) / first.alpha
    held = [
        Row(first, [middle.alpha * x0 + 0.3 * s.xi, s.xi]),
        Row(first, [s.x, s.z[0]]),  # a call that nothing uses, and more noise
        Row(middle, [s.x0 + 0.3 * s.eps]),
    ]
    held[1] = held[1]._replace(outputs=[s.x + 0.4 * s.xi])
    assert is_same(canonical(tabulate(plain)), canonical(tabulate(held)))
    assert len(canonical(tabulate(held)).alpha) == 2
    held[1] = held[1]._replace(outputs=[s.x + 0.4 * s.z[0]])  # the same noise twice
    assert not is_same(canonical(tabulate(plain)), canonical(tabulate(held)))
    moved = [plain[0], plain[1]._replace(level=first)]
    assert not is_same(canonical(tabulate(plain)), canonical(tabulate(moved)))
