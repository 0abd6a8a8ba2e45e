"""Schedules other than DDPM's, levels given by sigma / alpha, and grids in it."""

import numpy as np
import pytest

from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.schedules import SCHEDULES
from diffusion_jax.typing import InputError


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 500])
def test_level_and_at_ratio_are_inverse_and_exact_at_whole_steps(name: str, steps: int) -> None:
    schedule = schedules.build(f"{name}:steps={steps}")
    whole = schedule.at_ratio(schedule.ratio)
    assert np.array_equal(whole.t, np.arange(steps + 1))
    assert np.array_equal(whole.alpha, schedule.alpha)
    assert np.array_equal(whole.sigma, schedule.sigma)
    t = np.linspace(0, steps, 4 * steps + 3)[1:-1]
    level = schedule.level(t)
    back = schedule.at_ratio(level.sigma / level.alpha)
    assert np.allclose(back.t, t, rtol=0, atol=1e-9 * steps)
    assert np.allclose(back.alpha, level.alpha, rtol=1e-12)
    assert np.all(np.diff(level.sigma / level.alpha) > 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_between_steps_stay_in_the_family(name: str) -> None:
    """Expect alpha^2 + sigma^2 = 1, alpha = 1 or alpha + sigma = 1, also between steps."""
    schedule = schedules.build(f"{name}:steps={50}")
    level = schedule.level(np.linspace(0, 50, 333))
    if name == "karras":
        invariant = level.alpha
    elif name == "flow":
        invariant = level.alpha + level.sigma
    else:
        invariant = level.alpha**2 + level.sigma**2
    assert np.allclose(invariant, 1, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_is_the_variance_that_a_step_adds(name: str) -> None:
    """Expect sigma_i^2 = (alpha_i / alpha_{i-1})^2 sigma_{i-1}^2 + beta_i.

    The course's first step is an exception.
    """
    schedule = schedules.build(f"{name}:steps={60}")
    kept = (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2
    variance = kept * schedule.sigma[:-1] ** 2 + schedule.beta[1:]
    first = 1 if name == "course" else 0
    assert np.allclose(variance[first:], schedule.sigma[1:][first:] ** 2, rtol=1e-9, atol=1e-15)


def test_scaled_linear_is_linear_in_the_root() -> None:
    beta = schedules.scaled_linear(1000).beta[1:]
    assert beta[[0, -1]] == pytest.approx([8.5e-4, 0.012], rel=1e-12)
    assert np.allclose(np.diff(np.sqrt(beta), 2), 0, atol=1e-15)


def test_sigmoid_follows_its_formula_until_its_limit() -> None:
    """Compute Jabri et al.: (sigmoid(end) - sigmoid(x)) / (sigmoid(end) - sigmoid(start))."""
    schedule = schedules.sigmoid(200, start=-2.0, end=4.0, temperature=0.9)
    x = (-2.0 + 6.0 * np.arange(201) / 200) / 0.9
    sigmoid = np.exp(x) / (1 + np.exp(x))
    alpha_bar = (sigmoid[-1] - sigmoid) / (sigmoid[-1] - sigmoid[0])
    assert np.allclose(schedule.alpha[:-1] ** 2, alpha_bar[:-1], atol=1e-12)
    assert 0 < schedule.alpha[-1] < 0.01


def test_karras_has_edms_levels() -> None:
    """Compute eq. 5, with i counted from the largest level."""
    sigma = schedules.karras(18).sigma[:0:-1]
    i = np.arange(18)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = (high + i / 17 * (low - high)) ** 7
    assert np.allclose(sigma[[0, -1]], [80, 0.002], rtol=1e-12)
    assert np.allclose(sigma, expected, rtol=1e-12)


def test_flow_is_straight() -> None:
    schedule = schedules.flow(10)
    assert np.allclose(schedule.sigma, np.arange(11) / 10, atol=1e-15)
    assert np.allclose(schedule.alpha, 1 - np.arange(11) / 10, atol=1e-15)
    level = schedule.level(9.5)
    assert level.sigma / level.alpha == pytest.approx(9 / (1 - 0.5))  # alpha / sigma is linear


def test_rescaled_schedules_end_in_noise_and_keep_their_first_step() -> None:
    """Apply Lin et al., algorithm 1: shift and scale the roots of alpha_bar."""
    old = schedules.scaled_linear(100)
    new = schedules.rescale_zero_terminal_snr(old)
    assert (new.alpha[0], new.alpha[-1], new.sigma[-1]) == (1, 0, 1)
    assert new.alpha[1] == pytest.approx(old.alpha[1], rel=1e-14)
    ratio = np.diff(new.alpha[1:]) / np.diff(old.alpha[1:])
    assert np.allclose(ratio, ratio[0], rtol=1e-9)
    assert new.beta[-1] == 1
    assert np.all(np.diff(new.ratio[:-1]) > 0)


def test_grids_in_sigma_over_alpha_by_their_formulas() -> None:
    schedule = schedules.linear(1000)
    low, high = schedule.ratio[1], schedule.ratio[-1]
    n, place = 9, np.arange(9) / 8
    exponential = np.exp(np.log(high) + place * np.log(low / high))
    rho = 5.0
    karras = (high ** (1 / rho) + place * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    for grid, expected in (
        (grids.exponential(schedule, n), exponential),
        (grids.karras(schedule, n, rho=rho), karras),
    ):
        assert np.allclose(grid.ratio[:-1], expected, rtol=1e-11)
        assert grid.ratio[-1] == 0
        assert (grid.t[0], grid.t[-2]) == (1000, 1)
    logs = np.log(grids.exponential(schedule, n, rho=2.0).ratio[:-1] / low)
    assert np.allclose(logs, (1 - place) ** 2 * np.log(high / low), atol=1e-11)
    assert np.allclose(np.diff(np.sqrt(grids.quadratic(schedule, n).t[:-1]), 2), 0, atol=1e-12)


@pytest.mark.parametrize("name", ["uniform_logsnr", "exponential", "karras"])
def test_grids_end_where_they_are_asked_to(name: str) -> None:
    schedule = schedules.linear(1000)
    grid = GRIDS[name](schedule, 6, to_zero=False)
    assert (grid.steps, grid.t[0], grid.t[-1]) == (6, 1000, 1)
    grid = GRIDS[name](schedule, 6, sigma_min=0.1, sigma_max=10.0)
    assert np.allclose(grid.ratio[[0, -2, -1]], [10, 0.1, 0], rtol=1e-12)
    flow = GRIDS[name](schedules.flow(100), 5, sigma_max=50.0)
    assert flow.ratio[0] == pytest.approx(50)


def test_grids_that_the_user_gives() -> None:
    schedule = schedules.linear(10)
    assert grids.at(schedule, np.array([9.5, 4.0, 1.0]), end=1.0).t.tolist() == [9.5, 4, 1]
    grid = grids.at_ratio(schedule, np.array([0.2, 0.1, 0.0]))
    assert np.allclose(grid.ratio, [0.2, 0.1, 0.0], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: grids.karras(s, 5, rho=0.0), "rho=0.0: it must be above 0"),
        (lambda s: grids.exponential(s, 5, rho=-1.0), "rho=-1.0: it must be above 0"),
        (lambda s: grids.karras(s, 5, sigma_min=9.0, sigma_max=2.0), "sigma_min < sigma_max"),
        (lambda s: grids.karras(schedules.flow(9), 5), "sigma_max=inf"),
        (lambda s: grids.at(s, np.array([5.0, 3.0]), end=1.0), "fall strictly from at most T to 1"),
        (lambda s: grids.at_ratio(s, np.array([0.1, 0.2])), "must fall strictly"),
        (lambda s: s.at_ratio(1e9), "sigma / alpha = 1000000000.0 lies outside the schedule"),
        (lambda s: s.at_ratio(-1.0), "lies outside the schedule"),
        (lambda s: schedules.karras(9, sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda s: schedules.karras(9, rho=0.0), "rho > 0"),
        (lambda s: schedules.sigmoid(9, start=3.0), "start < end"),
        (lambda s: schedules.cosine(9, beta_limit=1.0), r"beta_limit=1.0: it must be in \(0, 1\)"),
        (lambda s: schedules.rescale_zero_terminal_snr(schedules.flow(9)), "variance preserving"),
    ],
)
def test_what_cannot_be_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(schedules.linear(10))
