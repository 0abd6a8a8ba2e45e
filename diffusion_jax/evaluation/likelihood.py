"""The likelihood of images in bits per dimension: by the probability flow, or a bound on it.

Both use the prior N(0, alpha_T^2 + sigma_T^2) at the noisiest level that has a signal. Pixels in
0..255 are bins of width 2 / 255 around values in -1 .. 1.

- flow: Song et al. 2021, arXiv:2011.13456, eq. 39 and 40. Noise that is uniform over a pixel's bin
  dequantises it, so the mean is an upper bound for whole pixels (Theis et al. 2016,
  arXiv:1511.01844). The flow ends at the first level of the schedule.
- bound: Ho et al. 2020, arXiv:2006.11239, eq. 5, with the variances of the forward posterior
  (section 3.2) and the discretised decoder of eq. 13, whose variance is beta_1.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Key, UInt8

from diffusion_jax.diffusion.guidance import Model, network_denoiser
from diffusion_jax.diffusion.predictions import Parameterization
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.networks import Network
from diffusion_jax.parallel import data_parallel
from diffusion_jax.samplers import row_noise, sample_keys
from diffusion_jax.spec import choose
from diffusion_jax.typing import Denoiser, Images, Level, import_extra, require

BIN = 2 / 255  # the width of a grey level's bin
FINE = 20_000  # levels between which log(alpha) is interpolated
TOLERANCE = 1e-4  # relative and absolute tolerance of the flow's adaptive steps
MOST = 4096  # the most steps of the flow
DEQUANTISE, PROBE, FORWARD = (np.uint32(2**32 - k) for k in (2, 3, 4))  # streams of noise

Bits = Float[Array, " batch"]


class Curve(NamedTuple):
    """A schedule as tabulated functions of s = log(sigma / alpha), in float32 on the device.

    It holds the whole levels (T,) from the first one, and alpha on a grid of FINE points.
    """

    s: Any
    t: Any
    fine: Any
    log_alpha: Any

    def level(self, s: Float[Array, ""]) -> Level:
        """Return the level at s. t is linear in s between whole levels, as in the schedule."""
        alpha = jnp.exp(jnp.interp(s, self.fine, self.log_alpha))
        return Level(jnp.interp(s, self.s, self.t), alpha, alpha * jnp.exp(s))


def curve_of(schedule: NoiseSchedule) -> Curve:
    """Return a schedule's curve, from its first level to the last one that has a signal."""
    ratio = schedule.ratio[1:]
    s = np.log(ratio[np.isfinite(ratio)])
    fine = np.linspace(s[0], s[-1], FINE)
    log_alpha = np.log(schedule.alpha_at(np.exp(fine)))
    columns = (s, np.arange(1, len(s) + 1), fine, log_alpha)
    return Curve(*(np.asarray(column, np.float32) for column in columns))


def flow(
    denoise: Denoiser, curve: Curve, y: Images, probes: Float[Array, "K batch height width channel"]
) -> Bits:
    """Return -log2 of the density at images y, per dimension, by the probability flow ODE.

    In y = x / alpha the flow is dy/ds = r eps with r = sigma / alpha = e^s. The log-density falls
    by the trace of its Jacobian. The integrated state is y / sqrt(1 + r^2), of about unit size.
    probes: vectors v whose mean v.Jv estimates the trace (Hutchinson). Entries are independent with
    mean 0 and variance 1; scaled unit vectors give the exact trace.
    The result is NaN where MOST steps do not suffice.
    """
    solver = import_extra("diffrax", "likelihood")
    curve, size = Curve(*map(jnp.asarray, curve)), y[0].size

    def slope(s: Array, state: tuple[Images, Array], _: Any) -> tuple[Images, Array]:
        level, r = curve.level(s), jnp.exp(s)
        scale = jnp.sqrt(1 + r**2)

        def eps(state: Images) -> Images:
            return denoise(level.alpha * scale * state, level).eps

        value, pull = jax.vjp(eps, state[0])  # the networks' convolutions have no jvp
        trace = lax.map(lambda v: (v * pull(v)[0]).sum((1, 2, 3)), probes).mean(0)
        return r / scale * value - r**2 / scale**2 * state[0], r / scale * trace

    first, last = curve.s[0], curve.s[-1]
    found = solver.diffeqsolve(
        solver.ODETerm(slope),
        solver.Dopri5(),
        first,
        last,
        None,
        (y / jnp.sqrt(1 + jnp.exp(2 * first)), jnp.zeros(len(y))),
        stepsize_controller=solver.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        max_steps=MOST,
        throw=False,
    )
    solved = found.result == solver.RESULTS.successful
    states, grown = (jnp.where(solved, leaf[-1], jnp.nan) for leaf in found.ys)
    # N(0, 1) for the state, which is N(0, 1 + r^2) for y.
    prior = -jnp.square(states).sum((1, 2, 3)) - size * jnp.log(2 * np.pi * (1 + jnp.exp(2 * last)))
    return -(prior / 2 + grown) / (size * np.log(2))


