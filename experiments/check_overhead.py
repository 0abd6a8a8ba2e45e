"""Measure what the checks of a training cost: steps with and without the one for finite numbers.

  python -m experiments.check_overhead

Both kinds of step run in turns in this process, each some steps in one dispatch; the ratio is taken
pair by pair. Then, what is done for each checkpoint besides writing it: its checksums.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl import flags

from diffusion_jax import checkpoints, manifests, parallel, training
from diffusion_jax.config import Config
from diffusion_jax.data import sprites
from diffusion_jax.optimizers import Length
from experiments.flags import FLAGS, define_devices, describe, run

define_devices()
flags.DEFINE_integer("n_feat", 64, "the network's width")
flags.DEFINE_integer("batch_size", 100, "images in a step")
flags.DEFINE_integer("steps", 2, "steps in each run")
flags.DEFINE_integer("runs", 40, "runs of either kind")


def main() -> None:
    """Time both in turns, and print medians."""
    config = Config().override(n_feat=FLAGS.n_feat, batch_size=FLAGS.batch_size)
    images, labels = sprites(10 * FLAGS.batch_size)
    length = Length(len(images), FLAGS.batch_size, 10**4)
    devices = parallel.choose_devices(FLAGS.batch_size, FLAGS.devices)
    order = training.indices(0, len(images), FLAGS.batch_size, 0, training.CHUNK)
    dataset = parallel.replicate((images, labels), devices)
    parts = parallel.scatter(np.stack(np.split(order, len(devices), axis=1)), devices)
    given = (*dataset, parts, np.int32(FLAGS.steps))
    states = [training.init(config, length) for _ in range(2)]
    with_check = training.train_chunk(config, length, devices, None)
    states[0], _ = with_check(states[0], *given)
    with mock.patch.object(jnp, "isfinite", return_value=np.True_):
        without: Any = training.train_chunk(config, length, devices, None)
        states[1], _ = without(states[1], *given)  # traced here; XLA drops the rest of the check
        assert "is_finite" not in without.lower(states[1], *given).as_text()
    chunks, seconds = (with_check, without), np.empty((FLAGS.runs, 2))
    for number, row in enumerate(seconds):
        for kind in (0, 1) if number % 2 else (1, 0):
            row[kind], states[kind] = timed(chunks[kind], states[kind], given)
    each = np.median(seconds, axis=0) / FLAGS.steps
    ratios = seconds[:, 0] / seconds[:, 1] - 1
    spread = np.subtract(*np.percentile(ratios, (75, 25))) / 1.35
    error = 1.25 * spread / len(ratios) ** 0.5  # of a median
    print(f"a step of {FLAGS.batch_size} images, n_feat {FLAGS.n_feat}, {describe(devices)}:")
    print(f"{each[0]:.4f} s with the check, {each[1]:.4f} s without; medians of {FLAGS.runs} runs")
    print(f"the check takes {np.median(ratios):.2%} +- {error:.2%}")
    print(f"the checksums of a checkpoint take {sealing(states[0]):.3f} s")


def timed(chunk: Callable, state: Any, given: tuple) -> tuple[float, Any]:
    """The seconds of one dispatch, and the state after it."""
    begin = time.perf_counter()
    state, losses = chunk(state, *given)
    np.asarray(losses)
    return time.perf_counter() - begin, state


def sealing(state: training.TrainState) -> float:
    """The seconds that the checksums of a checkpoint take."""
    with tempfile.TemporaryDirectory() as folder:
        with checkpoints.open_checkpoints(Path(folder)) as manager:
            checkpoints.save(manager, 1, state.ema, state.without_model())
        begin = time.perf_counter()
        manifests.seal(Path(folder) / "state" / "1")
        return time.perf_counter() - begin


if __name__ == "__main__":
    run(main)
