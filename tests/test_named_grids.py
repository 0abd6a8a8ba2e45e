"""Grids of image tools and papers against numbers from their sources, and levels that are given."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, optimize

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.typing import InputError

SD = schedules.scaled_linear(1000)  # Stable Diffusion's schedule
FLOW = schedules.flow(1000)


def test_align_your_steps_has_the_published_times_and_interpolates_between_them() -> None:
    """The authors publish these times, counted from 0, beside the levels of Stable Diffusion 1."""
    published = np.array([999, 850, 736, 645, 545, 455, 343, 233, 124, 24])
    assert np.allclose(grids.ays(SD, 10).t, [*(published + 1), 0], rtol=0, atol=1e-5)
    twenty = grids.ays(SD, 20)
    assert np.allclose(twenty.ratio[:-1:2], grids.ays(SD, 10).ratio[:-1], rtol=1e-9)
    expected = np.sqrt(14.6146412293 * 6.4745760956)
    assert twenty.ratio[1] == pytest.approx(expected, rel=1e-9)
    assert grids.ays(SD, 5, "sdxl").ratio[2] == pytest.approx(1.3405244945, rel=1e-9)
    assert grids.ays(schedules.karras(500, sigma_max=700.0), 10, "svd").t[0] == 500
    low = schedules.linear(40)
    assert grids.ays(low, 9).t[0] == 40


def test_gits_has_the_published_levels() -> None:
    """Figures of the authors' code with three coefficients, for 3 to 20 steps."""
    assert np.allclose(grids.gits(SD, 4).ratio, [14.61464, 2.363261, 0.921923, 0.36617, 0], 1e-5)
    assert np.allclose(grids.gits(SD, 20).ratio[[2, 19]], [4.654728, 0.098245], rtol=1e-5)
    assert np.allclose(grids.gits(SD, 3, 0.8).ratio, [14.61464, 11.545419, 6.773091, 0], 1e-5)
    assert np.allclose(grids.gits(SD, 20, 1.5).ratio[[1, 19]], [2.450703, 0.098245], rtol=1e-5)
    assert np.allclose(grids.gits(SD, 40).ratio[4:-1:2], grids.gits(SD, 20).ratio[2:-1], rtol=1e-7)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 0.5)])
def test_beta_has_equal_masses_between_its_levels(a: float, b: float) -> None:
    grid = grids.beta(SD, 6, a, b)
    density = lambda x: x ** (a - 1) * (1 - x) ** (b - 1)  # noqa: E731
    place = (grid.t[:-1] - 1) / 999
    mass = [
        integrate.quad(density, low, high)[0] for low, high in zip(place[1:], place, strict=False)
    ]
    last = integrate.quad(density, 0, place[-1])[0]
    assert place[0] == 1
    assert np.allclose([*mass, last], mass[0], rtol=1e-6)


def test_beta_in_sigma_is_that_of_diffusers() -> None:
    """Figures of diffusers 0.42.1: EulerDiscreteScheduler with use_beta_sigmas, 5 steps."""
    theirs = [14.61465, 12.05226, 7.321907, 2.59155, 0.02916753, 0]
    assert np.allclose(grids.beta(SD, 5, unit="sigma").ratio, theirs, rtol=1e-4)


def test_sgm_uniform_and_the_options_of_leading_and_linspace() -> None:
    assert np.allclose(grids.sgm_uniform(SD, 4).t, [1000, 750.25, 500.5, 250.75, 0])
    assert grids.leading(SD, 4, first=2).t.tolist() == [752, 502, 252, 2, 0]
    assert np.allclose(grids.linspace(SD, 3, whole=False).t, [1000, 500.5, 1, 0])


@pytest.mark.parametrize(("threshold", "first"), [(0.025, None), (0.1, 3)])
def test_linear_quadratic_is_a_line_and_a_parabola_that_meet_smoothly(threshold, first) -> None:
    """Fit the parabola to its conditions: the value and slope where they meet, and the end."""
    n, line = 8, first or 4
    slope = threshold / line
    parabola = np.linalg.solve(
        [[line**2, line, 1], [2 * line, 1, 0], [n**2, n, 1]], [threshold, slope, 1]
    )
    i = np.arange(n + 1)
    expected = 1 - np.where(i < line, slope * i, np.polyval(parabola, i))
    assert np.allclose(
        grids.linear_quadratic(FLOW, n, threshold, first).sigma, expected, atol=1e-12
    )
    scaled = grids.linear_quadratic(SD, n, threshold, first).ratio
    assert np.allclose(scaled, expected * SD.ratio[-1], atol=1e-12)


def test_kl_optimal_is_even_in_the_arctangent() -> None:
    """Their formula in degrees; for unit data, the levels also minimise the KL divergence."""
    angles = np.degrees(np.arctan(grids.kl_optimal(SD, 6).ratio[:-1]))
    assert np.allclose(np.diff(angles), (angles[-1] - angles[0]) / 5, rtol=1e-9)
    assert grids.kl_optimal(SD, 6).t[[0, -2]].tolist() == [1000, 1]

    def deviation(middle: np.ndarray) -> float:  # of the samples of N(0, 1) in two DDIM steps
        steps = pairwise([SD.ratio[-1], middle[0], SD.ratio[1]])
        return abs(np.prod([(1 + r * s) / np.hypot(1, r) / np.hypot(1, s) for r, s in steps]) - 1)

    best = optimize.minimize(deviation, [2.0], method="Nelder-Mead", options={"xatol": 1e-8})
    given = grids.kl_optimal(SD, 2, to_zero=False).ratio[1]
    assert best.x[0] == pytest.approx(given, rel=1e-4)


