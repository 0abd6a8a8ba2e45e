"""Fit the numbers of a sampler to a model by gradient descent through the loop of all samplers."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, UInt32

from diffusion_jax import samplers
from diffusion_jax.data import Dataset
from diffusion_jax.diffusion.guidance import Guidance, Model, network_denoiser
from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.classifier import Classifier
from diffusion_jax.learning.numbers import Numbers, from_tableau, to_tableau, traced_tableau
from diffusion_jax.learning.objectives import Objective, random_features
from diffusion_jax.parallel import AXIS, data_parallel, replicate, scatter, split
from diffusion_jax.sampling import sample
from diffusion_jax.sampling.draw import keys_and_noise
from diffusion_jax.tableau import XI, Tableau
from diffusion_jax.tableau.solve import solve
from diffusion_jax.typing import Context, Images, check_seed, require

FREE = {  # what may be learned: fields of Values
    "levels": ("spacing",),
    "mixing": ("history", "kept"),
    "noise": ("fresh",),
    "guidance": ("scale",),
}
LEAST_NOISE = 0.05  # of free noise at the start, because a noise of 0 has no gradient
CHECKS, PATIENCE = 12, 6  # checks on held-out images, and how many pass before learning stops
BATCHES = 8  # batches of a check
LEAST = 16  # samples in a step, and images to learn from or to check with
TIMED = 3  # steps that are timed to find out how many fit into the time
POOL = 1024  # solutions to learn from
MOMENTS = 0.9, 0.99  # of Adam
CHANNELS = 24, 48  # of the classifier that learning uses


class Values(NamedTuple):
    """What is learned: the fields of Numbers, and the scale of guidance."""

    spacing: Any
    history: Any
    kept: Any
    fresh: Any
    scale: Any

    @property
    def numbers(self) -> Numbers:
        """Return the numbers of the table."""
        return Numbers(*self[:4])


class Learned(NamedTuple):
    """A learned sampler.

    scale: the scale of guidance, 1 without guidance. curve: the step and the objective on held-out
    images, at each check. steps: how many were laid out. best: the step that the numbers are from.
    """

    tableau: Tableau
    scale: float
    curve: list[tuple[int, float]]
    steps: int
    best: int


class Targets(NamedTuple):
    """Images to resemble, with their contexts. seed: that of the noise that they were made from."""

    images: np.ndarray
    labels: np.ndarray
    seed: int | None = None


class Setting(NamedTuple):
    """What determines the program of a step.

    mask: 1 for values that are free, else 0. judge: a classifier, or None.
    """

    model: Model
    start: Tableau
    objective: Objective
    guidance: Guidance | None
    mask: Values
    judge: Classifier | None


def fit(
    model: Model,
    start: Tableau,
    training: Dataset,
    held_out: Dataset,
    objective: Objective,
    *,
    free: Sequence[str] = ("levels", "mixing", "noise"),
    guidance: Guidance | None = None,
    steps: int | None = None,
    minutes: float = 4.0,
    batch_size: int = 128,
    learning_rate: float = 0.05,
    registers: int = 3,
    seed: int = 0,
    devices: Sequence[jax.Device],
    progress: Callable[[int, int], object] | None = None,
) -> Learned:
    """Return the sampler that has the least objective on held-out images.

    start: the sampler to begin with, and registers: the predictions it may use; see from_tableau.
    free: names in FREE. guidance: classifier-free guidance, whose scale may be free, or None.
    steps: the steps of Adam; by default as many as fit into `minutes`, compilation included. The
    result is reproducible if steps are given. batch_size: samples in a step, over all devices.
    progress: called with the number of steps done and the number of all.
    Raise InputError if an argument is invalid, or if the time is too short.
    """
    begin, seed = time.perf_counter(), check_seed(seed)
    numbers = from_tableau(start, registers)
    _check(training, held_out, free, guidance, batch_size, len(devices))
    fits = 0 < learning_rate < np.inf
    require(fits, f"learning_rate={learning_rate}: it must be above 0, and finite")
    noisy = "noise" in free or bool(np.any(start.mix[:, 0, XI]))
    wrong = "this objective needs a sampler without noise: start from unipc, and leave noise fixed"
    require(not objective.solution or not noisy, wrong)
    values, mask = _begin(numbers, 1.0 if guidance is None else guidance.scale, free)
    judge, params = None, None
    if not objective.solution and classifier.has_classes(training):
        judge = classifier.network(training).clone(channels=CHANNELS)  # not that of the measures
        params = classifier.train(training, devices, judge, seed + 1)
    setting = Setting(model, start, objective, guidance, mask, judge)
    parts = [_targets(setting, part, n, devices) for n, part in enumerate((training, held_out))]
    trainer = _Trainer(setting, params, parts, devices, batch_size, seed)
    trainer.step(values, trainer.optimizer.init(values), 0, 0.0)  # this compiles
    if steps is None:
        steps = _steps_within(minutes, trainer, values, begin)
    values, best, curve = _descend(trainer, values, steps, learning_rate, progress)
    values = jax.tree.map(np.asarray, values)
    tableau = to_tableau(values.numbers, model.schedule, float(start.t[0]))
    return Learned(tableau, float(values.scale), curve, steps, best)


def _check(
    training: Dataset,
    held_out: Dataset,
    free: Sequence[str],
    guidance: Guidance | None,
    batch_size: int,
    count: int,
) -> None:
    unknown = [name for name in free if name not in FREE]
    require(free and not unknown, f"free={','.join(free)}: choose from {', '.join(FREE)}")
    lacks = "free=guidance: give the scale to begin with, such as guidance=1.5"
    require(guidance is not None or "guidance" not in free, lacks)
    plain = guidance is None or not guidance.renoise_bad
    require(plain, "guidance=cfg_pp: samplers are learned with cfg only")
    fits = batch_size >= LEAST and batch_size % count == 0
    require(fits, f"batch_size={batch_size}: it must be at least {LEAST}, and divisible by {count}")
    least = min(len(training.images), len(held_out.images))
    few = f"{least} images to learn from or to check with: they must be at least {LEAST}"
    require(least >= LEAST, few)


def _begin(numbers: Numbers, scale: float, free: Sequence[str]) -> tuple[Values, Values]:
    """Return the values to begin with, and which of them are free."""
    values = Values(*(np.array(each, np.float32) for each in (*numbers, scale)))
    fields = {field for name in free for field in FREE[name]}
    mask = Values(*(np.full_like(v, k in fields) for k, v in values._asdict().items()))
    mask.kept[-1] = mask.fresh[-1] = 0  # no noise follows the last step
    more = np.maximum(values.fresh, LEAST_NOISE)
    return values._replace(fresh=np.where(mask.fresh == 1, more, values.fresh)), mask


def _targets(setting: Setting, part: Dataset, n: int, devices: Sequence[jax.Device]) -> Targets:
    """Return the images of a part of the data, or the solutions from the noise of seed n."""
    labels = np.asarray(part.labels, np.float32)
    if not setting.objective.solution:
        return Targets(part.images, labels)
    model, labels = setting.model, labels[np.arange(POOL) % len(labels)]
    tableau = samplers.build(setting.objective.solution, model.schedule)
    return Targets(
        sample(model, tableau, POOL, context=labels, seed=n, devices=devices).images, labels, n
    )


class _Trainer:
    """The compiled programs of a setting, and the images that it learns from."""

    def __init__(
        self,
        setting: Setting,
        params: Any,
        parts: Sequence[Targets],
        devices: Sequence[jax.Device],
        batch_size: int,
        seed: int,
    ) -> None:
        """Compile nothing yet.

        params: the weights of the judge. parts: the images to learn from, and those to check with.
        """
        self.parts, self.devices, self.size, self.seed = parts, devices, batch_size, seed
        self.optimizer = optax.scale_by_adam(*MOMENTS)
        self.weights = replicate((setting.model.variables, params), devices)
        loss = partial(_loss, setting)
        shared, each = (None,) * 3, (0,) * 3
        step = partial(_step, loss, self.optimizer, setting.mask)
        self._step = data_parallel(step, (None, None, *shared, *each), None, devices=devices)
        value = partial(_value, loss)
        self._value = data_parallel(value, (*shared, *each), None, devices=devices)

    def step(self, values: Values, state: Any, number: int, rate: float) -> tuple[Values, Any]:
        """Return the values and Adam's state after a step."""
        batch = self._batch(0, number)
        return self._step(state, np.float32(rate), values, self.weights, *batch)

    def check(self, values: Values) -> float:
        """Return the objective on held-out images, with the same noise and features each time."""
        found = [
            self._value(values, self.weights, *self._batch(1, number)) for number in range(BATCHES)
        ]
        return float(np.mean([float(one) for one in found]))

    def _batch(self, part: int, number: int) -> tuple:
        """Return the seeds of noise and features; and targets, contexts and ids for each device."""
        rng = np.random.default_rng((self.seed, part, number))
        images, labels, seed = self.parts[part]
        rows = rng.integers(0, len(images), self.size)
        ids = np.arange(self.size) if seed is None else rows
        noise, features = rng.integers(2**32, size=2, dtype=np.uint32)
        noise = noise if seed is None else np.uint32(seed)
        targets = images[rows]
        if targets.dtype == np.uint8:
            targets = targets.astype(np.float32) / np.float32(127.5) - 1
        arrays = split((targets, labels[rows], ids.astype(np.uint32)), len(self.devices))
        return np.stack([noise, features]), *scatter(arrays, self.devices)


