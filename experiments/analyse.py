"""Compare samplers without a network: exact errors on Gaussian data, and orders of convergence.

  python -m experiments.analyse --samplers=ddim,heun,unipc:order=3 --steps=5,10,20,40
  python -m experiments.analyse --samplers=ddim --schedule=flow --grid=trailing
  python -m experiments.analyse --samplers=ddim,sa_solver --data=sprites
  python -m experiments.analyse --identify --steps=10

The data are Gaussian, so the exact denoiser and the distribution of every sampler's images are
known: their mean and deviation, so that the order of a method with noise is its weak order. They
have the given --mean and --deviation, or the mean and covariance of the images of --data. By
default the runs end at the schedule's first step, because the step to clean data is of order 1 in
every method. --identify prints which samplers are the same map; by default it compares those in
docs/samplers.md, on the grid trailing.
"""

import io
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from diffusion_jax import samplers
from diffusion_jax.data import DATA, load
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.files import write_atomically
from diffusion_jax.runs.locks import check_writable
from diffusion_jax.samplers import SAMPLERS
from diffusion_jax.tableau import analysis, identity
from diffusion_jax.tableau.analysis import Gaussian
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args, numbers

MOST_VALUES = 4096  # of an image, for its covariance
MOST_IMAGES = 50_000  # that a covariance is taken from

flags.DEFINE_integer("cpu_devices", 1, "CPU cores that count as devices")
flags.DEFINE_string(
    "samplers", None, "samplers, without their steps; by default ddim,heun,dpmpp_multistep,unipc"
)
flags.DEFINE_boolean("identify", False, "print which samplers are the same map")
app.SHOWN.update(app.CATALOGUES["sampler"])
flags.DEFINE_list("steps", ["5", "10", "20", "40", "80"], "numbers of steps, ascending")
flags.DEFINE_string("schedule", "course", "the noise schedule")
app.SHOWN["schedule"] = (schedules.SCHEDULES, ())
flags.DEFINE_string(
    "grid",
    None,
    "the levels that the steps visit; by default uniform_logsnr:to_zero=false, or trailing if the "
    "schedule ends in pure noise",
)
flags.DEFINE_list("mean", ["0.0", "0.5"], "the means of the data's coordinates")
flags.DEFINE_list("deviation", ["0.1", "0.5"], "their standard deviations")
flags.DEFINE_string("data", None, "a data set, whose mean and covariance are used instead")
app.SHOWN["data"] = (DATA, ())
flags.DEFINE_string("out", "analysis.png", "the picture's file, a .png")


def main(args: Args) -> None:
    """Print a table and draw a picture, or print which samplers are the same map."""
    schedule, texts, grid = schedules.build(args.schedule), args.samplers, args.grid
    steps = numbers("steps", args.steps, int)
    require(steps == sorted(set(steps)), f"steps={args.steps}: they must ascend")
    if args.identify:
        args.refuse_unread("--identify")
        identify(texts, schedule, grid or "trailing", steps)
        return
    out = Path(args.out)
    fits = out.suffix == ".png" and not out.is_dir()
    require(fits, f"out={args.out!r}: it must be a file that ends in .png")
    check_writable(out.parent, "out")
    data = read_data(args)
    if grid is None:
        finite = np.isfinite(schedule.ratio[-1])
        grid = "uniform_logsnr:to_zero=false" if finite else "trailing"
    print(f"{'sampler':22} {'order':>6}  error (network evaluations)")
    curves = {}
    for text in samplers.split(texts or "ddim,heun,dpmpp_multistep,unipc"):
        calls, errors = errors_of(text, schedule, grid, steps, data)
        order = f"{analysis.fit_order(calls[-3:], errors[-3:]):.2f}" if len(steps) > 1 else ""
        pairs = zip(errors, calls, strict=True)
        print(f"{text:22} {order:>6}  " + "  ".join(f"{e:.2e} ({n})" for e, n in pairs))
        curves[text] = (calls, errors)
    draw(curves, out)


def read_data(args: Args) -> Gaussian:
    """Return the Gaussian data that the flags describe. Raise InputError if they are invalid."""
    if args.data is not None:
        images = load(args.data).images
        size = int(np.prod(images.shape[1:]))
        few = f"data={args.data}: images of {size} values: they must have at most {MOST_VALUES}"
        require(size <= MOST_VALUES, few)
        require(len(images) > 1, f"data={args.data}: one image has no covariance: give more")
        used = images[:MOST_IMAGES].reshape(-1, size)
        data = analysis.spectrum(used / np.float32(127.5) - np.float32(1))
        total, largest = np.sqrt(data.variance.sum()), np.sqrt(data.variance[-1])
        args.refuse_unread("--data")
        print(f"{len(used)} images: deviation {total:.3f}, {largest:.3f} in the largest direction")
        return data
    mean = np.array(numbers("mean", args.mean))
    deviation = np.array(numbers("deviation", args.deviation))
    finite = np.all(np.isfinite([*mean, *deviation]))
    require(finite, f"mean={mean}, deviation={deviation}: they must be finite")
    require(len(mean) == len(deviation), "mean and deviation: they must be of one length")
    return Gaussian(mean, deviation**2)


def identify(texts: str | None, schedule: NoiseSchedule, grid: str, steps: list[int]) -> None:
    """Print the groups of samplers that are the same map, each with its numbers of steps."""
    documented = [text for _, same in identity.EQUAL for text in same.split()]
    names = samplers.split(texts) if texts else [*dict.fromkeys([*SAMPLERS, *documented])]
    found: dict[tuple[str, ...], list[int]] = {}
    for n in steps:
        groups = identity.group({name: samplers.build(name, schedule, n, grid) for name in names})
        print(f"{n} steps, grid {grid}: {len(names)} samplers are {len(groups)} maps")
        for members in groups:
            found.setdefault(tuple(members), []).append(n)
    for same, where in found.items():
        if len(same) > 1:
            print(f"at {', '.join(map(str, where))}: {' = '.join(same)}")


def errors_of(
    text: str, schedule: NoiseSchedule, grid: str, steps: list[int], data: Gaussian
) -> tuple[np.ndarray, np.ndarray]:
    """Return the evaluations and the exact errors of a sampler at each number of steps."""
    given = [grids.build(grid, schedule, n) for n in steps]
    tableaus = [samplers.build(text, schedule, each.steps, each) for each in given]
    ends = [each.levels[-1] for each in given]
    found = [analysis.error(one, data, end) for one, end in zip(tableaus, ends, strict=True)]
    return np.array([tableau.rows for tableau in tableaus]), np.array(found)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw error against network evaluations on logarithmic axes."""
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
    app.run(main)
