"""Compare weightings with the papers' formulas on every schedule, and test how levels are drawn."""

from statistics import NormalDist

import jax
import numpy as np
import pytest

from diffusion_jax.diffusion import losses, predictions, schedules
from diffusion_jax.diffusion.losses import TIMES, WEIGHTINGS
from diffusion_jax.diffusion.predictions import PREDICTIONS
from diffusion_jax.runs.config import Config
from diffusion_jax.typing import InputError, Level

FAMILIES = {
    "vp": schedules.linear(1000),
    "cosine": schedules.cosine(200),
    "ve": schedules.karras(1000),
    "flow": schedules.flow(100),
    "zero terminal snr": schedules.rescale_zero_terminal_snr(schedules.linear(1000)),
}
FITTING = [
    (family, name)
    for family, schedule in FAMILIES.items()
    for name, each in PREDICTIONS.items()
    if predictions.fits(each(), schedule)
]


def weights(weighting: str, prediction: str, schedule) -> np.ndarray:
    loss = losses.build(f"mse:weighting={weighting}")
    return loss.weights(predictions.build(prediction), schedule)


def snr(schedule) -> np.ndarray:
    """Return the SNR of the levels 1..T."""
    return schedule.alpha[1:] ** 2 / schedule.sigma[1:] ** 2


# -------------------------------------------------------------------------------- weightings


@pytest.mark.parametrize("gamma", [0, 1.5])
def test_min_snr_is_the_papers(gamma: float) -> None:
    """Expect Hang et al., section 3.4: min(SNR, gamma) for x0, / SNR for eps, / (SNR + 1) for v."""
    schedule = FAMILIES["vp"]
    ratio = snr(schedule)
    clipped = np.minimum(ratio, gamma or 5)
    for name, formula in {
        "x0": clipped,
        "eps": clipped / ratio,
        "v": clipped / (ratio + 1),
    }.items():
        table = weights(f"min_snr:gamma={gamma or 5}", name, schedule)
        np.testing.assert_allclose(table[1:], formula, rtol=1e-11)


@pytest.mark.parametrize("gamma", [0, 0.5])
def test_p2_is_the_papers(gamma: float) -> None:
    """Expect Choi et al., eq. 8, on the simple loss of eps: 1 / (k + SNR)^gamma with k = 1."""
    ratio = snr(FAMILIES["vp"])
    table = weights(f"p2:gamma={gamma or 1}", "eps", FAMILIES["vp"])
    np.testing.assert_allclose(table[1:], 1 / (1 + ratio) ** (gamma or 1), rtol=1e-11)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
