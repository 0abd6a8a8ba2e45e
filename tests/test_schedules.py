"""Compare schedules and grids with formulas written from the papers and from the course."""

import numpy as np
import pytest

from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.schedules import SCHEDULES
from diffusion_jax.typing import InputError


def test_the_table_is_the_courses_own() -> None:
    """Expect the bits of the course's PyTorch code, run in float64."""
    b = (0.02 - 1e-4) * np.linspace(0, 1, 501) + 1e-4
    ab = np.exp(np.cumsum(np.log(1 - b)))
    ab[0] = 1
    schedule = schedules.course(500)
    assert np.array_equal(schedule.beta, b)
    assert np.array_equal(schedule.alpha, np.sqrt(ab))
    assert np.array_equal(schedule.sigma, np.sqrt(1 - ab))


def test_linear_is_a_running_product() -> None:
    alpha_bar, betas = 1.0, np.linspace(1e-4, 0.02, 1000)
    schedule = schedules.linear(1000)
    for i, beta in enumerate(betas, start=1):
        alpha_bar *= 1 - beta
        assert schedule.alpha[i] ** 2 == pytest.approx(alpha_bar, abs=1e-12)
        assert schedule.beta[i] == beta


def test_cosine_follows_its_formula_until_its_limit() -> None:
    steps, s = 500, 0.008
    t = np.arange(steps + 1)
    f = np.cos((t / steps + s) / (1 + s) * np.pi / 2) ** 2
    schedule = schedules.cosine(steps)
    clipped = np.flatnonzero(1 - f[1:] / f[:-1] > 0.999)[0] + 1
    assert np.allclose(schedule.alpha[:clipped] ** 2, f[:clipped] / f[0], atol=1e-12, rtol=0)
    assert schedule.beta.max() == 0.999
    assert schedule.alpha[-1] > 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 500])
def test_every_schedule(name: str, steps: int) -> None:
    schedule = schedules.build(f"{name}:steps={steps}")
    assert all(table.dtype == np.float64 and len(table) == steps + 1 for table in schedule[:3])
    assert schedule.alpha[0] == 1
    assert schedule.sigma[0] == 0
    assert np.allclose(schedule.alpha, schedule.alpha_at(schedule.ratio), atol=1e-15)
    assert np.all(np.diff(schedule.sigma) > 0)


def test_levels_between_steps_interpolate_log_snr() -> None:
    schedule = schedules.linear(500)
    whole = schedule.level(np.arange(501.0))
    assert np.array_equal(whole.alpha, schedule.alpha)
    assert np.array_equal(whole.sigma, schedule.sigma)
    between = schedule.level(np.array([17.25, 480.5]))
    log_snr = np.log(schedule.alpha[1:] / schedule.sigma[1:])
    expected = np.interp([17.25, 480.5], np.arange(1, 501), log_snr)
    assert np.allclose(np.log(between.alpha / between.sigma), expected, atol=1e-12)
    assert np.allclose(between.alpha**2 + between.sigma**2, 1, atol=1e-15)
    first = schedule.level(np.array([0.25]))
    assert first.sigma / first.alpha == pytest.approx(
        0.25 * schedule.sigma[1] / schedule.alpha[1], rel=1e-12
    )


def test_levels_fall_with_time() -> None:
    schedule = schedules.cosine(50)
    level = schedule.level(np.linspace(0, 50, 1001))
    assert np.all(np.diff(level.alpha) < 0)
    assert np.all(np.diff(level.sigma) > 0)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 25, 50, 100, 250, 500])
def test_the_grid_is_the_courses_loop(n: int) -> None:
    step_size = 500 // n
    visited = list(range(500, 0, -step_size))
    assert grids.course(schedules.course(500), n).t.tolist() == [*visited, 0]


def test_grids_by_hand() -> None:
    schedule = schedules.linear(10)
    assert grids.leading(schedule, 3).t.tolist() == [7, 4, 1, 0]
    assert grids.trailing(schedule, 4).t.tolist() == [10, 8, 5, 2, 0]
    assert grids.linspace(schedule, 4).t.tolist() == [10, 7, 4, 1, 0]
    assert grids.linspace(schedule, 1).t.tolist() == [10, 0]
    assert grids.course(schedule, 4).t.tolist() == [10, 8, 5, 3, 0]


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "levels"])
def test_every_grid_has_its_steps_and_ends_at_data(name: str) -> None:
    schedule = schedules.course(60)
    for n in range(1, 61):
        grid = GRIDS[name](schedule, n)
        assert grid.steps == n
        assert np.all(np.diff(grid.t) < 0)
        assert (grid.t[-1], grid.alpha[-1], grid.sigma[-1]) == (0, 1, 0)
        assert grid.t[0] <= 60


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "levels"])
@pytest.mark.parametrize("n", [0, -3, 61])
def test_grids_name_a_wrong_number_of_steps(name: str, n: int) -> None:
    with pytest.raises(InputError, match=rf"steps={n}: it must be in 1\.\.60"):
        GRIDS[name](schedules.course(60), n)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.linear(0), "steps=0: a schedule must have 1 to"),
        (lambda: schedules.course(10, beta_min=0.0), "beta_min=0.0"),
        (lambda: schedules.course(10, beta_max=1.0), "beta_max=1.0"),
        (lambda: schedules.linear(10, beta_min=0.5, beta_max=0.1), "beta_min <= beta_max"),
        (lambda: schedules.build("quartic:steps=10"), "schedule='quartic' is unknown: choose from"),
        (lambda: schedules.linear(10).level(10.5), r"must be in \[0, 10\]"),
        (lambda: schedules.linear(10).level(float("nan")), r"must be in \[0, 10\]"),
        (lambda: grids.at(schedules.linear(10), np.array([5.0, 7.0, 0.0])), "fall strictly"),
        (lambda: grids.at(schedules.linear(10), np.array([5.0, 1.0])), "fall strictly"),
    ],
)
def test_what_cannot_be_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
