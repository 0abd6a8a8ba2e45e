"""Compare bits per dimension with closed forms of Gaussian data, in float64 NumPy."""

import sys
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import evaluation
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.evaluation import likelihood
from diffusion_jax.networks import Network
from diffusion_jax.samplers import row_noise, sample_keys
from diffusion_jax.typing import InputError, Level, Prediction

SHAPE = (4, 4, 1)  # 16 dimensions
DEVICES = jax.devices()[:2]
SCHEDULES = {name: schedules.SCHEDULES[name](200) for name in ("course", "cosine", "karras")}
flow_of = jax.jit(likelihood.flow, static_argnums=0)  # one program for all schedules


def covariance(correlated: bool) -> np.ndarray:
    """Return a covariance of pixels whose standard deviations are 0.2 to 0.4."""
    rng = np.random.default_rng(0)
    if not correlated:
        return np.diag(rng.uniform(0.04, 0.16, 16))
    root = rng.normal(size=(16, 16)) * 0.08
    return root @ root.T + 0.01 * np.eye(16)


@cache
def exact_denoiser(mean: float, correlated: bool):
    """Return E[x0 | x] = m + a C (a^2 C + s^2)^-1 (x - a m), in the eigenbasis of C."""
    parts = np.linalg.eigh(covariance(correlated))
    values, vectors = (jnp.asarray(part, jnp.float32) for part in parts)

    def denoise(x, level: Level) -> Prediction:
        gap = (x - level.alpha * mean).reshape(len(x), -1) @ vectors
        gain = level.alpha * values / (level.alpha**2 * values + level.sigma**2)
        x0 = mean + ((gap * gain) @ vectors.T).reshape(x.shape)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    return denoise


def pixels_of(mean: float, cov: np.ndarray, n: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = mean + rng.normal(size=(n, 16)) @ np.linalg.cholesky(cov).T
    return np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8).reshape(n, *SHAPE)


def flow_in_closed_form(schedule: NoiseSchedule, mean: float, cov, y: np.ndarray) -> np.ndarray:
    """Return the flow's bits in closed form.

    The flow is affine. From r to r' it scales y - m by ((v + r'^2) / (v + r^2))^1/2 along each
    axis of variance v. The prior gives the density there.
    """
    values, vectors = np.linalg.eigh(cov)
    low, high = schedule.ratio[1], schedule.ratio[np.isfinite(schedule.ratio)][-1]
    last = np.flatnonzero(np.isfinite(schedule.ratio))[-1]
    prior = np.hypot(schedule.alpha[last], schedule.sigma[last]) / schedule.alpha[last]
    stretch = np.sqrt((values + high**2) / (values + low**2))
    end = mean + (((y.reshape(len(y), -1) - mean) @ vectors) * stretch) @ vectors.T
    logs = stats.norm.logpdf(end, scale=prior).sum(1) + np.log(stretch).sum()
    return -logs / (16 * np.log(2))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("correlated", [False, True])
def test_the_flow_s_density_is_the_closed_form(name: str, correlated: bool) -> None:
    """Use the exact trace for correlated pixels, and one probe for independent ones.

    For independent pixels, one probe is exact too.
    """
    cov, mean, schedule = covariance(correlated), 0.1, SCHEDULES[name]
    y = pixels_of(mean, cov, 6).astype(np.float32) / 127.5 - 1
    keys = sample_keys(jax.random.key(0), jnp.arange(6, dtype=jnp.uint32))
    probes = (
        likelihood.units(jnp.asarray(y)) if correlated else likelihood.rademacher(keys, SHAPE, 1)
    )
    curve = likelihood.curve_of(schedule)
    found = flow_of(exact_denoiser(mean, correlated), curve, y, probes)
    want = flow_in_closed_form(schedule, mean, cov, y.astype(np.float64))
    np.testing.assert_allclose(found, want, atol=3e-3)