def _loss(
    setting: Setting,
    values: Values,
    weights: tuple[Any, Any],
    seeds: UInt32[Array, "2"],
    targets: Images,
    contexts: Context,
    ids: UInt32[Array, "batch"],
) -> Float[Array, ""]:
    """Return this device's part of the objective of new samples."""
    model, start = setting.model, setting.start
    table = traced_tableau(values.numbers, model.schedule, float(start.t[0]))
    keys, noise = keys_and_noise(seeds[0], ids, targets.shape[1:])
    network, variables = model.network.for_sampling(weights[0])
    guide = setting.guidance
    if guide is not None:
        guide = Guidance(*map(jnp.float32, guide))._replace(scale=values.scale)
    apply = partial(network.apply, variables)
    denoise = network_denoiser(apply, model.prediction, model.schedule.steps, contexts, guide)
    forgetful = jax.checkpoint(lambda x, level: denoise(x, level))  # holds one call in memory
    samples, _ = solve(forgetful, table, start.noise_scale * noise, keys)

    def layers(images: Images) -> list[Float[Array, "batch _"]]:
        found = random_features(jax.random.key(seeds[1]), images)
        if setting.judge is not None:
            pixels, params = 127.5 * (images + 1), {"params": weights[1]}
            learned: Any = setting.judge.apply(params, pixels, method="layers")
            found += learned
        return found

    return setting.objective.loss(samples, targets, contexts, layers)


