"""In every prediction, decode and target are inverse to each other, also at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import predictions, schedules
from diffusion_jax.diffusion.predictions import PREDICTIONS
from diffusion_jax.typing import InputError, Level

PAIR = np.random.default_rng(0).standard_normal((2, 2, 3, 3, 1))
SCHEDULES = {
    "vp": schedules.linear(1000),
    "ve": schedules.karras(1000),
    "flow": schedules.flow(1000),
    "zero terminal snr": schedules.rescale_zero_terminal_snr(schedules.linear(1000)),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def pair() -> tuple[jax.Array, jax.Array]:
    """Return a clean image and a noise, or an image and an output."""
    return jnp.asarray(PAIR[0]), jnp.asarray(PAIR[1])


def level_of(schedule: schedules.NoiseSchedule, t: int) -> Level:
    return Level(float(t), float(schedule.alpha[t]), float(schedule.sigma[t]))


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 500, 999, 1000])
def test_decode_inverts_target(name: str, family: str, t: int, pair) -> None:
    """Allow for rounding of x, in which the larger of its two parts can hide the smaller one."""
    level = level_of(SCHEDULES[family], t)
    prediction = predictions.build(name)
    X0, EPS = pair
    if not predictions.fits(prediction, SCHEDULES[family]) and level.alpha == 0:
        pytest.skip("refused, see below")
    x = level.alpha * X0 + level.sigma * EPS
    x0, eps = prediction.decode(prediction.target(X0, EPS, level), x, level)
    size = 1 + np.abs(x).max()
    lost = {"eps": 1 / level.alpha if level.alpha else 0, "x0": 1 / level.sigma}
    lost["score"] = lost["eps"]
    tolerance = 1e-14 * size * max(1.0, lost.get(name, 1.0))
    assert np.allclose(x0, X0, rtol=0, atol=tolerance)
    assert np.allclose(eps, EPS, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("family", ["vp", "ve", "flow"])
def test_a_prediction_always_adds_up_to_x(name: str, family: str, pair) -> None:
    """Expect alpha x0 + sigma eps = x for any output, and the output from target."""
    level = level_of(SCHEDULES[family], 400)
    x, output = pair
    x0, eps = PREDICTIONS[name]().decode(output, x, level)
    assert np.allclose(level.alpha * x0 + level.sigma * eps, x, atol=1e-13)
    assert np.allclose(PREDICTIONS[name]().target(x0, eps, level), output, atol=1e-11)


def test_edm_is_the_papers_preconditioning(pair) -> None:
    """Expect Karras et al., table 1, for the unscaled x of variance-exploding schedules."""
    x, output = pair
    for sigma in (0.002, 0.5, 80.0):
        x0, _ = PREDICTIONS["edm"]().decode(output, x, Level(1.0, 1.0, sigma))
        c_skip = 0.25 / (sigma**2 + 0.25)
        c_out = sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
        assert np.allclose(x0, c_skip * x + c_out * output, rtol=1e-12, atol=1e-15)


def test_score_and_flow_by_their_definitions(pair) -> None:
    """Expect the gradient of log N(alpha x0, sigma^2), and dx/dt of a straight path."""
    X0, EPS = pair
    level = level_of(SCHEDULES["flow"], 300)
    x = level.alpha * X0 + level.sigma * EPS
    score = PREDICTIONS["score"]().target(X0, EPS, level)
    assert np.allclose(score, -(x - level.alpha * X0) / level.sigma**2, atol=1e-12)
    later = level_of(SCHEDULES["flow"], 301)
    velocity = (later.alpha * X0 + later.sigma * EPS - x) * 1000
    assert np.allclose(PREDICTIONS["flow"]().target(X0, EPS, level), velocity, atol=1e-11)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_noise_predictions_are_refused_where_there_is_no_signal(name: str) -> None:
    for family in ("vp", "ve"):
        predictions.check(PREDICTIONS[name](), SCHEDULES[family])
    for family in ("flow", "zero terminal snr"):
        if name in ("eps", "score"):
            with pytest.raises(InputError, match=r"ends in pure noise: .* choose from x0, v"):
                predictions.check(PREDICTIONS[name](), SCHEDULES[family])
        else:
            predictions.check(PREDICTIONS[name](), SCHEDULES[family])
