"""Compare exact errors on Gaussian data with sampling, and with the exact solution."""

import numpy as np
import pytest
from scipy import linalg

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.samplers import SAMPLERS
from diffusion_jax.tableau import analysis
from diffusion_jax.tableau.analysis import Gaussian
from diffusion_jax.typing import Level
from tests.interpreter import interpret

SCHEDULE = schedules.linear(1000)
DATA = Gaussian(np.array([0.5, -1.0]), np.array([0.3, 2.0]))


def denoise(x: np.ndarray, t: float, alpha: float, sigma: float) -> tuple:
    """Return the posterior mean of Gaussian data, from the precisions of prior and likelihood."""
    prior, seen = 1 / DATA.variance, alpha**2 / sigma**2
    x0 = (prior * DATA.mean + alpha * x / sigma**2) / (prior + seen)
    return x0, (x - alpha * x0) / sigma


@pytest.mark.parametrize("name", SAMPLERS)
def test_push_is_what_sampling_does(name: str) -> None:
    """Sample a few points, which determine a linear map, and one noise for each basis vector."""
    tableau = samplers.build(name, SCHEDULE, 6)
    start = DATA.at(Level(0.0, tableau.alpha[0], tableau.sigma[0]))
    none = np.zeros((tableau.rows, 2))
    centre = interpret(tableau, denoise, start.mean, none)
    shifted = interpret(tableau, denoise, start.mean + np.sqrt(start.variance), none)
    variance = (shifted - centre) ** 2
    for row in range(tableau.rows):
        noise = none.copy()
        noise[row] = 1
        variance += (interpret(tableau, denoise, start.mean, noise) - centre) ** 2
    end = analysis.push(tableau, DATA)
    assert np.allclose(end.mean, centre, atol=1e-10)
    assert np.allclose(end.variance, variance, rtol=1e-9)


def test_a_single_step_of_ddim_by_hand() -> None:
    grid = grids.trailing(SCHEDULE, 1)
    alpha, sigma = grid.alpha[0], grid.sigma[0]
    end = analysis.push(samplers.ddim(SCHEDULE, grid), DATA)
    total = alpha**2 * DATA.variance + sigma**2
    assert np.allclose(end.mean, DATA.mean, atol=1e-12)
    assert np.allclose(end.variance, (alpha * DATA.variance) ** 2 / total, rtol=1e-12)


def test_wasserstein_distance_of_gaussians() -> None:
    one = Gaussian(np.array([0.0, 3.0]), np.array([1.0, 4.0]))
    other = Gaussian(np.array([0.0, 0.0]), np.array([1.0, 36.0]))
    assert analysis.wasserstein(one, one) == 0
    assert analysis.wasserstein(one, other) == pytest.approx(5)


def test_inversion_is_analysed_too() -> None:
    """Turn data into noise. The images' distribution must become that of the first level."""
    for n, bound in ((50, 0.3), (800, 0.02)):
        grid = grids.linspace(SCHEDULE, n)
        inverse = samplers.ddim_inversion(SCHEDULE, grid)
        noise = analysis.push(inverse, DATA, start=DATA)
        assert analysis.wasserstein(noise, DATA.at(SCHEDULE.level(1000.0))) < bound


def test_the_spectrum_stands_for_the_whole_covariance() -> None:
    """Push a correlated Gaussian through DDIM as a matrix, and compare the whole W2 distance."""
    mix = np.array([[1.0, 0.8, 0.0], [0.0, 0.5, 0.3], [0.2, 0.0, 0.1]])
    data = np.random.default_rng(0).standard_normal((50, 3)) @ mix + [1.0, 0.0, -2.0]
    found = analysis.spectrum(data)
    mean, covariance = data.mean(0), np.cov(data.T)
    assert np.allclose(found.mean @ found.mean, mean @ mean)
    assert np.allclose(found.variance, np.linalg.eigvalsh(covariance))
    grid = grids.trailing(SCHEDULE, 4)
    x, spread = grid.alpha[0] * mean, grid.alpha[0] ** 2 * covariance
    spread = spread + grid.sigma[0] ** 2 * np.eye(3)
    for start, end in zip(grid.levels[:-1], grid.levels[1:], strict=True):
        total = start.alpha**2 * covariance + start.sigma**2 * np.eye(3)
        gain = start.alpha * covariance @ np.linalg.inv(total)  # x0 = mean + gain (x - alpha mean)
        slope = end.sigma / start.sigma
        matrix = slope * np.eye(3) + (end.alpha - slope * start.alpha) * gain
        offset = (end.alpha - slope * start.alpha) * (mean - gain @ mean * start.alpha)
        x, spread = matrix @ x + offset, matrix @ spread @ matrix.T
    root = linalg.sqrtm(covariance)
    cross = linalg.sqrtm(root @ spread @ root)
    w2 = np.sum((x - mean) ** 2) + np.trace(covariance + spread - 2 * np.real(cross))
    tableau = samplers.ddim(SCHEDULE, grid)
    assert analysis.error(tableau, found) == pytest.approx(np.sqrt(w2), rel=1e-6)


def test_fit_order_reads_a_power_law() -> None:
    steps = np.array([10, 20, 40])
    assert analysis.fit_order(steps, 7.0 * steps**-2.5) == pytest.approx(2.5)