def _value(loss: Callable, *args: Any) -> Float[Array, ""]:
    return lax.psum(loss(*args), AXIS)


def _step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    mask: Values,
    state: Any,
    rate: Float[Array, ""],
    values: Values,
    *args: Any,
) -> tuple[Values, Any]:
    gradient = lax.psum(jax.grad(loss)(values, *args), AXIS)
    gradient = jax.tree.map(jnp.multiply, gradient, mask)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        updates, state = optimizer.update(gradient, state)
    values = jax.tree.map(lambda old, update: old - rate * update, values, updates)
    return values, state


def _steps_within(minutes: float, trainer: _Trainer, values: Values, begin: float) -> int:
    """Return how many steps fit into the rest of the time, with checks."""
    compiled, state = time.perf_counter(), trainer.optimizer.init(values)
    for number in range(TIMED):
        jax.block_until_ready(trainer.step(values, state, number, 0.0))
    each = (time.perf_counter() - compiled) / TIMED
    trainer.check(values)  # this compiles
    timed = time.perf_counter()
    trainer.check(values)
    check, now = time.perf_counter() - timed, time.perf_counter()
    need = now - begin + (CHECKS + 1) * check + CHECKS * each
    wrong = f"minutes={minutes:g}: compilation took {compiled - begin:.0f} s, a step {each:.1f} s"
    require(60 * minutes >= need, f"{wrong}: give at least {np.ceil(need / 6) / 10:g}")
    return int((60 * minutes - (now - begin) - (CHECKS + 1) * check) / each)


def _descend(
    trainer: _Trainer,
    values: Values,
    steps: int,
    learning_rate: float,
    progress: Callable[[int, int], object] | None,
) -> tuple[Values, int, list[tuple[int, float]]]:
    """Return the values with the least objective on held-out images, their step, and the curve."""
    found = trainer.check(values)
    best, least, at, curve = values, found, 0, [(0, found)]
    state = trainer.optimizer.init(values)
    every = max(1, steps // CHECKS)
    for number in range(steps):
        rate = learning_rate * (1 + np.cos(np.pi * number / steps)) / 2
        values, state = jax.block_until_ready(trainer.step(values, state, number, rate))
        if progress is not None:
            progress(number + 1, steps)
        if (number + 1) % every and number + 1 < steps:
            continue
        found = trainer.check(values)
        curve.append((number + 1, found))
        if found < least:
            best, least, at = values, found, number + 1
        elif number + 1 - at >= PATIENCE * every:
            break
    return best, at, curve