def test_probes_estimate_the_trace_without_bias() -> None:
    cov, mean, n = covariance(True), 0.0, 400
    y = np.repeat(pixels_of(mean, cov, 1).astype(np.float32) / 127.5 - 1, n, 0)
    keys = sample_keys(jax.random.key(3), jnp.arange(n, dtype=jnp.uint32))
    curve = likelihood.curve_of(SCHEDULES["cosine"])
    probes = likelihood.rademacher(keys, SHAPE, 1)
    found = np.asarray(flow_of(exact_denoiser(mean, True), curve, y, probes))
    want = flow_in_closed_form(SCHEDULES["cosine"], mean, cov, y[:1].astype(np.float64))[0]
    assert found.std() > 1e-2
    assert abs(found.mean() - want) < 4 * found.std() / np.sqrt(n) + 2e-3


def naive_bound(schedule: NoiseSchedule, mean: float, cov, pixels, keys) -> np.ndarray:
    """Compute Ho et al., eq. 5, from the posteriors' means and variances, in float64."""
    x0 = pixels.astype(np.float64) / 127.5 - 1
    flat = x0.reshape(len(x0), -1)
    streams = likelihood.FORWARD - jnp.arange(schedule.steps, dtype=jnp.uint32)
    noises = jax.vmap(lambda stream: row_noise(keys, stream, SHAPE))(streams)
    noises = np.asarray(noises).reshape(schedule.steps, *flat.shape)
    nats = np.zeros(len(x0))
    for i in range(1, schedule.steps + 1):
        noise = noises[i - 1].astype(np.float64)
        a, s, b, r = (v[k] for k in (i, i - 1) for v in (schedule.alpha, schedule.sigma))
        x = a * flat + s * noise
        inverse = np.linalg.inv(a**2 * cov + s**2 * np.eye(16))
        predicted = mean + a * (x - a * mean) @ inverse @ cov
        if i == 1:
            edges = [(np.rint((flat + 1) * 127.5) + side) / 127.5 - 1 for side in (-0.5, 0.5)]
            edges = [np.where(flat <= -1, -np.inf, edges[0]), np.where(flat >= 1, np.inf, edges[1])]
            high, low = (stats.norm.cdf(edge, predicted, s) for edge in edges[::-1])
            nats -= np.log(high - low).sum(1)
            continue
        step = s**2 - (a / b) ** 2 * r**2  # the variance that the forward step adds
        means = [(a / b) * r**2 / s**2 * x + b * step / s**2 * v for v in (flat, predicted)]
        nats += ((means[0] - means[1]) ** 2).sum(1) / (2 * step * r**2 / s**2)
    a, s = schedule.alpha[-1], schedule.sigma[-1]
    total = a**2 + s**2
    nats += 0.5 * (s**2 / total + (a * flat) ** 2 / total - 1 + np.log(total / s**2)).sum(1)
    return nats / (16 * np.log(2))


@pytest.mark.parametrize("name", ["course", "karras"])
def test_the_bound_is_that_of_numpy(name: str) -> None:
    cov, mean = covariance(True), 0.1
    pixels = pixels_of(mean, cov, 5)
    pixels[0, 0, :2] = [[0], [255]]  # the bins of these two pixels are open
    keys = sample_keys(jax.random.key(5), jnp.arange(5, dtype=jnp.uint32))
    chain, denoise = likelihood.chain_of(SCHEDULES[name]), exact_denoiser(mean, True)
    x0 = pixels.astype(np.float32) / 127.5 - 1
    found = jax.jit(lambda x0, keys: likelihood.bound(denoise, chain, x0, keys))(x0, keys)
    want = naive_bound(SCHEDULES[name], mean, cov, pixels, keys)
    assert np.all(np.isfinite(want))
    np.testing.assert_allclose(found, want, rtol=2e-4)


def gap_in_closed_form(schedule: NoiseSchedule, variances: np.ndarray) -> float:
    """Return the divergence of the model's reverse steps from the true ones, of larger variance."""
    total = schedule.alpha[:, None] ** 2 * variances + schedule.sigma[:, None] ** 2
    kept = (schedule.alpha[1:] / schedule.alpha[:-1])[1:, None]
    true = total[1:-1] - (kept * total[1:-1]) ** 2 / total[2:]
    low, high = schedule.sigma[1:-1, None] ** 2, schedule.sigma[2:, None] ** 2
    ours = (high - kept**2 * low) * low / high
    return (true / ours - 1 - np.log(true / ours)).sum(0).mean() / 2 / np.log(2)


