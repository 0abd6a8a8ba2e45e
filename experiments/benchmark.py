"""Time the sampling loop against bare forward passes of the same network, and count compilations.

python -m experiments.benchmark
python -m experiments.benchmark --run=checkpoints/demo --n=32 --repeats=9
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion_jax import parallel, samplers, timing
from diffusion_jax.config import Config, at_least
from diffusion_jax.runs import Model, init_variables, load_model
from diffusion_jax.sampling import sample
from experiments.flags import FLAGS, define_devices, describe, run

CASES = (("ddpm", 500), ("ddim", 25))
SWEEP = (5, 20, 25, 100, 500)
BARE = 25  # bare forward passes in a measurement

define_devices()
flags.DEFINE_string("run", None, "a run folder; by default the notes' network, untrained")
flags.DEFINE_integer("n", 32, "images at once")
flags.DEFINE_integer("repeats", 5, "runs of each; the median counts")


def main() -> None:
    """Print a table of seconds, and the compilations of a sweep."""
    at_least("n", FLAGS.n, 1)
    at_least("repeats", FLAGS.repeats, 1)
    devices = parallel.choose_devices(FLAGS.n, FLAGS.devices)
    model = load_model(FLAGS.run) if FLAGS.run else untrained()
    print(f"{FLAGS.n} images on {describe(devices)}, medians of {FLAGS.repeats} (p10 to p90)")
    draw = partial(sample, model, n=FLAGS.n, devices=devices)
    tableaus = {
        f"{name}-{steps}": samplers.build(name, model.schedule, steps) for name, steps in CASES
    }
    candidates: dict[str, Callable[[], Any]] = {
        label: partial(draw, tableau) for label, tableau in tableaus.items()
    }
    forward = bare_forward(model, FLAGS.n, devices)
    candidates[f"{BARE} bare forward passes"] = lambda: [forward() for _ in range(BARE)]
    timings = timing.interleave(candidates, FLAGS.repeats)
    bare = timings[f"{BARE} bare forward passes"].median / BARE
    for label, (median, p10, p90) in timings.items():
        passes = tableaus[label].rows if label in tableaus else BARE
        print(
            f"{label:24} {median:8.3f} s ({p10:.3f} to {p90:.3f})  "
            f"{1000 * median / passes:7.2f} ms a pass, {median / passes / bare:.3f} bare"
        )
    count_compilations(draw, model)


def untrained() -> Model:
    """The notes' network with its initial weights."""
    config = Config()
    network = config.network.build()
    return Model(config, network, config.diffusion.build(), init_variables(network, 0))


def bare_forward(model: Model, n: int, devices: list[jax.Device]) -> Callable[[], Any]:
    """One forward pass of n images, compiled by itself, on the same devices."""
    network = model.network
    x = np.random.default_rng(0).normal(size=(n, *image_shape(network))).astype(np.float32)
    context = np.zeros((n, network.n_cfeat), np.float32)
    apply = parallel.data_parallel(network.apply, (None, 0, None, 0), 0, devices=devices)
    variables = parallel.replicate(model.variables, devices)
    x, context = jax.device_put(parallel.split((x, context), len(devices)))
    return lambda: apply(variables, x, np.float32(0.5), context)


def image_shape(network: Any) -> tuple[int, int, int]:
    """Height, width and channels of a network's images."""
    return network.height, network.height, network.in_channels


def count_compilations(draw: Callable, model: Model) -> None:
    """Print how many programs a sweep over samplers and steps compiles, after one run."""
    with timing.counting() as compilations:
        for name in samplers.SAMPLERS:
            for steps in SWEEP:
                draw(samplers.build(name, model.schedule, steps), rows=1)
    cases = f"{', '.join(samplers.SAMPLERS)} at {', '.join(map(str, SWEEP))} steps"
    print(f"compilations in a sweep of {cases}: {compilations.count}")


if __name__ == "__main__":
    run(main)
