"""The exact error of samplers on Gaussian data, without sampling: no network, no noise drawn.

  python -m experiments.analyse
  python -m experiments.analyse --samplers=ddim,heun,unipc --grid=karras --steps=5,10,20,40
  python -m experiments.analyse --samplers=dpmpp_multistep --options=order=3,rule=exact

Prints the 2-Wasserstein distance to the data for each number of network evaluations, and the order
of convergence fitted to the last three; writes analysis.png. By default the grid ends at the
schedule's first step: the step to clean data is of order 1 in every method.
"""

import inspect
import io
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from diffusion_jax import samplers, schedules
from diffusion_jax.files import write_atomically
from diffusion_jax.grids import GRIDS
from diffusion_jax.locks import check_writable
from diffusion_jax.samplers import SAMPLERS, analysis
from diffusion_jax.samplers.analysis import Gaussian
from diffusion_jax.schedules import SCHEDULES
from diffusion_jax.typing import choose, require
from experiments.flags import FLAGS, finite_grid, numbers, options, refuse_unread, run

flags.DEFINE_integer("cpu_devices", 1, "CPU cores to use as devices")
flags.DEFINE_list(
    "samplers", ["ddim", "heun", "dpmpp_multistep", "unipc"], f"from {', '.join(SAMPLERS)}"
)
flags.DEFINE_list("steps", ["5", "10", "20", "40", "80"], "numbers of steps, ascending")
flags.DEFINE_enum("schedule", "notes", list(SCHEDULES), "the noise schedule")
flags.DEFINE_integer("timesteps", 500, "T, the number of steps of the noise schedule")
flags.DEFINE_enum(
    "grid",
    None,
    list(GRIDS),
    "which levels the steps visit; by default uniform_logsnr, or trailing where it has no end",
)
flags.DEFINE_bool("to_zero", False, "end with the step to clean data, not at the first level")
flags.DEFINE_list("options", [], "options of the samplers and the grid, such as order=3,rho=5")
flags.DEFINE_list("mean", ["0.0", "0.5"], "the means of the data's coordinates")
flags.DEFINE_list("deviation", ["0.1", "0.5"], "their standard deviations")
flags.DEFINE_string("out", "analysis.png", "the picture's file, a .png")


def main() -> None:
    """Print a table and draw a picture."""
    out = Path(FLAGS.out)
    fits = out.suffix == ".png" and not out.is_dir()
    require(fits, f"out={FLAGS.out!r}: it must be a file that ends in .png")
    check_writable(out.parent, "out")
    schedule = schedules.build(FLAGS.schedule, FLAGS.timesteps)
    steps = numbers("steps", int)
    require(steps == sorted(set(steps)), f"steps={FLAGS.steps}: they must ascend")
    mean, deviation = np.array(numbers("mean")), np.array(numbers("deviation"))
    finite = np.all(np.isfinite([*mean, *deviation]))
    require(finite, f"mean={mean}, deviation={deviation}: they must be finite")
    require(len(mean) == len(deviation), "mean and deviation: they must be of one length")
    data = Gaussian(mean, deviation**2)
    given = options(FLAGS.options)
    grid, end = FLAGS.grid or finite_grid(schedule), analysis.CLEAN
    if "to_zero" not in inspect.signature(GRIDS[grid]).parameters:
        refuse_unread(f"--grid={grid}", "to_zero")
    elif not FLAGS.to_zero:
        end = schedule.level(1.0)
        given["to_zero"] = False
    print(f"{'sampler':22} {'order':>6}  error (network evaluations)")
    curves = {}
    for name in FLAGS.samplers:
        choose(SAMPLERS, "samplers", name)
        tables = [samplers.build(name, schedule, n, grid, **given) for n in steps]
        calls = np.array([table.rows for table in tables])
        errors = np.array([analysis.error(table, data, end) for table in tables])
        order = f"{analysis.fit_order(calls[-3:], errors[-3:]):.2f}" if len(steps) > 1 else ""
        pairs = zip(errors, calls, strict=True)
        print(f"{name:22} {order:>6}  " + "  ".join(f"{e:.2e} ({n})" for e, n in pairs))
        curves[name] = (calls, errors)
    draw(curves, out)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Error against network evaluations, both in logarithms."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (calls, errors) in curves.items():
        axes.loglog(calls, errors, marker="o", label=name)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("2-Wasserstein distance to the data")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    write_atomically(path, buffer.getvalue())
    print(f"written: {path}")


if __name__ == "__main__":
    run(main)
