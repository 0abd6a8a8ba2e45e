"""Test the wrappers of a network, guidance and thresholds, against NumPy formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.guidance import (
    THRESHOLDS,
    Guidance,
    changed,
    check_guidance,
    known,
    network_denoiser,
)
from diffusion_jax.diffusion.predictions import PREDICTIONS
from diffusion_jax.typing import InputError, Level, Prediction

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 4, 2)).astype(np.float32)
CONTEXT = RNG.normal(size=(3, 2)).astype(np.float32)
LEVEL = Level(jnp.float32(30.0), jnp.float32(0.8), jnp.float32(0.6))


def network(x, t, context):
    """Compute a function of all arguments that is not linear in the context."""
    return jnp.tanh(x) * t + jnp.exp(context).sum(1)[:, None, None, None]


def other(x, t, context):
    return jnp.sin(x) + context.sum(1)[:, None, None, None]


def outputs(scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the outputs with context, without it, and guided, in float64."""
    tanh = np.tanh(X.astype(np.float64)) * 0.3
    good = tanh + np.exp(CONTEXT.astype(np.float64)).sum(1)[:, None, None, None]
    bad = tanh + 2
    return good, bad, bad + scale * (good - bad)


def predict(guidance: Guidance | None, guide_model=None, level: Level = LEVEL) -> Prediction:
    made = None if guidance is None else Guidance(*map(jnp.float32, guidance))
    denoise = network_denoiser(
        network, PREDICTIONS["eps"](), 100, jnp.asarray(CONTEXT), made, guide_model
    )
    return denoise(jnp.asarray(X), level)


def test_guidance_is_the_papers_mixture() -> None:
    good, bad, mixed = outputs(2.5)
    assert np.allclose(predict(Guidance(2.5)).eps, mixed, atol=1e-5)
    assert np.allclose(predict(Guidance(0.0)).eps, bad, atol=1e-5)
    assert np.allclose(predict(None).eps, good, atol=1e-5)
    assert np.allclose(predict(Guidance(2.5)).x0, (X - 0.6 * mixed) / 0.8, atol=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "inside"),
    [(0.0, 0.74, False), (0.0, 0.76, True), (0.76, 9.0, False), (0.74, np.inf, True)],
)
def test_the_interval_is_of_sigma_over_alpha(low: float, high: float, inside: bool) -> None:
    """Expect neither guidance nor rescaling outside the interval. Here sigma / alpha is 0.75."""
    good, _, mixed = outputs(3.0)
    got = predict(Guidance(3.0, low, high)).eps
    assert np.allclose(got, mixed if inside else good, atol=1e-5)
    plus = predict(Guidance(0.5, low, high, 0.7, 1.0))
    if not inside:
        assert np.allclose(plus.eps, good, atol=1e-5)


def test_pure_noise_is_inside_an_unbounded_interval_only() -> None:
    level = Level(jnp.float32(100.0), jnp.float32(0.0), jnp.float32(1.0))
    denoise = [
        network_denoiser(
            network,
            PREDICTIONS["x0"](),
            100,
            jnp.asarray(CONTEXT),
            Guidance(*map(jnp.float32, (3.0, 0.1, high))),
        )(jnp.asarray(X), level).x0
        for high in (np.inf, 5.0, 1e30)
    ]
    assert np.abs(denoise[0] - denoise[1]).max() > 0.1
    assert np.array_equal(denoise[1], denoise[2])


def test_rescaling_brings_the_deviation_back() -> None:
    good, _, mixed = outputs(4.0)
    spread = [part.std(axis=(1, 2, 3), keepdims=True) for part in (good, mixed)]
    wanted = 0.7 * mixed * spread[0] / spread[1] + 0.3 * mixed
    assert np.allclose(predict(Guidance(4.0, rescale=0.7)).eps, wanted, atol=1e-5)


def test_cfg_plus_plus_takes_the_noise_without_context() -> None:
    """Take one DDIM step of arXiv:2406.08070, algorithm 2."""
    _, bad, mixed = outputs(0.6)
    x0, eps = predict(Guidance(0.6, renoise_bad=1.0))
    step = 0.9 * np.asarray(x0) + 0.4 * np.asarray(eps)
    assert np.allclose(step, 0.9 * (X - 0.6 * mixed) / 0.8 + 0.4 * bad, atol=1e-5)


def test_autoguidance_moves_away_from_the_worse_network() -> None:
    good, _, _ = outputs(1.0)
    bad = np.sin(X) + CONTEXT.sum(1)[:, None, None, None]
    got = predict(Guidance(2.0), guide_model=other).eps
    assert np.allclose(got, bad + 2 * (good - bad), atol=1e-5)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_changed_predictions_still_add_up(name: str) -> None:
    scaled = jnp.asarray(3 * X)
    denoise = changed(lambda x, level: Prediction(x, 0.5 * x), THRESHOLDS[name])
    x0, eps = denoise(scaled, LEVEL)
    assert np.allclose(0.8 * x0 + 0.6 * eps, (0.8 + 0.3) * scaled, atol=1e-5)
    assert (np.abs(x0).max() <= 1) == (name != "none")


def test_thresholds_by_hand() -> None:
    x = np.concatenate([4 * X[:1], 0.1 * X[1:2]])
    assert np.allclose(THRESHOLDS["clip"](jnp.asarray(x)), np.clip(x, -1, 1))
    bound = max(1.0, np.percentile(np.abs(x[0]), 99.5))
    wanted = np.stack([np.clip(x[0], -bound, bound) / bound, x[1]])
    assert np.allclose(THRESHOLDS["dynamic"](jnp.asarray(x)), wanted, atol=1e-6)


def test_known_pixels_replace_predictions() -> None:
    mask = jnp.zeros((3, 4, 4, 1)).at[:, :2].set(1.0)
    changed_to = known(jnp.asarray(X), mask)(jnp.ones_like(jnp.asarray(X)))
    assert np.array_equal(changed_to[:, :2], X[:, :2])
    assert np.all(changed_to[:, 2:] == 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Guidance(float("nan")), "scale=nan: it must be finite"),
        (Guidance(2.0, 3.0, 1.0), "low=3.0, high=1.0: they must obey 0 <= low < high"),
        (Guidance(2.0, float("nan"), 1.0), "low=nan, high=1.0: they must obey"),
        (Guidance(2.0, rescale=1.5), r"rescale=1.5: it must be in \[0, 1\]"),
        (Guidance(2.0, renoise_bad=1.0), r"scale=2.0: for CFG\+\+ it must be in \[0, 1\]"),
        (Guidance(0.5, renoise_bad=0.5), "renoise_bad=0.5: it must be 0 or 1"),
    ],
)
def test_guidance_that_cannot_be(wrong: Guidance, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_guidance(wrong)
