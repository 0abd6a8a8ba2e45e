"""Compute noise, loss and average by hand. Devices, chunks and resuming change nothing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import training
from diffusion_jax.diffusion import losses
from diffusion_jax.parallel import choose_devices, data_parallel, split
from diffusion_jax.runs.config import Config
from diffusion_jax.training import Length, TrainState, fit, loop, optimizers, train_step
from diffusion_jax.typing import InputError, Level
from tests.models import SMALL, TINY

pytestmark = pytest.mark.usefixtures("compiled_once")
N, BATCH = 20, SMALL.batch_size
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, 8, 8, 3)).astype(np.uint8)
LABELS = np.eye(3, dtype=np.float32)[RNG.integers(0, 3, N)]
LENGTH = Length(N, BATCH, SMALL.epochs)
POWER = TINY.override(ema="power:snapshots=4")


class Trained(NamedTuple):
    """The states after chunks of steps, the initial one first, and the loss of every step."""

    states: list[TrainState]
    losses: list[float]


def trained(config: Config, devices: int = 1, seconds: float = 0.0, state=None, **options):
    """Train a configuration, by default in chunks of one step."""
    length = Length(N, config.batch_size, config.epochs)
    task = config.task(length)
    found = Trained([], [])
    options = {"images": IMAGES, "labels": LABELS, "seconds": seconds} | options
    given = {"state": training.init(task) if state is None else state}
    chosen = choose_devices(config.batch_size, devices)
    for chunk in fit(task, length, devices=chosen, **given, **options):
        found.losses.extend(chunk.losses.tolist())
        found.states.append(jax.device_get(chunk.state))
    return found


def distance(a, b) -> float:
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def on_one_device() -> Trained:
    return trained(POWER)


@pytest.mark.parametrize(("devices", "mapper"), [(2, None), (8, "shard_map")])
def test_devices_change_nothing_but_rounding(on_one_device, devices, mapper, request) -> None:
    """Compare all losses, and the first gradient: later, Adam amplifies rounding.

    After one step from zero, Adam's first moment is a tenth of the gradient.
    """
    if mapper is not None:
        request.getfixturevalue(mapper)
    found = trained(POWER, devices)
    assert np.allclose(found.losses, on_one_device.losses, rtol=1e-4)
    first, of_one = found.states[1], on_one_device.states[1]
    moments = [
        [leaf for leaf in jax.tree.leaves(s.opt_state) if leaf.ndim] for s in (first, of_one)
    ]
    assert distance(*moments) < 1e-4
    assert distance(first.batch_stats, of_one.batch_stats) < 1e-5
    last, of_one = found.states[-1], on_one_device.states[-1]
    assert distance(last.batch_stats, of_one.batch_stats) < 1e-2
    assert last.step == LENGTH.steps == 8


def test_chunks_and_resuming_change_no_bit(on_one_device) -> None:
    whole = trained(POWER, seconds=9.0)
    assert whole.losses == on_one_device.losses
    resumed = trained(POWER, seconds=9.0, state=on_one_device.states[4])
    streamed = trained(POWER, seconds=9.0, resident=IMAGES.nbytes - 1)
    assert streamed.losses == on_one_device.losses
    for found in (whole, resumed, streamed):
        last = found.states[-1], on_one_device.states[-1]
        assert all(map(np.array_equal, *map(jax.tree.leaves, last)))


def test_images_over_half_of_a_devices_memory_are_streamed(monkeypatch) -> None:
    """Count the images that each dispatch gets on a device that states its memory."""
    sent: list[int] = []

    def run(state, images, labels, order, rates, count, seed):
        sent.append(len(images))
        return state, {"loss": np.zeros(loop.CHUNK)}

    monkeypatch.setattr(loop, "train_chunk", lambda task, devices: run)
    for limit in (2 * IMAGES.nbytes, 2 * IMAGES.nbytes - 1):
        monkeypatch.setattr(loop, "_half_of_memory", lambda device, limit=limit: limit / 2)
        trained(TINY, seconds=9.0)
    whole, chunk = sent[: len(sent) // 2], sent[len(sent) // 2 :]
    assert set(whole) == {N}
    assert set(chunk) == {loop.CHUNK * BATCH}


@pytest.mark.parametrize(
    "changes", [{}, {"schedule": "karras", "loss": "mse:weighting=min_snr", "augment": "flips"}]
)
def test_loss_by_hand(changes: dict) -> None:
    """Compute the draws of (seed, step, position), flips, noising and mean square in NumPy."""
    task = TINY.override(keep_probability=0.5, **changes).task(LENGTH)
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
        t.append(int(jax.random.randint(keys[0], (), 1, schedule.steps + 1)))
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
        jnp.asarray(t, jnp.float32) / schedule.steps,
        jnp.asarray(np.stack(context)),
        train=True,
        mutable=["batch_stats"],
    )
    error = np.mean((np.asarray(output) - np.stack(eps)) ** 2, axis=(1, 2, 3))
    assert scalars["loss"] == pytest.approx(np.mean(weight * error), rel=1e-4)


def averaged(states: list[TrainState], decay: Callable[[int], float]) -> np.ndarray:
    """Compute mean <- decay mean + (1 - decay) kernel over the states, in float64."""
    values = [np.float64(state.params["Conv_0"]["kernel"]) for state in states]
    mean = values[0]
    for step, new in enumerate(values[1:]):
        mean = decay(step) * mean + (1 - decay(step)) * new
    return mean


@pytest.mark.parametrize(
    ("ema", "decay"),
    [("none", lambda _: 0.0), ("exponential:0.15", lambda i: min(0.15, (1 + i) / (10 + i)))],
)
def test_averages_by_hand(ema: str, decay: Callable[[int], float]) -> None:
    states = trained(TINY.override(ema=ema)).states
    found = states[-1].ema["params"]["Conv_0"]["kernel"]
    np.testing.assert_allclose(found, averaged(states, decay), atol=1e-6)
    assert (distance(states[-1].ema["params"], states[-1].params) > 0) == (ema != "none")


def test_power_averages_by_hand(on_one_device) -> None:
    """Use the paper's gammas of sigma_rel = 0.05 and 0.1, and decays (1 - 1 / t)^(gamma + 1)."""
    states = on_one_device.states
    for gamma, average in zip((16.97, 6.94), states[-1].averages, strict=True):
        mean = averaged(states, lambda i, g=gamma: (1 - 1 / (i + 1)) ** (g + 1))
        assert np.allclose(average["params"]["Conv_0"]["kernel"], mean, atol=1e-5)
    assert distance(states[-1].ema, states[-1].averages[1]) == 0
    assert distance(*states[-1].averages) > 0


