"""Markdown tables of rows, and plots of quality against cost."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from diffusion_jax.evaluation import Estimate
from diffusion_jax.evaluation.sweep import Point, front

ALWAYS = ("ddpm", "ddim")  # series that have a colour even if they are not on a front
MARGIN = 1.6  # factor that extends an axis, for the names of points

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of rows, with a column for each name in any of them."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[cell(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Return a value as text. A mapping with a median is written with its percentiles."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        median, low, high = (cell(value[name]) for name in ("median", "p10", "p90"))
        return f"{median} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def header(about: Row) -> str:
    """Return a line about hardware, versions and date. about: from environment.describe."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    flags = " ".join(word for word in about["command"][1:]) or "none"
    return f"{about['processor']}, {about['time']}, {versions}.\n\nFlags: `{flags}`"


def plot(
    points: Sequence[Point],
    costs: Mapping[str, str],
    measures: Sequence[str],
    real: Mapping[str, Estimate] | None = None,
) -> bytes:
    """Return a PNG with a row of panels for each measure and a column for each cost.

    costs: the labels of the axes of "seconds" and "evaluations". measures: names, of which those
    that the points have are drawn. real: the measures of real images.
    A line joins the points of a series. The Pareto front of the first measure is drawn. Points on
    all fronts are named.
    """
    names = [name for name in measures if name in points[0].measures]
    fronts = {cost: front(points, cost) for cost in costs}
    series = dict.fromkeys([*ALWAYS, *(p.series for each in fronts.values() for p in each)])
    colours = {name: colormaps["tab10"](i % 10) for i, name in enumerate(series)}
    figure = Figure(figsize=(13, 4.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(costs), squeeze=False, sharex="col", sharey="row")
    for name, row in zip(names, panels, strict=True):
        row[0].set_ylabel(name)
        for cost, axes in zip(costs, row, strict=True):
            _draw_lines(axes, points, name, cost, colours)
            if real:
                value, error = real[name].value, real[name].error
                axes.axhline(value, color="black", ls=":", lw=1, label="real against real")
                axes.axhspan(value - error, value + error, color="0.9", zorder=0)
    named = [p for p in points if all(p in each for each in fronts.values())]
    for (cost, label), column in zip(costs.items(), panels.T, strict=True):
        values = [getattr(point, cost) for point in points]
        column[0].set(xscale="log", xlim=(min(values) / MARGIN, max(values) * MARGIN))
        column[0].xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        column[0].xaxis.set_minor_formatter(NullFormatter())
        column[-1].set_xlabel(label)
        _draw_front(column[0], fronts[cost], cost, named)
    _scale(panels[0, 0], [point.quality for point in points])
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(buffer := io.BytesIO(), dpi=110, format="png")
    return buffer.getvalue()


def _scale(axes: Axes, found: Sequence[Estimate]) -> None:
    """Scale exact positive values logarithmically, and estimates linearly up to their errors."""
    values, errors = [each.value for each in found], [each.error for each in found]
    if not any(errors) and min(values) > 0:
        axes.set(yscale="log", ylim=(min(values) / MARGIN, max(values) * MARGIN))
    else:
        axes.set_yscale("symlog", linthresh=float(np.median(errors)) or 0.01)


def _draw_lines(
    axes: Axes, points: Sequence[Point], name: str, cost: str, colours: Mapping[str, Any]
) -> None:
    """Join the points of each series, with error bars. Series without a colour lie below."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for point in points:
        found = point.measures[name]
        lines.setdefault(point.series, []).append((getattr(point, cost), found.value, found.error))
    others = "others"
    for series in sorted(lines, key=lambda series: (series in colours, series)):
        label = series
        if series not in colours:
            label, others = others, "_"  # one entry of the legend for all of them
        style: dict[str, Any] = {"color": colours.get(series, "0.75"), "label": label}
        axes.errorbar(
            *np.array(sorted(lines[series])).T, marker="o", ms=4, lw=1, capsize=2, **style
        )
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)


def _draw_front(axes: Axes, best: Iterable[Point], cost: str, named: Sequence[Point]) -> None:
    """Draw a front. Names are below and left of its points, where the plot is empty."""
    places = {point.label: (getattr(point, cost), point.quality.value) for point in best}
    x, y = zip(*places.values(), strict=True)
    axes.step(x, y, where="post", color="black", lw=1.2, alpha=0.6, label="Pareto front", zorder=1)
    style: dict[str, Any] = {"xytext": (-3, -3), "textcoords": "offset points", "fontsize": 8}
    style |= {"ha": "right", "va": "top", "rotation": 30}
    for point in named:
        axes.annotate(point.label, places[point.label], **style)
