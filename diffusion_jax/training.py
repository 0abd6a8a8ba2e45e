"""Training: one step, written for one device; many steps in one dispatch, on all devices."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from diffusion_jax import optimizers
from diffusion_jax.config import Config
from diffusion_jax.data.batches import indices
from diffusion_jax.losses import NOISINGS, mean_squared_error
from diffusion_jax.optimizers import Length
from diffusion_jax.parallel import AXIS, data_parallel, replicate
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import init_variables
from diffusion_jax.typing import Context, Images, Level, Pixels, Variables

CHUNK = 128  # the most steps in one dispatch


class TrainState(NamedTuple):
    """All that changes in training. ema has the form of the network's variables."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    ema: Variables
    opt_state: Any


class Chunk(NamedTuple):
    """What came of some steps: the state after them, each one's loss, and the seconds they took."""

    state: TrainState
    losses: Float[np.ndarray, "steps"]
    seconds: float


def init(config: Config, length: Length) -> TrainState:
    """The state before the first step, a function of the configuration's seed."""
    variables = init_variables(config.network.build(), config.training.seed)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    opt_state = _optimizer(config, length).init(params)
    # The average starts as a copy: the state is donated, and no buffer can be given twice.
    ema = jax.tree.map(jnp.copy, _variables(params, batch_stats))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, ema, opt_state)


def train_step(config: Config, length: Length) -> Callable:
    """The step (state, pixels, context, positions, key) -> (state, loss), for one device.

    It must run under the mapped axis parallel.AXIS: gradients, batch statistics and the loss are
    means over it. positions number the images of the whole batch, so that the noise of an image
    does not depend on the device that it is on.
    """
    dtype = config.training.dtype
    network = computing_in(config.network.build(axis_name=AXIS), dtype)
    target = PARAMETERIZATIONS[config.diffusion.parameterization].target
    noising = NOISINGS[config.diffusion.noising]
    optimizer = _optimizer(config, length)
    timesteps = config.diffusion.timesteps
    schedule = config.diffusion.build()
    alpha, sigma = (jnp.asarray(table, jnp.float32) for table in schedule[:2])

    def loss_of(
        params: Any, batch_stats: Any, x0: Images, context: Context, keys: Key[Array, "batch"]
    ) -> tuple[Array, Any]:
        t, eps, kept = jax.vmap(draw)(keys)
        level = Level(t, alpha[t], sigma[t])
        level = jax.tree.map(lambda part: part[:, None, None, None], level)
        output, updates = network.apply(
            _variables(params, batch_stats),
            noising(x0, eps, level),
            t.astype(jnp.float32) / timesteps,
            context * kept[:, None],
            train=True,
            mutable=["batch_stats"],
        )
        loss = mean_squared_error(output, target(x0, eps, level))
        return loss, updates.get("batch_stats", {})

    def draw(key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        for_t, for_eps, for_context = jax.random.split(key, 3)
        shape = (network.height, network.height, network.in_channels)
        kept = jax.random.bernoulli(for_context, config.training.keep_probability)
        return (
            jax.random.randint(for_t, (), 1, timesteps + 1),
            jax.random.normal(for_eps, shape),
            kept.astype(jnp.float32),
        )

    @products_in(dtype)
    def step(
        state: TrainState,
        pixels: Pixels,
        context: Context,
        positions: Int[Array, "batch"],
        key: Key[Array, ""],
    ) -> tuple[TrainState, Float[Array, ""]]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, state.step), positions
        )
        x0 = pixels.astype(jnp.float32) / 127.5 - 1
        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, x0, context, keys
        )
        loss, grads = lax.pmean((loss, grads), AXIS)
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = _ema_decay(config.training.ema_decay, state.step)
        ema = optax.incremental_update(_variables(params, batch_stats), state.ema, 1 - decay)
        return TrainState(state.step + 1, params, batch_stats, ema, opt_state), loss

    return step


def train_chunk(
    config: Config, length: Length, devices: Sequence[jax.Device], how: str
) -> Callable:
    """Compiled (state, images, labels, indices, count) -> (state, losses): count steps at once.

    images and labels are the whole data set, on every device; indices (device, CHUNK, part) say
    which of them each step takes. The state is donated.
    """
    step = train_step(config, length)

    def chunk(
        state: TrainState,
        images: UInt8[Array, "N height width channel"],
        labels: Float[Array, "N feature"],
        order: Int[Array, "CHUNK part"],
        count: Int[Array, ""],
    ) -> tuple[TrainState, Float[Array, "CHUNK"]]:
        part = order.shape[1]
        positions = lax.axis_index(AXIS) * part + jnp.arange(part)
        key = jax.random.key(config.training.seed)

        def body(i: Array, carry: tuple) -> tuple:
            state, losses = carry
            chosen = order[i]
            state, loss = step(state, images[chosen], labels[chosen], positions, key)
            return state, losses.at[i].set(loss)

        return lax.fori_loop(0, count, body, (state, jnp.zeros(CHUNK)))

    in_axes = (None, None, None, 0, None)
    return data_parallel(chunk, in_axes, (None, None), devices=devices, donate=(0,), how=how)


def fit(
    config: Config,
    images: UInt8[np.ndarray, "N height width channel"],
    labels: Float[np.ndarray, "N feature"],
    state: TrainState,
    devices: Sequence[jax.Device],
    *,
    stops: Iterable[int] = (),
    how: str = "pmap",
    seconds: float = 1.0,
) -> Iterator[Chunk]:
    """Train from state to the end of the run, in dispatches of about so many seconds.

    Yields a Chunk after each; the first one, of no steps, tells the time of compilation. A chunk
    ends at each of the steps in stops. The outcome does not depend on where chunks end. The state
    of a chunk, and the one given, are used up by the next chunk: copy what is to last.
    """
    length = Length(len(images), config.training.batch_size, config.training.epochs)
    run = train_chunk(config, length, devices, how)
    state, *dataset = replicate((state, np.asarray(images), np.asarray(labels)), devices)
    step, count = int(state.step), 0
    ends = sorted({stop for stop in stops if stop > step} | {length.steps})
    while step < length.steps or not count:
        begin = time.perf_counter()
        order = indices(config.training.seed, len(images), length.batch_size, step, CHUNK)
        by_device = np.stack(np.split(order, len(devices), axis=1))
        state, losses = run(state, *dataset, by_device, np.int32(count))
        losses = np.asarray(losses)[:count]
        elapsed = time.perf_counter() - begin
        step += count
        yield Chunk(state, losses, elapsed)
        if step == length.steps:
            return
        planned = int(seconds * count / elapsed) if count else 1
        end = next(end for end in ends if end > step)
        count = int(np.clip(planned, 1, min(CHUNK, end - step)))


def _optimizer(config: Config, length: Length) -> optax.GradientTransformation:
    training = config.training
    return optimizers.adam(
        training.learning_rate,
        training.lr_schedule,
        length,
        training.warmup_steps,
        training.grad_clip,
    )


def _variables(params: Any, batch_stats: Any) -> Variables:
    return {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}


def _ema_decay(decay: float, step: Array) -> Array:
    """The decay at a step: shorter averages at the start, so that the initial weights fade."""
    return jnp.minimum(decay, (1 + step) / (10 + step))
