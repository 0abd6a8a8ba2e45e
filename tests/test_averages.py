"""Test power-function averages against float64 recursions, and averages made afterwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training import averages
from diffusion_jax.training.averages import SIGMA_RELS, Profile, combine
from diffusion_jax.typing import InputError


def recursion(values: np.ndarray, gamma: float, until: int) -> np.ndarray:
    """Apply Karras et al. 2023, section 3.1: mean <- b mean + (1 - b) value.

    Here b = (1 - 1/t)^(gamma + 1).
    """
    mean = np.zeros_like(values[0])
    for t in range(1, until + 1):
        decay = (1 - 1 / t) ** (gamma + 1)
        mean = decay * mean + (1 - decay) * values[t - 1]
    return mean


def test_gammas_are_the_papers() -> None:
    """Expect gamma = 16.97 for sigma_rel 0.05, and 6.94 for 0.10, as in section 3.1."""
    assert averages.power_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert averages.power_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.15, 0.28])
def test_sigma_rel_is_the_width_of_the_weights(sigma_rel: float) -> None:
    gamma = averages.power_of(sigma_rel)
    steps = 20_000
    weights = recursion(np.eye(1), gamma, 1)  # the average of one step is that step
    assert weights == 1
    s = np.arange(1, steps + 1)
    decay = (1 - 1 / s) ** (gamma + 1)
    weights = (1 - decay) * np.append(np.cumprod(decay[:0:-1])[::-1], 1)
    place = (s - 0.5) / steps
    assert weights.sum() == pytest.approx(1)
    mean = np.sum(weights * place)
    deviation = np.sqrt(np.sum(weights * (place - mean) ** 2))
    assert deviation == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("step", [0, 1, 9, 1000, 1_000_000])
def test_the_power_profile_is_precise_in_float32(step: int) -> None:
    rate = averages.power(0.05).rate(jnp.int32(step))
    exact = 1 - (1 - np.longdouble(1) / (step + 1)) ** (averages.power_of(0.05) + 1)
    assert float(rate) == pytest.approx(float(exact), rel=1e-6)


def test_snapshots_are_regular_and_end_with_the_run() -> None:
    assert averages.snapshot_steps(100, 4) == {25, 50, 75, 100}
    assert averages.snapshot_steps(10, 4) == {3, 5, 8, 10}
    assert averages.snapshot_steps(3, 8) == {1, 2, 3}
    assert averages.snapshot_steps(100, 0) == set()


def test_profiles_are_projected_as_the_integrals_say() -> None:
    """Solve least squares by numerical integration, then normalise the sum to 1."""
    found = combine([Profile(60, 0.1), Profile(90, 0.05)], Profile(90, 0.2))
    t = (np.arange(900_000) + 0.5) / 10_000

    def profile(step: int, sigma_rel: float) -> np.ndarray:
        gamma = averages.power_of(sigma_rel)
        return np.where(t < step, (gamma + 1) * (t / step) ** gamma / step, 0)

    parts, aim = np.stack([profile(60, 0.1), profile(90, 0.05)], 1), profile(90, 0.2)
    expected = np.linalg.lstsq(parts, aim, rcond=None)[0]
    expected /= expected.sum()
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-4)
    left = np.sum((parts @ expected - aim) ** 2) / np.sum(aim**2)
    assert found.error == pytest.approx(np.sqrt(left), rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.15, 0.25])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_weight_that_never_changes_keeps_its_value(count: int, sigma_rel: float) -> None:
    profiles = [Profile(100 * k, width) for k in range(1, count + 1) for width in SIGMA_RELS]
    found = combine(profiles, Profile(100 * count, sigma_rel))
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_average_is_itself() -> None:
    profiles = [Profile(step, width) for step in (50, 100) for width in SIGMA_RELS]
    for index, profile in enumerate(profiles[2:], 2):
        found = combine(profiles, profile)
        np.testing.assert_allclose(found.coefficients, np.eye(4)[index], atol=1e-9)
        assert found.error < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.22])
def test_other_averages_are_made_of_float32_snapshots(sigma_rel: float) -> None:
    """Average weights that drift, turn and shake, directly in float64 and afterwards."""
    steps = 3000
    t = np.arange(1, steps + 1)[:, None] / steps
    rng = np.random.default_rng(0)
    values = np.exp(-3 * t) + np.sin(t * [2, 7, 15, 30]) + 0.3 * rng.standard_normal((steps, 4))
    profiles = [
        Profile(step, width)
        for step in sorted(averages.snapshot_steps(steps, 24))
        for width in SIGMA_RELS
    ]
    stored = np.float32(
        [recursion(values, averages.power_of(p.sigma_rel), p.step) for p in profiles]
    )
    found = combine(profiles, Profile(steps, sigma_rel))
    made = found.coefficients @ stored.astype(np.float64)
    direct = recursion(values, averages.power_of(sigma_rel), steps)
    others = stored[-2:].astype(np.float64)
    assert np.abs(made - direct).max() < 1e-2
    assert np.abs(others - direct).max() > 5 * np.abs(made - direct).max()


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, float("nan")])
def test_widths_that_cannot_be_are_named(sigma_rel: float) -> None:
    with pytest.raises(InputError, match=rf"^sigma_rel={sigma_rel}: it must be above 0 and below"):
        combine([Profile(10, 0.1)], Profile(10, sigma_rel))