@pytest.mark.parametrize("name", ["x0", "v", "flow"])
def test_pure_noise_weighs_one(weighting: str, name: str) -> None:
    """Expect 1, as in Min-SNR's code, although the formula gives its neighbours their SNR."""
    table = weights(weighting, name, schedules.flow(500))
    assert table[-1] == pytest.approx(1)
    of_x0 = weights(weighting, "x0", schedules.flow(500))
    assert of_x0[-3:-1] == pytest.approx(np.array([2 / 498, 1 / 499]) ** 2, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_edm_weighs_edms_own_output_by_one(family: str) -> None:
    """Expect Karras et al., section 5: lambda(sigma) = 1 / c_out(sigma)^2."""
    table = weights("edm", "edm", FAMILIES[family])
    np.testing.assert_allclose(table[1:], 1, rtol=1e-12)


def test_edm_is_the_papers_for_clean_images() -> None:
    sigma = FAMILIES["ve"].sigma[1:]
    table = weights("edm", "x0", FAMILIES["ve"])
    np.testing.assert_allclose(table[1:], (sigma**2 + 0.25) / (sigma * 0.5) ** 2, rtol=1e-12)


@pytest.mark.parametrize(("family", "name"), FITTING)
def test_simple_weighs_every_output_by_one(family: str, name: str) -> None:
    table = weights("simple", name, FAMILIES[family])
    np.testing.assert_array_equal(table, [0, *np.ones(FAMILIES[family].steps)])


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "simple"])
@pytest.mark.parametrize(("family", "name"), FITTING)
def test_a_weighting_says_the_same_of_every_parameterization(weighting, family, name) -> None:
    """Expect equal weights for an error of the output and for the error of x0 that it implies."""
    schedule = FAMILIES[family]
    ours = weights(weighting, name, schedule)
    of_x0 = weights(weighting, "x0", schedule)
    assert np.all(np.isfinite(ours.astype(np.float32)))
    assert ours[0] == 0
    assert np.all(ours[1:-1] > 0)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for t in (1, schedule.steps // 2, schedule.steps):
            level = Level(float(t), float(schedule.alpha[t]), float(schedule.sigma[t]))
            x, output = (jax.numpy.asarray(rng.normal(size=(1, 2, 2, 1))) for _ in range(2))
            decode = PREDICTIONS[name]().decode
            wrong = np.asarray(decode(output + 1.0, x, level).x0 - decode(output, x, level).x0)
            assert ours[t] == pytest.approx(of_x0[t] * np.mean(wrong**2), rel=1e-6, abs=1e-300)


def test_weights_that_float32_cannot_hold_are_refused() -> None:
    schedule = schedules.linear(500, beta_max=0.9)
    assert 0 < schedule.alpha[-1] < 1e-60
    with pytest.raises(InputError, match=r"are not finite in float32"):
        weights("edm", "eps", schedule)
    assert np.all(weights("edm", "v", schedule)[1:] > 0)
    with pytest.raises(InputError, match="are not finite in float32"):
        Config(schedule="linear:beta_max=0.9", loss="mse:weighting=edm")


# ----------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_lognormal_probabilities_are_masses_of_the_normal_distribution(family: str) -> None:
    """Compare with intervals of log(sigma / alpha) around the levels, from an independent table."""
    schedule = FAMILIES[family]
    table = losses.lognormal_probabilities(schedule)
    assert table[0] == 0
    assert np.all(table >= 0)
    assert table.sum() == pytest.approx(1, abs=1e-14)
    log_ratio = -0.5 * np.log(snr(schedule)[:-1])
    middle = (log_ratio[1:] + log_ratio[:-1]) / 2
    cdf = [NormalDist(-1.2, 1.2).cdf(each) for each in middle]
    np.testing.assert_allclose(np.cumsum(table)[1:-2], cdf, atol=1e-14)


def test_lognormal_draws_are_as_frequent_as_the_table_says() -> None:
    schedule = schedules.karras(12)
    probability = losses.lognormal_probabilities(schedule)
    n = 200_000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = np.asarray(jax.jit(jax.vmap(TIMES["lognormal"](schedule)))(keys))
    assert drawn.dtype == np.int32
    counts = np.bincount(drawn, minlength=13)
    assert len(counts) == 13
    assert np.all(np.abs(counts - n * probability) <= 5 * np.sqrt(n * probability) + 1)


@pytest.mark.parametrize("name", TIMES)
def test_draws_are_levels_of_the_schedule(name: str) -> None:
    for steps in (1, 2, 30):
        keys = jax.random.split(jax.random.key(1), 5000)
        drawn = np.asarray(jax.vmap(TIMES[name](schedules.flow(steps)))(keys))
        assert drawn.min() == 1
        assert drawn.max() <= steps


# -------------------------------------------------------------------------- the network's input


@pytest.mark.parametrize(("family", "name"), FITTING)
def test_the_network_sees_inputs_of_unit_size(family: str, name: str) -> None:
    """Expect c_in of Karras et al., table 1, for edm. Other inputs of unit size are unchanged."""
    schedule = FAMILIES[family]
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32))
    for t in (1, schedule.steps // 3, schedule.steps):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        level = Level(*(jax.numpy.float32(part) for part in (t, alpha, sigma)))
        seen = np.asarray(PREDICTIONS[name]().network_input(x, level))
        if name == "edm":
            scale = 1 / np.sqrt(sigma**2 + (0.5 * alpha) ** 2)
            np.testing.assert_allclose(seen, scale * x, rtol=1e-6)
        elif family == "ve":
            np.testing.assert_allclose(seen, x / np.hypot(1, sigma), rtol=1e-5)
        else:
            np.testing.assert_array_equal(seen, x)
