"""Markdown tables and plots of quality against cost, for the benchmark and the sweep."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from diffusion_jax.evaluation import Estimate
from diffusion_jax.evaluation.sweep import Point, front

ALWAYS = ("ddpm", "ddim")  # series that have a colour even if they are not on a front
LINEAR = 0.01  # up to this value an axis is linear, because values can be negative
MARGIN = 1.6  # factor that extends the axis of costs, for the names of points


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def header(about: Mapping[str, Any]) -> str:
    """Return a line about hardware, versions and date. about: from environment.describe."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    flags = " ".join(word for word in about["command"][1:]) or "none"
    return f"{about['processor']}, {about['time']}, {versions}.\n\nFlags: `{flags}`"


def plot(
    points: Sequence[Point],
    costs: Mapping[str, str],
    real: Mapping[str, Estimate] | None = None,
) -> bytes:
    """Return a PNG with a row of panels for each measure and a column for each cost.

    costs: the labels of the axes of "seconds" and "evaluations". real: the measures of real images.
    A line joins the points of a series. The Pareto front of the first measure is drawn. Points on
    all fronts are named.
    """
    names, colours = list(points[0].measures), _colours(points, costs)
    size = (13, 4.2 * len(names))
    figure, axes = plt.subplots(
        *(len(names), len(costs)),
        figsize=size,
        sharex="col",
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for place, cost in zip(axes[0], costs, strict=True):
        values = [getattr(point, cost) for point in points]
        place.set(xscale="log", xlim=(min(values) / MARGIN, max(values) * MARGIN))
    exact = [point.quality.value for point in points if point.quality.error == 0]
    if len(exact) == len(points) and min(exact) > 0:
        axes[0, 0].set(yscale="log", ylim=(min(exact) / MARGIN, max(exact) * MARGIN))
    else:
        axes[0, 0].set_yscale("symlog", linthresh=LINEAR)
    for name, row in zip(names, axes, strict=True):
        for cost, place in zip(costs, row, strict=True):
            _draw_lines(place, points, name, cost, colours)
            if real:
                value, error = real[name]
                place.axhline(value, color="black", ls=":", lw=1, label="real against real")
                place.axhspan(value - error, value + error, color="0.9", zorder=0)
        row[0].set_ylabel(name)
    for place, cost in zip(axes[0], costs, strict=True):
        named = [p for p in points if all(p in front(points, each) for each in costs)]
        _draw_front(place, front(points, cost), cost, named)
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter("{x:g}")
        place.xaxis.set_minor_formatter(NullFormatter())
    for place, label in zip(axes[-1], costs.values(), strict=True):
        place.set_xlabel(label)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _colours(points: Sequence[Point], costs: Iterable[str]) -> dict[str, Any]:
    """Return a colour for each series on a front and for each series in ALWAYS."""
    found = [point.series for cost in costs for point in front(points, cost)]
    there = {point.series for point in points}
    names = [name for name in dict.fromkeys([*ALWAYS, *found]) if name in there]
    return {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}


def _draw_lines(
    place: Axes, points: Sequence[Point], name: str, cost: str, colours: Mapping[str, Any]
) -> None:
    """Join the points of each series, with error bars. Series without a colour lie below."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for point in points:
        line = lines.setdefault(point.series, [])
        line.append((getattr(point, cost), *point.measures[name]))
    others = "others"
    for series in sorted(lines, key=lambda series: (series in colours, series)):
        label = series
        if series not in colours:
            label, others = others, "_"  # one entry of the legend for all of them
        x, y, error = np.array(sorted(lines[series])).T
        style: dict[str, Any] = {"color": colours.get(series, "0.75"), "label": label}
        place.errorbar(x, y, error, marker="o", ms=4, lw=1, elinewidth=0.7, capsize=2, **style)
    place.margins(y=0.12)
    place.grid(alpha=0.3)


def _draw_front(place: Axes, best: Sequence[Point], cost: str, named: Sequence[Point]) -> None:
    """Draw a front. Names are below and left of its points, where there are no other points."""
    x, y = [getattr(point, cost) for point in best], [point.quality.value for point in best]
    place.step(x, y, where="post", color="black", lw=1.2, alpha=0.6, label="Pareto front", zorder=1)
    style: dict[str, Any] = {"xytext": (-3, -3), "textcoords": "offset points", "fontsize": 8}
    style |= {"ha": "right", "va": "top", "rotation": 30}
    for point in named:
        place.annotate(point.label, (getattr(point, cost), point.quality.value), **style)