def test_shifted_is_the_shift_of_flow_models() -> None:
    """Stable Diffusion 3's t' = 3 t / (1 + 2 t), and FLUX.1's mu at 1024 tokens, from diffusers."""
    t = np.arange(8, -1, -1) / 8
    assert np.allclose(grids.shifted(FLOW, 8).sigma, 3 * t / (1 + 2 * t), atol=1e-12)
    flux = [1, 0.929295, 0.8492348, 0.75783116, 0.6524894, 0.5297584, 0.38494474, 0.21149956, 0]
    assert np.allclose(grids.shifted(FLOW, 8, tokens=1024).sigma, flux, atol=1e-7)
    assert np.allclose(grids.shifted(FLOW, 8, shift=1.0).sigma, t, atol=1e-12)
    finite = grids.shifted(SD, 8, shift=2.0)
    place = finite.ratio / 2 / (1 + finite.ratio / 2)
    assert finite.t[0] == 1000
    assert np.allclose(np.diff(place, 2), 0, atol=1e-12)


def test_polyexponential_is_exponential() -> None:
    ours = grids.build("polyexponential:rho=2", SD, 5)
    assert np.array_equal(ours.t, grids.exponential(SD, 5, rho=2.0).t)


# --- levels that are given ---------------------------------------------------------------------


def test_given_levels_decide_the_number_of_steps(tmp_path) -> None:
    path = tmp_path / "levels.txt"
    path.write_text("14.6, 6.3\n0.5\n0\n")
    by_sigma = samplers.build("ddim:grid=levels:sigma=14.6,6.3,0.5", SD)
    assert np.allclose(by_sigma.sigma / by_sigma.alpha, [14.6, 6.3, 0.5], rtol=1e-12)
    for text in (f"path={path}", "sigma=14.6,6.3,0.5,0"):
        again = samplers.build(f"ddim:grid=levels:{text}", SD)
        assert all(np.array_equal(a, b) for a, b in zip(by_sigma, again, strict=True))
    assert str(samplers.parse("ddim:grid=levels:t=500,20", SD)) == "ddim:2:grid=levels:t=500,20"
    path.write_text("500 20.5")
    assert samplers.build(f"ddim:grid=levels:path={path}:unit=t", SD).t.tolist() == [500, 20.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("levels:5", "grid=levels: 1 levels are given for 3 steps"),
        ("levels", "grid=levels: give one of t="),
        ("levels:t=5:sigma=3", "grid=levels: give one of t="),
        ("levels:t=0", "0 levels are given for 3 steps"),
        ("levels:t=5,7,3", "grid=levels: 5 comes before 7: levels must fall strictly"),
        ("levels:sigma=5,3,3", "grid=levels: 3 comes before 3: levels must fall strictly"),
        ("levels:t=5000,7,3", r"t=.* lies outside the schedule: it must be in \[0, 1000\]"),
        ("levels:sigma=20,1,0.5", "sigma / alpha = .* lies outside the schedule"),
        ("levels:sigma=2,1,-3", "sigma / alpha = .* lies outside the schedule"),
        ("levels:path={}:unit=sigma", "path=.*: it must hold numbers, such as 14.6"),
        ("levels:path=/none/such", "path=/none/such: it must hold numbers, such as 14.6"),
        ("levels:sigma=1,a", "sigma=1,a: it must be a number, one or more"),
        ("gits:coefficient=1.23", "coefficient=1.23: it must be one of 0.8, 0.85, 0.9, "),
        ("ays:model=sd2", "model=sd2: it must be sd1, sdxl, svd"),
        ("beta:a=0", "a=0.0, b=0.6: they must be above 0"),
        ("beta:b=inf", "a=0.6, b=inf: they must be above 0"),
        ("beta:a=1e-9", "must fall strictly"),
        ("linear_quadratic:threshold=1", r"threshold=1.0: it must be in \(0, 1\)"),
        ("linear_quadratic:linear_steps=3", r"linear_steps=3: it must be in 1\.\.2"),
        ("linear_quadratic:threshold=0.95", "threshold=0.95: it is too large for 1 of 3 steps"),
        ("shifted:shift=0", "shift=0.0: it must be above 0"),
        ("shifted:tokens=0", r"tokens=0: it must be in 1\.\.65536"),
        ("leading:first=0", "first=0: it must be at least 1"),
        ("leading:first=900", "lies outside the schedule"),
        ("kl_optimal:sigma_min=5:sigma_max=2", "sigma_min < sigma_max"),
    ],
)
def test_bad_options_are_named(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text("14.6 large")
    with pytest.raises(InputError, match=message):
        grids.build(text.format(path), SD, 3)
