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
from diffusion_jax.augmentation import horizontal_flips
from diffusion_jax.averages import EMA_PROFILES, SIGMA_RELS
from diffusion_jax.config import Config, TrainingConfig
from diffusion_jax.data.batches import indices
from diffusion_jax.losses import NOISINGS, TIME_SAMPLINGS, mean_squared_error
from diffusion_jax.optimizers import Length
from diffusion_jax.parallel import AXIS, agree, data_parallel, replicate, scatter
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import init_variables
from diffusion_jax.typing import Context, Images, Level, Pixels, Variables

CHUNK = 128  # the most steps in one dispatch


class TrainState(NamedTuple):
    """All that changes in training.

    ema has the form of the network's variables; averages, of averages.SIGMA_RELS, are as many of
    the same form, or none.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    ema: Variables
    opt_state: Any
    averages: tuple[Variables, ...] = ()

    def without_model(self) -> dict[str, Any]:
        """What a checkpoint stores beside ema. No averages leave no trace, as before they were."""
        fields = self._replace(ema=None)._asdict()
        return fields if self.averages else {k: v for k, v in fields.items() if k != "averages"}


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
    # Each average starts as a copy: the state is donated, and no buffer can be given twice.
    count = len(SIGMA_RELS) if config.training.ema_snapshots else 0
    ema, *averages = (
        jax.tree.map(jnp.copy, _variables(params, batch_stats)) for _ in range(1 + count)
    )
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, batch_stats, ema, opt_state, tuple(averages))


def train_step(config: Config, length: Length) -> Callable:
    """The step (state, pixels, context, positions, key) -> (state, loss), for one device.

    Where the loss, the gradient or what comes of them is not finite, the loss is NaN and the state
    changes in its step alone.

    It must run under the mapped axis parallel.AXIS: gradients, batch statistics and the loss are
    means over it. positions number the images of the whole batch, so that the noise of an image
    does not depend on the device that it is on.
    """
    loss_of = _loss(config)
    augment = horizontal_flips(config.training.flips, config.data.class_names)
    optimizer = _optimizer(config, length)

    @products_in(config.training.dtype)
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
        x0 = augment(pixels.astype(jnp.float32) / 127.5 - 1, context, keys)
        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, x0, context, keys
        )
        loss, grads = lax.pmean((loss, grads), AXIS)
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = _variables(params, batch_stats)
        ema = _average(config.training, state.step, new, state.ema)
        averages = tuple(
            optax.incremental_update(new, old, EMA_PROFILES["power"](state.step, 0.0, sigma_rel))
            for old, sigma_rel in zip(state.averages, SIGMA_RELS, strict=False)
        )
        after = TrainState(state.step + 1, params, batch_stats, ema, opt_state, averages)
        finite = jnp.isfinite(optax.tree.norm((loss, grads, updates, batch_stats)))
        after = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), after, state._replace(step=after.step)
        )
        return after, jnp.where(finite, loss, jnp.nan)

    return step


def _loss(config: Config) -> Callable:
    """The loss (params, batch_stats, x0, context, keys) -> (loss, batch_stats after it)."""
    network = computing_in(config.network.build(axis_name=AXIS), config.training.dtype)
    parameterization = PARAMETERIZATIONS[config.diffusion.parameterization]
    noising = NOISINGS[config.diffusion.noising]
    timesteps = config.diffusion.timesteps
    schedule = config.diffusion.build()
    draw_t = TIME_SAMPLINGS[config.training.time_sampling](schedule)
    tables = (schedule.alpha, schedule.sigma, config.loss_weights())
    alpha, sigma, weight = (jnp.asarray(table, jnp.float32) for table in tables)

    def draw(key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        for_t, for_eps, for_context = jax.random.split(key, 3)
        eps = jax.random.normal(for_eps, network.image_shape)
        kept = jax.random.bernoulli(for_context, config.training.keep_probability)
        return draw_t(for_t), eps, kept.astype(jnp.float32)

    def loss_of(
        params: Any, batch_stats: Any, x0: Images, context: Context, keys: Key[Array, "batch"]
    ) -> tuple[Array, Any]:
        t, eps, kept = jax.vmap(draw)(keys)
        level = Level(t, alpha[t], sigma[t])
        level = jax.tree.map(lambda part: part[:, None, None, None], level)
        x = noising(x0, eps, level)
        output, updates = network.apply(
            _variables(params, batch_stats),
            parameterization.network_input(x, level),
            t.astype(jnp.float32) / timesteps,
            context * kept[:, None],
            train=True,
            mutable=["batch_stats"],
        )
        target = parameterization.target(x0, eps, level)
        loss = mean_squared_error(output, target, weight[t])
        return loss, updates.get("batch_stats", {})

    return loss_of


def train_chunk(
    config: Config, length: Length, devices: Sequence[jax.Device], how: str | None
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
    how: str | None = None,
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
        part = scatter(by_device, devices)
        state, losses = run(state, *dataset, part, np.int32(count))
        losses = np.asarray(losses)[:count]
        elapsed = time.perf_counter() - begin
        step += count
        yield Chunk(state, losses, elapsed)
        if step == length.steps:
            return
        planned = agree(int(seconds * count / elapsed) if count else 1)
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


def _average(training: TrainingConfig, step: Array, new: Variables, old: Variables) -> Variables:
    """The average that is sampled from, after a step."""
    rate = EMA_PROFILES[training.ema_profile](step, training.ema_decay, training.ema_sigma_rel)
    return optax.incremental_update(new, old, rate)
