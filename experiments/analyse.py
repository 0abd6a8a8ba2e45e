"""The exact error of samplers on Gaussian data, without sampling: no network, no noise drawn.

  python -m experiments.analyse
  python -m experiments.analyse --samplers=ddim,heun,unipc --grid=karras --steps=5,10,20,40
  python -m experiments.analyse --samplers=dpmpp_multistep --options=order=3,rule=exact

Prints the 2-Wasserstein distance to the data for each number of network evaluations, and the order
of convergence fitted to the last three; writes analysis.png. By default the grid ends at the
schedule's first step: the step to clean data is of order 1 in every method.
"""

import inspect
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from diffusion_jax import samplers, schedules
from diffusion_jax.grids import GRIDS
from diffusion_jax.samplers import SAMPLERS, analysis
from diffusion_jax.samplers.analysis import Gaussian
from diffusion_jax.schedules import SCHEDULES
from diffusion_jax.typing import choose, require
from experiments.flags import FLAGS, define_devices, numbers, options, run

define_devices()
flags.DEFINE_list(
    "samplers", ["ddim", "heun", "dpmpp_multistep", "unipc"], f"from {', '.join(SAMPLERS)}"
)
flags.DEFINE_list("steps", ["5", "10", "20", "40", "80"], "numbers of steps, ascending")
flags.DEFINE_enum("schedule", "notes", list(SCHEDULES), "the noise schedule")
flags.DEFINE_integer("timesteps", 500, "T, the number of steps of the noise schedule")
flags.DEFINE_enum("grid", "uniform_logsnr", list(GRIDS), "which levels the steps visit")
flags.DEFINE_bool("to_zero", False, "end with the step to clean data, not at the first level")
flags.DEFINE_list("options", [], "options of the samplers and the grid, such as order=3,rho=5")
flags.DEFINE_list("mean", ["0.0", "0.5"], "the means of the data's coordinates")
flags.DEFINE_list("deviation", ["0.1", "0.5"], "their standard deviations")
flags.DEFINE_string("out", "analysis.png", "the picture's file")


def main() -> None:
    """Print a table and draw a picture."""
    schedule = schedules.build(FLAGS.schedule, FLAGS.timesteps)
    steps = numbers("steps", int)
    require(steps == sorted(set(steps)), f"steps={FLAGS.steps}: they must ascend")
    mean, deviation = np.array(numbers("mean")), np.array(numbers("deviation"))
    finite = np.all(np.isfinite([*mean, *deviation]))
    require(finite, f"mean={mean}, deviation={deviation}: they must be finite")
    require(len(mean) == len(deviation), "mean and deviation: they must be of one length")
    data = Gaussian(mean, deviation**2)
    given = options(FLAGS.options)
    end = analysis.CLEAN
    if not FLAGS.to_zero and "to_zero" in inspect.signature(GRIDS[FLAGS.grid]).parameters:
        end = schedule.level(1.0)
        given["to_zero"] = False
    print(f"{'sampler':22} {'order':>6}  error (network evaluations)")
    curves = {}
    for name in FLAGS.samplers:
        choose(SAMPLERS, "samplers", name)
        tables = [samplers.build(name, schedule, n, FLAGS.grid, **given) for n in steps]
        calls = np.array([table.rows for table in tables])
        errors = np.array([analysis.error(table, data, end) for table in tables])
        order = f"{analysis.fit_order(calls[-3:], errors[-3:]):.2f}" if len(steps) > 1 else ""
        pairs = zip(errors, calls, strict=True)
        print(f"{name:22} {order:>6}  " + "  ".join(f"{e:.2e} ({n})" for e, n in pairs))
        curves[name] = (calls, errors)
    draw(curves)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Error against network evaluations, both in logarithms."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (calls, errors) in curves.items():
        axes.loglog(calls, errors, marker="o", label=name)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("2-Wasserstein distance to the data")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(FLAGS.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
