"""One step of training, written for one device."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.diffusion.losses import Loss
from diffusion_jax.diffusion.predictions import Parameterization
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.networks.network import compiled_once, init_network
from diffusion_jax.networks.precisions import computing_in, products_in
from diffusion_jax.parallel import AXIS
from diffusion_jax.training.augmentation import Augment
from diffusion_jax.training.averages import SIGMA_RELS, Average, power
from diffusion_jax.training.optimizers import Optimizer
from diffusion_jax.typing import Context, Images, Level, Pixels, Variables

Scalars: TypeAlias = dict[str, Float[Array, ""]]


class Task(NamedTuple):
    """The settings of a training step: what it trains, on which process, and how.

    keep_probability: how often the network sees an image's context. dtype: a name in PRECISIONS.
    """

    network: Any
    schedule: NoiseSchedule
    prediction: Parameterization
    loss: Loss
    optimizer: Optimizer
    average: Average
    augment: Augment
    keep_probability: float = 0.9
    seed: int = 0
    dtype: str = "float32"


class TrainState(NamedTuple):
    """Everything that changes in training.

    ema has the structure of the network's variables. averages has the same structure for each width
    in SIGMA_RELS, or is empty.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    ema: Variables
    opt_state: Any
    averages: tuple[Variables, ...] = ()

    def without_model(self) -> dict[str, Any]:
        """Return what a checkpoint stores besides ema. Omit the averages if there are none."""
        fields = self._replace(ema=None)._asdict()
        return fields if self.averages else {k: v for k, v in fields.items() if k != "averages"}


def init(task: Task) -> TrainState:
    """Return the state before the first step, which depends on the task's seed."""

    def make(seed: Any) -> TrainState:
        variables = init_network(task.network, seed)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        # The state is donated, and a buffer can be donated only once: each average is a copy.
        count = len(SIGMA_RELS) if task.average.snapshots else 0
        ema, *averages = (jax.tree.map(jnp.copy, variables) for _ in range(1 + count))
        zero = jnp.zeros((), jnp.int32)
        opt_state = task.optimizer.transformation.init(params)
        return TrainState(zero, params, batch_stats, ema, opt_state, tuple(averages))

    return compiled_once(make)(task.seed)


def train_step(task: Task) -> Callable:
    """Return the step (state, pixels, context, positions, key, rate) -> (state, scalars).

    rate: the learning rate.
    scalars contains the loss, and anything else to log. If the loss, the gradient or the new state
    is not finite, the returned loss is NaN and only the step number of the state changes.

    The step runs under the mapped axis parallel.AXIS. Gradients, batch statistics and the loss are
    means over it. positions are the indices of the images in the whole batch, so that the noise of
    an image does not depend on its device.
    """
    loss_of = _loss(task)
    widths = [power(sigma_rel) for sigma_rel in SIGMA_RELS]

    @products_in(task.dtype)
    def step(
        state: TrainState,
        pixels: Pixels,
        context: Context,
        positions: Int[Array, "batch"],
        key: Key[Array, ""],
        rate: Float[Array, ""],
    ) -> tuple[TrainState, Scalars]:
        step_key = jax.random.fold_in(key, state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions)
        x0 = task.augment(pixels.astype(jnp.float32) / 127.5 - 1, context, keys)
        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, x0, context, keys
        )
        loss, grads = lax.pmean((loss, grads), AXIS)
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            transformation = task.optimizer.transformation
            updates, opt_state = transformation.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda update: rate * update, updates)
            params = optax.apply_updates(state.params, updates)
        new = _variables(params, batch_stats)
        ema = optax.incremental_update(new, state.ema, task.average.rate(state.step))
        averages = tuple(
            optax.incremental_update(new, old, width.rate(state.step))
            for old, width in zip(state.averages, widths, strict=False)
        )
        after = TrainState(state.step + 1, params, batch_stats, ema, opt_state, averages)
        finite = jnp.isfinite(optax.tree.norm((loss, grads, updates, batch_stats)))
        after = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), after, state._replace(step=after.step)
        )
        return after, {"loss": jnp.where(finite, loss, jnp.nan)}

    return step


def _loss(task: Task) -> Callable:
    """Return the loss (params, batch_stats, x0, context, keys) -> (loss, batch_stats after it)."""
    network = computing_in(task.network.clone(axis_name=AXIS), task.dtype)
    schedule, prediction = task.schedule, task.prediction
    draw_t = task.loss.times(schedule)
    tables = (schedule.alpha, schedule.sigma, task.loss.weights(prediction, schedule))
    alpha, sigma, weight = (jnp.asarray(table, jnp.float32) for table in tables)

    def draw(key: Key[Array, ""]) -> tuple[Array, Array, Array]:
        for_t, for_eps, for_context = jax.random.split(key, 3)
        eps = jax.random.normal(for_eps, network.image_shape)
        kept = jax.random.bernoulli(for_context, task.keep_probability)
        return draw_t(for_t), eps, kept.astype(jnp.float32)

    def loss_of(
        params: Any, batch_stats: Any, x0: Images, context: Context, keys: Key[Array, "batch"]
    ) -> tuple[Array, Any]:
        t, eps, kept = jax.vmap(draw)(keys)
        level = Level(t, alpha[t], sigma[t])
        level = jax.tree.map(lambda part: part[:, None, None, None], level)
        output, updates = network.apply(
            _variables(params, batch_stats),
            prediction.network_input(task.loss.noised(x0, eps, level), level),
            t.astype(jnp.float32) / schedule.steps,
            context * kept[:, None],
            train=True,
            mutable=["batch_stats"],
        )
        loss = task.loss(output, prediction.target(x0, eps, level), weight[t])
        return loss, updates.get("batch_stats", {})

    return loss_of


def _variables(params: Any, batch_stats: Any) -> Variables:
    return {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}