def test_a_state_without_averages_omits_their_key(on_one_device) -> None:
    names = {"step", "params", "batch_stats", "ema", "opt_state"}
    assert training.init(TINY.task(LENGTH)).without_model().keys() == names
    assert on_one_device.states[0].without_model().keys() == names | {"averages"}


def test_a_handful_of_images_is_learned() -> None:
    """Train on three plain colours. The loss must halve within 120 steps.

    The program is that of test_apps.py, for two devices.
    """
    config = SMALL.override(optimizer="adam:1e-2:decay=constant", epochs=48)
    colours = np.zeros_like(IMAGES) + np.eye(3, dtype=np.uint8)[np.arange(N) % 3, None, None] * 255
    losses = trained(config, 2, images=colours, seconds=5.0).losses
    assert len(losses) == 120
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


def test_epochs_may_be_a_fraction() -> None:
    """Expect every number of steps to come back from the epochs that it makes."""
    for n_images, batch, steps in ((50_000, 64, 1713), (7, 100, 3), (10**6, 1, 2**30 + 1)):
        assert Length(n_images, batch, steps * batch / n_images).steps == steps
    whole = [(n, batch, 3) for n in range(1, 300, 7) for batch in (1, 7, 64, 2**16 - 1)]
    assert [Length(*each).steps for each in whole] == [-(-3 * n // b) for n, b, _ in whole]
    assert Length(2**31 - 1, 2**16 - 1, 1).steps == 2**15 + 1  # the last step has one image or more


def test_speed_leaves_out_compilation_and_the_first_step() -> None:
    times = ((0, 30.0), (1, 9.0), (2, 0.5), (4, 1.0), (100, 1.0), (1, 1e9))
    chunks = (loop.Chunk(None, {"loss": np.zeros(count)}, seconds) for count, seconds in times)
    assert loop.measure_speed(chunks, 1.5) == 4
    assert len(list(chunks)) == 2, "the rest is not run"


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
        config = TINY.override(optimizer=optimizer, epochs=epochs, seed=seed)
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