class Chain(NamedTuple):
    """The levels 1 .. T of a schedule, and the weight of each in the bound: float32, (T,).

    weight: (alpha_j^2 / sigma_j^2 - alpha_i^2 / sigma_i^2) / 2 for the step i -> j = i - 1. It is 0
    at level 1, where the decoder replaces the step; its standard deviation is sigma_1.
    """

    level: Level
    weight: Any


def chain_of(schedule: NoiseSchedule) -> Chain:
    """Return a schedule's chain, from its first level to the last one that has a signal."""
    kept = np.isfinite(schedule.ratio[1:])
    alpha, sigma = schedule.alpha[1:][kept], schedule.sigma[1:][kept]
    snr = np.square(alpha / sigma)
    chain = Chain(
        Level(np.arange(1, len(alpha) + 1), alpha, sigma), -np.diff(snr, prepend=snr[0]) / 2
    )
    return jax.tree.map(np.float32, chain)


def bound(denoise: Denoiser, chain: Chain, x0: Images, keys: Key[Array, " batch"]) -> Bits:
    """Return the variational bound of -log2 of the probability of images in whole grey levels.

    Each of the T steps draws its own noise, as its level's row does. The Kullback-Leibler
    divergence of two Gaussians with equal variance is weight |x0 - predicted x0|^2 (Kingma et al.
    2021, arXiv:2107.00630, the loss for T steps).
    """
    levels, weights = jax.tree.map(jnp.asarray, chain)

    def step(nats: Array, row: tuple) -> tuple[Array, None]:
        number, level, weight = row
        noise = row_noise(keys, FORWARD - number, x0.shape[1:])
        predicted = denoise(level.alpha * x0 + level.sigma * noise, level).x0
        decoded = -log_bin(x0, predicted, levels.sigma[0])
        gaussian = weight * jnp.square(x0 - predicted)
        return nats + jnp.where(number == 0, decoded, gaussian).sum((1, 2, 3)), None

    rows = jnp.arange(len(weights), dtype=jnp.uint32), levels, weights
    nats, _ = lax.scan(step, jnp.zeros(len(x0)), rows)
    alpha, sigma = levels.alpha[-1], levels.sigma[-1]
    total = alpha**2 + sigma**2  # the prior's variance
    last = (sigma**2 + jnp.square(alpha * x0)) / total - 1 - jnp.log(sigma**2 / total)
    return (nats + last.sum((1, 2, 3)) / 2) / (x0[0].size * np.log(2))


def log_bin(x: Images, mean: Images, deviation: Float[Array, ""]) -> Images:
    """Return a Gaussian's log-probability of the bins around x. The outermost bins are open."""
    low = jnp.where(x <= -1 + BIN / 2, -jnp.inf, (x - BIN / 2 - mean) / deviation)
    high = jnp.where(x >= 1 - BIN / 2, jnp.inf, (x + BIN / 2 - mean) / deviation)
    # The difference of two values near 1 loses precision: take the other tail, near 0.
    swap = low + high > 0
    low, high = jnp.where(swap, -high, low), jnp.where(swap, -low, high)
    log_high = log_ndtr(high)
    return log_high + jnp.log1p(-jnp.exp(jnp.minimum(log_ndtr(low) - log_high, -1e-7)))


