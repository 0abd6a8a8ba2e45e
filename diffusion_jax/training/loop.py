"""Many steps of training in one dispatch, on all devices."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt32

from diffusion_jax.data.batches import indices
from diffusion_jax.parallel import AXIS, agree, data_parallel, replicate, scatter
from diffusion_jax.training.optimizers import Length
from diffusion_jax.training.step import Task, TrainState, train_step

CHUNK = 128  # the most steps in one dispatch


class Chunk(NamedTuple):
    """The state after some steps, the scalars of each step, and the seconds that they took."""

    state: TrainState
    scalars: dict[str, Float[np.ndarray, "steps"]]
    seconds: float

    @property
    def losses(self) -> Float[np.ndarray, "steps"]:
        """The loss of each step, or NaN if the step was skipped."""
        return self.scalars["loss"]


def train_chunk(task: Task, devices: Sequence[jax.Device]) -> Callable:
    """Return a compiled (state, images, labels, indices, rates, count, seed) -> (state, scalars).

    It takes `count` steps. images and labels are the whole data set, or all that these steps use,
    on every device. indices (device, CHUNK, part) select the images of each step. rates (CHUNK,)
    are the learning rates. The state is donated.
    """
    step = train_step(task)

    def chunk(
        state: TrainState,
        images: UInt8[Array, "N height width channel"],
        labels: Float[Array, "N feature"],
        order: Int[Array, "CHUNK part"],
        rates: Float[Array, "CHUNK"],
        count: Int[Array, ""],
        seed: UInt32[Array, ""],
    ) -> tuple[TrainState, dict[str, Float[Array, "CHUNK"]]]:
        part = order.shape[1]
        positions = lax.axis_index(AXIS) * part + jnp.arange(part)
        key = jax.random.key(seed)

        def one(i: Array | int, state: TrainState) -> tuple:
            return step(state, images[order[i]], labels[order[i]], positions, key, rates[i])

        def body(i: Array, carry: tuple) -> tuple:
            state, scalars = one(i, carry[0])
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], scalars)

        shapes = jax.eval_shape(one, 0, state)[1]
        empty = jax.tree.map(lambda leaf: jnp.zeros((CHUNK, *leaf.shape), leaf.dtype), shapes)
        return lax.fori_loop(0, count, body, (state, empty))

    in_axes = (None, None, None, 0, None, None, None)
    return data_parallel(chunk, in_axes, (None, None), devices=devices, donate=(0,))


def fit(
    task: Task,
    length: Length,
    images: UInt8[np.ndarray, "N height width channel"],
    labels: Float[np.ndarray, "N feature"],
    state: TrainState,
    devices: Sequence[jax.Device],
    *,
    stops: Iterable[int] = (),
    seconds: float = 1.0,
    program: Callable | None = None,
    resident: float | None = None,
) -> Iterator[Chunk]:
    """Train from state to the end of the run, in dispatches of about `seconds` seconds.

    program: what train_chunk returns, if it was made before. It serves runs of every length.
    resident: the most bytes of images that each device keeps; by default half of its memory. Of
    more images, each dispatch gets only those of its own steps, with the same result.

    Yield a Chunk after each dispatch. The first one has no steps; it gives the time of compilation.
    A chunk ends at each of the steps in stops. The result does not depend on where chunks end.
    The given state and that of each chunk are donated to the next dispatch: copy what you want to
    keep.
    """
    run = program or train_chunk(task, devices)
    most = _half_of_memory(devices[0]) if resident is None else resident
    streams = agree(int(images.nbytes > most))
    here = np.asarray(images), np.asarray(labels)
    state, there = replicate((state, () if streams else here), devices)
    step, count = int(state.step), 0
    ends = sorted({stop for stop in stops if stop > step} | {length.steps})
    while step < length.steps or not count:
        begin = time.perf_counter()
        order = indices(task.seed, len(images), length.batch_size, step, CHUNK)
        if streams:
            there = replicate(tuple(part[order.ravel()] for part in here), devices)
            order = np.arange(order.size, dtype=np.int32).reshape(order.shape)
        part = scatter(np.stack(np.split(order, len(devices), axis=1)), devices)
        rates = task.optimizer.rate(np.arange(step, step + CHUNK)).astype(np.float32)
        given = np.int32(count), np.uint32(task.seed)
        state, scalars = run(state, *there, part, rates, *given)
        scalars = {name: np.asarray(values)[:count] for name, values in scalars.items()}
        elapsed = time.perf_counter() - begin
        step += count
        yield Chunk(state, scalars, elapsed)
        if step == length.steps:
            return
        planned = agree(int(seconds * count / elapsed) if count else 1)
        end = next(end for end in ends if end > step)
        count = int(np.clip(planned, 1, min(CHUNK, end - step)))


def measure_speed(chunks: Iterable[Chunk], seconds: float) -> float:
    """Return the steps per second of training, from chunks that take at least this long.

    Leave out compilation and the first step, which sets up memory.
    """
    steps, took = 0, 0.0
    for chunk in islice(chunks, 2, None):
        steps, took = steps + len(chunk.losses), took + chunk.seconds
        if took >= seconds:
            break
    return steps / took


def _half_of_memory(device: jax.Device) -> float:
    """Return half of the bytes of a device's own memory; no limit if it uses the host's."""
    stats = device.memory_stats() or {}
    return (stats.get("bytes_limit") or math.inf) / 2
