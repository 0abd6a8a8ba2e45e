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
from diffusion_jax.pictures import write_atomically
from experiments.quality import choose_within, difference, front
from experiments.tables import Record, header, table

BUDGETS = (5, 10, 25, 50, 100, 1000)  # network evaluations
FEW = 10  # evaluations that are held against DDPM at every step
MARKERS = "os^Dv"  # for the scales of guidance
MEASURES = {"KID": "KID", "class accuracy": "class accuracy"}


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
    measures = list(record["real"])
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
    measures = [name for name in MEASURES if name in record["real"]]
    size = (13, 4.2 * len(measures))
    figure, axes = plt.subplots(
        len(measures), 2, figsize=size, sharex="col", sharey="row", layout="constrained"
    )
    colours = _colours(record)
    for line, measure in zip(np.atleast_2d(axes), measures, strict=True):
        for place, cost in zip(line, ("seconds", "evaluations"), strict=True):
            _panel(place, record, measure, cost, colours)
        line[0].set_ylabel(MEASURES[measure])
    bottom = np.atleast_2d(axes)[-1]
    bottom[0].set_xlabel(f"seconds for {record['batch']} images, {record['devices']}")
    bottom[1].set_xlabel("network evaluations for an image")
    handles, labels = np.atleast_2d(axes)[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _colours(record: Record) -> dict[str, Any]:
    """A colour for each sampler on a front, and for DDPM and DDIM; others are grey."""
    best = [point for points in record["front"].values() for point in points]
    names = dict.fromkeys(["ddpm", "ddim", *(point["case"].split(":")[0] for point in best)])
    there = {point["case"].split(":")[0] for point in record["points"]}
    return {
        name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(n for n in names if n in there)
    }


def _panel(place: Axes, record: Record, measure: str, cost: str, colours: dict[str, Any]) -> None:
    """One measure against one cost: a line for each sampler and guidance."""
    scales = sorted({point["guidance"] for point in record["points"]})
    names = dict.fromkeys(point["case"].split(":")[0] for point in record["points"])
    grey = True
    for name in sorted(names, key=lambda name: name in colours):  # the grey ones lie below
        for scale, marker in zip(scales, MARKERS * len(scales), strict=False):
            chosen = [
                (_cost(point, cost), *point[measure].values())
                for point in record["points"]
                if (point["case"].split(":")[0], point["guidance"]) == (name, scale)
            ]
            if not chosen:
                continue
            x, y, error = np.array(sorted(chosen)).T
            label = name + ("" if len(scales) == 1 else f", guidance {scale:g}")
            if name not in colours:
                label, grey = ("others" if grey else "_"), False
            style: Record = {"color": colours.get(name, "0.75"), "marker": marker, "label": label}
            place.errorbar(x, y, error, ms=4, lw=1, elinewidth=0.7, capsize=2, **style)
    real = Estimate(**record["real"][measure])
    place.axhline(real.value, color="black", ls=":", lw=1, label="real against real")
    place.axhspan(real.value - real.error, real.value + real.error, color="0.9", zorder=0)
    place.set_xscale("log")
    place.grid(alpha=0.3)
    if measure == "KID":
        _draw_front(place, record, cost)


def _draw_front(place: Axes, record: Record, cost: str) -> None:
    """The Pareto front with its points' names, on a scale that is linear about zero."""
    points = record["front"][cost]
    x, y = (
        [get(p) for p in points] for get in (lambda p: _cost(p, cost), lambda p: p["KID"]["value"])
    )
    place.step(x, y, where="post", color="black", lw=1.2, alpha=0.6, label="Pareto front", zorder=1)
    place.set_yscale("symlog", linthresh=0.01)
    for point, left, low in zip(points, x, y, strict=True):
        words = point["case"] + ("" if point["guidance"] == 1 else f" x{point['guidance']:g}")
        place.annotate(words, (left, low), xytext=(2, -11), textcoords="offset points", fontsize=8)


def _cost(point: Record, name: str) -> float:
    return point["seconds"]["median"] if name == "seconds" else point[name]