def _flow_of_pixels(
    denoise: Denoiser, curve: Curve, x0: Images, keys: Key[Array, " batch"], probes: int | None
) -> Bits:
    """Dequantise whole grey levels, and return the flow's bits."""
    uniform = partial(jax.random.uniform, shape=x0.shape[1:])
    shifts = draw_for_each(keys, DEQUANTISE, uniform) - 0.5
    directions = rademacher(keys, x0.shape[1:], probes) if probes else units(x0)
    return flow(denoise, curve, x0 + BIN * shifts, directions) - np.log2(BIN)


WAYS: dict[str, tuple[Callable, Callable]] = {  # what prepares a schedule, and the bits of images
    "flow": (curve_of, _flow_of_pixels),
    "bound": (chain_of, lambda denoise, chain, x0, keys, _: bound(denoise, chain, x0, keys)),
}


def bits_per_dim(
    model: Model,
    images: UInt8[np.ndarray, "n height width channel"],
    context: Float[np.ndarray, "n feature"] | None,
    devices: Sequence[jax.Device],
    *,
    by: str,
    probes: int | None = 1,
    seed: int = 0,
    chunk: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Float[np.ndarray, " n"]:
    """Return the bits per dimension of each image, given its context.

    by: "flow" or "bound". probes: the number of Rademacher vectors for the trace of the flow; None
    takes the exact trace, one product for each dimension. chunk: images on a device at once.
    progress: called after each chunk with its number of images.
    Raise InputError if an option is invalid, or if the flow is asked for and diffrax is missing.
    """
    table_of, _ = choose(WAYS, "by", by)
    require(probes is None or probes >= 1, f"probes={probes}: it must be at least 1, or None")
    require(len(images) >= 1 and chunk >= 1, "give at least one image, and a chunk of at least one")
    if by == "flow":
        import_extra("diffrax", "likelihood")
    if context is None:
        context = np.zeros((len(images), model.network.n_cfeat), np.float32)
    run = _compiled(
        model.network, model.prediction, model.schedule.steps, by, probes, tuple(devices)
    )
    ids = np.arange(len(images), dtype=np.uint32)
    shared = (model.variables, table_of(model.schedule), np.uint32(seed))
    return map_rows(run, shared, (images, context, ids), devices, chunk, progress)


@lru_cache
def _compiled(
    network: Network,
    prediction: Parameterization,
    timesteps: int,
    by: str,
    probes: int | None,
    devices: tuple[jax.Device, ...],
) -> Any:
    def on_one_device(shared: Any, rows: Any) -> Bits:
        (variables, table, seed), (pixels, context, ids) = shared, rows
        folded, variables = network.for_sampling(variables)
        apply = partial(folded.apply, variables)
        denoise = network_denoiser(apply, prediction, timesteps, context)
        x0 = pixels.astype(jnp.float32) / 127.5 - 1
        return WAYS[by][1](denoise, table, x0, sample_keys(jax.random.key(seed), ids), probes)

    return data_parallel(on_one_device, (None, 0), 0, devices=devices)


def draw_for_each(keys: Key[Array, " batch"], stream: np.uint32, draw: Callable) -> Array:
    """Return one draw for each key, from the key's own stream of this number."""
    return jax.vmap(lambda key: draw(jax.random.fold_in(key, stream)))(keys)


def rademacher(keys: Key[Array, " batch"], shape: tuple[int, ...], count: int) -> Array:
    """Return count arrays of random signs for each image: (count, batch, *shape)."""
    draw = partial(jax.random.rademacher, shape=(count, *shape), dtype=jnp.float32)
    return draw_for_each(keys, PROBE, draw).swapaxes(0, 1)


def units(x0: Images) -> Array:
    """Return the unit vectors, scaled so that the mean of v.Jv over them is the trace."""
    size = x0[0].size
    vectors = jnp.eye(size) * np.float32(np.sqrt(size))
    return jnp.broadcast_to(vectors.reshape(size, 1, *x0.shape[1:]), (size, *x0.shape))
