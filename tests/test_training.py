"""Compute noise, loss and average by hand. Devices, chunks and resuming change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.diffusion import losses
from diffusion_jax.parallel import choose_devices, data_parallel, split
from diffusion_jax.runs.config import Config
from diffusion_jax.training import Length, TrainState, fit, optimizers, train_step
from diffusion_jax.typing import InputError, Level

N, BATCH = 24, 8
SMALL = Config(
    network="context_unet:n_feat=8",
    image_shape=(8, 8, 3),
    class_names=("a", "b", "c"),
    batch_size=BATCH,
    epochs=2,
    optimizer="adam:3e-3",
    ema="exponential:0.9",
)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, 8, 8, 3)).astype(np.uint8)
LABELS = np.eye(3, dtype=np.float32)[RNG.integers(0, 3, N)]
LENGTH = Length(N, BATCH, 2)


def trained(config: Config, devices: int, **options) -> tuple[TrainState, list]:
    length = Length(N, config.batch_size, config.epochs)
    task = config.task(length)
    losses, state = [], training.init(task)
    chosen = choose_devices(config.batch_size, devices)
    for chunk in fit(task, length, IMAGES, LABELS, state, chosen, **options):
        losses += chunk.losses.tolist()
        state = chunk.state
    return jax.device_get(state), losses


def distance(a, b) -> float:
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def on_one_device() -> tuple[TrainState, list]:
    return trained(SMALL, 1)


@pytest.mark.parametrize(("devices", "mapper"), [(2, None), (8, None), (2, "shard_map")])
def test_devices_change_nothing_but_rounding(on_one_device, devices, mapper, request) -> None:
    """Compare all losses. Adam amplifies rounding, so parameters agree only to 1 %."""
    if mapper is not None:
        request.getfixturevalue(mapper)
    state, losses = trained(SMALL, devices)
    assert np.allclose(losses, on_one_device[1], rtol=1e-4)
    assert distance(state.batch_stats, on_one_device[0].batch_stats) < 1e-2
    assert state.step == LENGTH.steps == 6


def test_gradients_and_statistics_are_those_of_one_device() -> None:
    """Use plain descent, because Adam hides the scale of gradients."""
    task = SMALL.override(optimizer="adam:clip=1e6").task(LENGTH)
    states = []
    for count in (1, 4):
        devices = choose_devices(BATCH, count)
        step = data_parallel(
            train_step(task), (None, 0, 0, 0, None, None), (None, None), devices=devices
        )
        parts = split((IMAGES[:BATCH], LABELS[:BATCH], np.arange(BATCH)), count)
        state = training.init(task)
        state, _ = step(state, *parts, jax.random.key(0), np.float32(1e-3))
        states.append(jax.device_get(state))
    # After one step from zero, Adam's first moment is a tenth of the gradient.
    moments = [[leaf for leaf in jax.tree.leaves(s.opt_state) if np.ndim(leaf)] for s in states]
    assert distance(moments[1], moments[0]) < 1e-4
    assert distance(states[1].batch_stats, states[0].batch_stats) < 1e-5


def test_chunks_change_no_bit(on_one_device) -> None:
    state, losses = trained(SMALL, 1, stops=range(1, 7), seconds=0.0)
    assert losses == on_one_device[1]
    assert distance(state.params, on_one_device[0].params) == 0


def test_resuming_changes_no_bit(on_one_device) -> None:
    task = SMALL.task(LENGTH)
    state = training.init(task)
    for chunk in fit(task, LENGTH, IMAGES, LABELS, state, choose_devices(BATCH, 1), stops=[4]):
        if int(chunk.state.step) == 4:
            halfway = jax.device_get(chunk.state)
    *_, last = fit(task, LENGTH, IMAGES, LABELS, halfway, choose_devices(BATCH, 1))
    for ours, whole in zip(
        jax.tree.leaves(jax.device_get(last.state)), jax.tree.leaves(on_one_device[0]), strict=True
    ):
        assert np.array_equal(ours, whole)


@pytest.mark.parametrize(
    "changes", [{}, {"schedule": "karras", "loss": "mse:weighting=min_snr", "augment": "flips"}]
)
def test_loss_by_hand(changes: dict) -> None:
    """Compute the draws of (seed, step, position), flips, noising and mean square in NumPy."""
    task = SMALL.override(keep_probability=0.5, **changes).task(LENGTH)
    state = training.init(task)
    step = data_parallel(
        train_step(task), (None, 0, 0, 0, None, None), (None, None), devices=jax.devices()[:1]
    )
    positions = np.arange(BATCH)
    key = jax.random.key(3)
    _, scalars = step(
        state, *split((IMAGES[:BATCH], LABELS[:BATCH], positions), 1), key, np.float32(1e-3)
    )

    schedule = task.schedule
    x, eps, t, context, flipped = [], [], [], [], []
    for position in positions:
        own = jax.random.fold_in(jax.random.fold_in(key, 0), position)
        keys = jax.random.split(own, 3)
        flipped.append(bool(changes) and bool(jax.random.bernoulli(jax.random.fold_in(own, 3))))
        t.append(int(jax.random.randint(keys[0], (), 1, 501)))
        eps.append(np.asarray(jax.random.normal(keys[1], (8, 8, 3))))
        context.append(LABELS[position] * bool(jax.random.bernoulli(keys[2], 0.5)))
        clean = IMAGES[position][:, :: -1 if flipped[-1] else 1] / 255 * 2 - 1
        x.append(schedule.alpha[t[-1]] * clean + schedule.sigma[t[-1]] * eps[-1])
    assert (0 < sum(flipped) < BATCH) == bool(changes), "some are mirrored, some not"
    assert 0 < np.any(context, axis=1).sum() < BATCH, "some contexts are dropped, some kept"
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    size = np.hypot(alpha, sigma)  # 1 on the course's schedule
    snr = alpha**2 / sigma**2
    weight = np.minimum(snr, 5) / snr if changes else np.ones(BATCH)
    assert np.any(weight < 1) == bool(changes)
    output, _ = task.network.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        jnp.asarray(np.stack(x) / size[:, None, None, None], jnp.float32),
        jnp.asarray(t, jnp.float32) / 500,
        jnp.asarray(np.stack(context)),
        train=True,
        mutable=["batch_stats"],
    )
    error = np.mean((np.asarray(output) - np.stack(eps)) ** 2, axis=(1, 2, 3))
    assert scalars["loss"] == pytest.approx(np.mean(weight * error), rel=1e-4)


def test_average_without_decay_is_the_model(on_one_device) -> None:
    state, _ = trained(SMALL.override(ema="none", epochs=1), 1)
    assert distance(state.ema["params"], state.params) == 0
    assert distance(state.ema["batch_stats"], state.batch_stats) == 0
    assert distance(on_one_device[0].ema["params"], on_one_device[0].params) > 0


def test_average_by_hand() -> None:
    """Compute ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step))."""
    task = SMALL.override(ema="exponential:0.15").task(LENGTH)
    state = training.init(task)
    states = [jax.device_get(state)]
    for chunk in fit(task, LENGTH, IMAGES, LABELS, state, choose_devices(BATCH, 1), seconds=0.0):
        if len(chunk.losses):
            states.append(jax.device_get(chunk.state))
    kernel = [np.asarray(s.params["out_0"]["kernel"], np.float64) for s in states]
    average = kernel[0]
    for step, new in enumerate(kernel[1:]):
        decay = min(0.15, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * new
    assert np.allclose(states[-1].ema["params"]["out_0"]["kernel"], average, atol=1e-6)


def test_power_averages_by_hand() -> None:
    """Compute mean <- b mean + (1 - b) params for the paper's gammas.

    Here b = (1 - 1 / t)^(gamma + 1).
    """
    task = SMALL.override(ema="power:0.1:snapshots=2").task(LENGTH)
    state = training.init(task)
    states = []
    for chunk in fit(task, LENGTH, IMAGES, LABELS, state, choose_devices(BATCH, 1), seconds=0.0):
        if len(chunk.losses):
            states.append(jax.device_get(chunk.state))
    for gamma, average in ((16.97, states[-1].averages[0]), (6.94, states[-1].averages[1])):
        mean = 0.0
        for t, new in enumerate(states, 1):
            decay = (1 - 1 / t) ** (gamma + 1)
            mean = decay * mean + (1 - decay) * np.float64(new.params["out_0"]["kernel"])
        assert np.allclose(average["params"]["out_0"]["kernel"], mean, atol=1e-5)
    assert distance(states[-1].ema, states[-1].averages[1]) == 0
    assert distance(states[-1].averages[0], states[-1].averages[1]) > 0


def test_a_state_without_averages_is_stored_as_before_there_were_any() -> None:
    names = {"step", "params", "batch_stats", "ema", "opt_state"}
    assert training.init(SMALL.task(LENGTH)).without_model().keys() == names
    state = training.init(SMALL.override(ema="power:snapshots=1").task(LENGTH))
    assert state.without_model().keys() == names | {"averages"}


@pytest.mark.parametrize(
    "changes", [{"network": "context_unet:n_feat=8:norm=group"}, {"prediction": "x0"}]
)
def test_a_handful_of_images_is_learned(changes: dict) -> None:
    """Train on three plain colours. The loss must halve within 120 steps."""
    config = SMALL.override(optimizer="adam:1e-2:decay=constant", **changes)
    colours = np.zeros_like(IMAGES) + np.eye(3, dtype=np.uint8)[np.arange(N) % 3, None, None] * 255
    length = Length(N, BATCH, 40)
    losses = []
    task = config.task(length)
    state, devices = training.init(task), choose_devices(BATCH, 1)
    for chunk in fit(task, length, colours, LABELS, state, devices, seconds=5.0):
        losses += chunk.losses.tolist()
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])


def test_noising() -> None:
    x0, eps = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), 3.0)
    level = Level(jnp.float32(1), jnp.float32(0.8), jnp.float32(0.6))
    assert losses.build("mse").noised(x0, eps, level) == pytest.approx(0.8 * 2 + 0.6 * 3)
    # The course: ab.sqrt() x + (1 - ab) noise.
    course = losses.build("mse:noising=course")
    assert course.noised(x0, eps, level) == pytest.approx(0.8 * 2 + (1 - 0.64) * 3)


def test_learning_rates() -> None:
    length = Length(n_images=10, batch_size=4, epochs=4)
    assert length.steps == 10

    def rates(name: str) -> list[float]:
        return optimizers.DECAYS[name](np.arange(10), length).tolist()

    # Steps 0, 1, 2 start in epoch 0 (images 0, 4, 8), steps 3, 4 in epoch 1 (12, 16), and so on.
    epochs = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert rates("course") == pytest.approx([1 - epoch / 4 for epoch in epochs])
    assert rates("linear") == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates("constant") == [1] * 10
    assert rates("cosine") == pytest.approx([0.5 + 0.5 * np.cos(np.pi * s / 10) for s in range(10)])


def test_adam_has_unit_length_and_rates_of_their_own() -> None:
    """Expect the first steps of Adam to be as long as the learning rate, for any gradient."""
    optimizer = optimizers.build("adam:0.1:decay=constant:warmup=4", Length(10, 4, 4))
    assert optimizer.rate(np.arange(6)) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    state = optimizer.transformation.init(jnp.zeros(()))
    for _ in range(6):
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.transformation.update(jnp.float32(7.0), state)
        assert float(update) == pytest.approx(-1, rel=1e-4)


def test_another_rate_length_or_seed_is_no_other_program() -> None:
    """Expect a single compilation: rate, length and seed are arguments of the program."""
    texts = []
    for optimizer, epochs, seed in (("adam:3e-3", 2, 0), ("adam:1e-2:decay=cosine:warmup=9", 5, 7)):
        config = SMALL.override(optimizer=optimizer, epochs=epochs, seed=seed)
        task = config.task(Length(N, BATCH, epochs))
        run = training.train_chunk(task, jax.devices()[:1])
        order = np.zeros((1, training.CHUNK, BATCH), np.int32)
        given = order, np.zeros(training.CHUNK, np.float32), np.int32(1), np.uint32(seed)
        texts.append(run.lower(training.init(task), IMAGES, LABELS, *given).as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("batch", "count", "message"),
    [
        (100, 3, "batch_size=100 is not divisible by devices=3: take 102 images"),
        (100, 9, "devices=9: this machine has 8"),
        (100, 0, "devices=0"),
    ],
)
def test_devices_that_do_not_fit_are_named(batch: int, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_devices(batch, count)


def test_as_many_devices_as_divide_the_batch() -> None:
    assert [len(choose_devices(batch)) for batch in (1, 6, 8, 9, 100)] == [1, 6, 8, 3, 5]