def test_the_bound_is_above_the_entropy_by_what_its_variances_lack() -> None:
    """Use independent pixels, whose grey levels have a known distribution."""
    cov, mean, n = covariance(False), 0.0, 2000
    pixels = pixels_of(mean, cov, n)
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    parts = np.diff(stats.norm.cdf(edges, scale=np.sqrt(np.diag(cov))[:, None]), axis=1)
    levels = pixels.reshape(n, 16)
    exact = -np.log2(np.take_along_axis(parts, levels.T.astype(int), 1)).mean(0)
    keys = sample_keys(jax.random.key(5), jnp.arange(n, dtype=jnp.uint32))
    schedule = SCHEDULES["course"]
    found = jax.jit(
        lambda x0, keys: likelihood.bound(
            exact_denoiser(mean, False), likelihood.chain_of(schedule), x0, keys
        )
    )(pixels.astype(np.float32) / 127.5 - 1, keys)
    gap = np.asarray(found, np.float64) - exact
    want = gap_in_closed_form(schedule, np.diag(cov))
    assert want > 0.2  # bits, mostly from the first steps
    assert abs(gap.mean() - want) < 4 * gap.std() / np.sqrt(n)


@pytest.mark.parametrize("z", [-40.0, -6.0, 0.0, 3.0, 12.0, 40.0])
def test_the_decoder_far_out_in_the_tails(z: float) -> None:
    mean, deviation = 0.1, 0.01
    x = np.float32(np.rint((mean + z * deviation + 1) * 127.5) / 127.5 - 1)
    found = likelihood.log_bin(
        jnp.full((1, 1, 1, 1), x), jnp.full((1, 1, 1, 1), mean), jnp.float32(deviation)
    )
    low, high = ((float(x) + side / 255 - mean) / deviation for side in (-1, 1))
    if low > 0:
        low, high = -high, -low
    want = stats.norm.logcdf(high) + np.log1p(
        -np.exp(stats.norm.logcdf(low) - stats.norm.logcdf(high))
    )
    assert float(found[0, 0, 0, 0]) == pytest.approx(want, rel=2e-3, abs=1e-5)


class Linear(Network):
    """A network that compiles fast."""

    image_shape: tuple[int, int, int] = SHAPE
    n_cfeat: int = 3

    @nn.compact
    def __call__(self, x, t, context):
        """Take the arguments of a network of the library."""
        rows = jnp.concatenate([x.reshape(len(x), -1), context], 1)
        return (1 - t) * nn.Dense(16)(rows).reshape(x.shape)


@pytest.mark.parametrize("by", ["flow", "bound"])
def test_an_image_s_bits_do_not_depend_on_its_chunk_nor_on_the_devices(model, by: str) -> None:
    """Expect also that the bits depend on the image's context."""
    x, context = jnp.zeros((1, *SHAPE)), np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    variables = Linear().init(jax.random.key(0), x, 0.0, context[:1])
    model = model._replace(network=Linear(), variables=variables)
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
    told: list[int] = []
    whole = evaluation.bits_per_dim(model, images, context, DEVICES[:1], by=by, chunk=5)
    parts = evaluation.bits_per_dim(
        model, images, context, DEVICES, by=by, chunk=1, progress=told.append
    )
    assert told == [2, 2, 1]
    np.testing.assert_allclose(parts, whole, rtol=2e-3)
    other = evaluation.bits_per_dim(model, images, -context, DEVICES[:1], by=by, chunk=5)
    assert np.all(abs(other - whole) > 3 * abs(parts - whole).max())


def test_the_flow_of_a_network_of_the_library(model) -> None:
    """Use a network whose convolutions define their own gradients."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    found = evaluation.bits_per_dim(model, images, None, DEVICES[:1], by="flow", chunk=2)
    assert np.all((found > 5) & (found < 50))


def test_options_that_are_refused(model, monkeypatch) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match="by='elbo' is unknown: choose from flow, bound"):
        evaluation.bits_per_dim(model, images, None, DEVICES, by="elbo")
    with pytest.raises(InputError, match="probes=0: it must be at least 1"):
        evaluation.bits_per_dim(model, images, None, DEVICES, by="flow", probes=0)
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(
        InputError, match=r"diffrax is not installed: pip install '\.\[likelihood\]'"
    ):
        evaluation.bits_per_dim(model, images, None, DEVICES, by="flow")
