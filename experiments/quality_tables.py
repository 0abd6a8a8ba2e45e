"""The sweep of quality against cost as files: JSON, Markdown with its conclusions, and a plot."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from diffusion_jax.evaluation import Estimate
from diffusion_jax.files import write_atomically
from experiments.quality import choose_within, cost_of, difference, front
from experiments.tables import Record, header, name_decades, table

BUDGETS = (5, 10, 25, 50, 100, 1000)  # network evaluations
FEW = 10  # evaluations that are held against DDPM at every step
MARGIN = 1.6  # what costs are extended by to either side, for the names of points
LINEAR = 0.01  # the KID up to which the scale is linear, for it may be negative
MARKERS, DASHES = "os^Dv", ("-", "--", ":", "-.", "-")  # for the scales of guidance


def write(folder: Path, record: Record) -> list[Path]:
    """Write quality.json, quality.md, which is printed too, and quality.png."""
    points = record["points"]
    record["front"] = {cost: front(points, cost) for cost in ("evaluations", "seconds")}
    record["advice"] = list(advice(points))
    text = markdown(record)
    print(text)
    paths = [folder / f"quality.{kind}" for kind in ("json", "md", "png")]
    write_atomically(paths[0], (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(paths[1], text.encode())
    write_atomically(paths[2], plot(record))
    return paths


def markdown(record: Record) -> str:
    """What was measured and how, what follows, and the table."""
    n, batch = record["n"], record["batch"]
    how = (
        f"{n} samples a point; real images: {record['origin']}. Errors are standard errors. An "
        "evaluation is an image seen by the network, so that a guided step has two. Seconds are "
        f"the median of a batch of {batch} on {record['devices']}, compiled before, all points "
        "taking turns."
    )
    parts = ["# Quality against cost", header(record["about"]), how]
    parts += ["\n".join(f"- {line}" for line in record["advice"]), points_table(record)]
    return "\n\n".join(parts) + "\n"


def points_table(record: Record) -> str:
    """The table of points, the cheapest first; those on the front of KID are marked."""
    best = [point["case"] + str(point["guidance"]) for point in record["front"]["evaluations"]]
    measures = _measures(record)
    titles = ["sampler", "guidance", "evaluations", "seconds", *measures, "front"]
    real = [str(Estimate(**record["real"][name])) for name in measures]
    lines = [["real against real", "", "", "", *real, ""]]
    for point in sorted(record["points"], key=lambda p: (p["evaluations"], p["KID"]["value"])):
        cells = [point["case"], f"{point['guidance']:g}", str(point["evaluations"])]
        cells += [f"{point['seconds']['median']:.3f}"]
        cells += [str(Estimate(**point[name])) for name in measures]
        cells += ["*" if point["case"] + str(point["guidance"]) in best else ""]
        lines.append(cells)
    return table(titles, lines)


def _measures(record: Record) -> list[str]:
    """KID and, of a run with context, class accuracy."""
    return [name for name in record["real"] if name in record["points"][0]]


def advice(points: Sequence[Record]) -> Iterator[str]:
    """What to use at which budget, a sentence each, and how the best few-step method compares."""
    before = None
    for budget in BUDGETS:
        chosen = choose_within(points, budget)
        if chosen is None or chosen == before:
            continue
        before = chosen
        cheapest, best = chosen
        line = f"With at most {budget} evaluations use {_words(cheapest)}"
        if cheapest is not best:
            line += f", within a standard error of the best, {_words(best)}"
        yield line + "."
    found = choose_within(points, FEW)
    full = [p for p in points if p["case"].split(":")[0] == "ddpm" and p["guidance"] == 1]
    if found and full and max(p["evaluations"] for p in full) > FEW:
        yield _comparison(found[1], max(full, key=lambda p: p["evaluations"]))


def _comparison(best: Record, full: Record) -> str:
    gap = difference(best, full)
    times = full["evaluations"] / best["evaluations"]
    saved = full["seconds"]["median"] / best["seconds"]["median"]
    return (
        f"The best of at most {FEW} evaluations, {_words(best)}, against {_words(full)}: KID "
        f"differs by {gap} ({gap.value / gap.error:+.1f} standard errors), for 1/{times:.0f} of "
        f"the evaluations and 1/{saved:.0f} of the time."
    )


def _words(point: Record) -> str:
    guided = "" if point["guidance"] == 1 else f" with guidance {point['guidance']:g}"
    return (
        f"{point['case']}{guided} ({point['evaluations']} evaluations, "
        f"{point['seconds']['median']:.2g} s, KID {Estimate(**point['KID'])})"
    )


def plot(record: Record) -> bytes:
    """KID and class accuracy against seconds and evaluations, with the front of KID, as PNG."""
    measures = _measures(record)
    size = (13, 4.2 * len(measures))
    figure, axes = plt.subplots(
        len(measures), 2, figsize=size, sharex="col", sharey="row", layout="constrained"
    )
    colours = _colours(record)
    for line, measure in zip(np.atleast_2d(axes), measures, strict=True):
        for place, cost in zip(line, ("seconds", "evaluations"), strict=True):
            _panel(place, record, measure, cost, colours)
        line[0].set_ylabel(measure)
    bottom = np.atleast_2d(axes)[-1]
    bottom[0].set_xlabel(f"seconds for {record['batch']} images, {record['devices']}")
    bottom[1].set_xlabel("network evaluations for an image")
    handles, labels = np.atleast_2d(axes)[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _series(point: Record) -> str:
    """A sampler with its options, without its steps."""
    name, _, *options = point["case"].split(":")
    return ":".join([name, *options])


def _colours(record: Record) -> dict[str, Any]:
    """A colour for each sampler on a front, and for DDPM and DDIM; others are grey."""
    best = [point for points in record["front"].values() for point in points]
    there = {_series(point) for point in record["points"]}
    names = [n for n in dict.fromkeys(["ddpm", "ddim", *map(_series, best)]) if n in there]
    return {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}


def _panel(place: Axes, record: Record, measure: str, cost: str, colours: dict[str, Any]) -> None:
    """One measure against one cost: a line for each sampler and guidance."""
    costs = [cost_of(point, cost) for point in record["points"]]
    place.set_xscale("log")
    name_decades(place.xaxis)
    place.set_xlim(min(costs) / MARGIN, max(costs) * MARGIN)
    _draw_lines(place, record["points"], measure, cost, colours)
    real = Estimate(**record["real"][measure])
    place.axhline(real.value, color="black", ls=":", lw=1, label="real against real")
    place.axhspan(real.value - real.error, real.value + real.error, color="0.9", zorder=0)
    place.margins(y=0.12)
    place.grid(alpha=0.3)
    if measure == "KID":
        _draw_front(place, record, cost)


def _draw_lines(
    place: Axes, points: Sequence[Record], measure: str, cost: str, colours: dict[str, Any]
) -> None:
    """Points joined by sampler and guidance, with error bars; those without a colour at first."""
    scales = sorted({point["guidance"] for point in points})
    lines: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    for point in points:
        line = lines.setdefault((_series(point), point["guidance"]), [])
        line.append((cost_of(point, cost), point[measure]["value"], point[measure]["error"]))
    others = "others"
    for name, scale in sorted(lines, key=lambda line: (line[0] in colours, line)):
        label = name + ("" if len(scales) == 1 else f", guidance {scale:g}")
        if name not in colours:
            label, others = others, "_"  # named once
        kind = scales.index(scale) % len(MARKERS)
        style: Record = {"color": colours.get(name, "0.75"), "label": label}
        style |= {"marker": MARKERS[kind], "ls": DASHES[kind]}
        x, y, error = np.array(sorted(lines[name, scale])).T
        place.errorbar(x, y, error, ms=4, lw=1, elinewidth=0.7, capsize=2, **style)


def _draw_front(place: Axes, record: Record, cost: str) -> None:
    """The Pareto front, on a scale that is linear about zero, with the names of points on both.

    In seconds, the front alone has points that are a matter of chance: what is as fast as others.
    """
    points = record["front"][cost]
    x, y = [cost_of(p, cost) for p in points], [p["KID"]["value"] for p in points]
    place.step(x, y, where="post", color="black", lw=1.2, alpha=0.6, label="Pareto front", zorder=1)
    place.set_yscale("symlog", linthresh=LINEAR)
    place.yaxis.set_major_formatter("{x:g}")
    for point, left, low in zip(points, x, y, strict=True):
        if not all(point in front for front in record["front"].values()):
            continue
        words = point["case"] + ("" if point["guidance"] == 1 else f" x{point['guidance']:g}")
        # Nothing lies below a front, to the left.
        where: Record = {"xytext": (-3, -3), "textcoords": "offset points", "ha": "right"}
        place.annotate(words, (left, low), va="top", rotation=30, fontsize=8, **where)
