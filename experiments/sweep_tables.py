"""Write the results of a sweep: a table, the conclusions, and a plot."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.evaluation import Estimate
from diffusion_jax.evaluation.sweep import Point, choose_within, difference, front
from diffusion_jax.files import write_atomically
from experiments.tables import header, plot, table

Row = Mapping[str, Any]
BUDGETS = (5, 10, 25, 50, 100, 1000)  # network evaluations
FEW = 10  # the best of at most these evaluations is compared with DDPM at every step
MEASURES = {
    "KID": "KID",
    "Frechet": "Frechet",
    "class accuracy": "class accuracy",
    "precision": "precision",
    "recall": "recall",
    "part near training": "near training",
}
PLOTTED = ("KID", "class accuracy")
HOW = (
    "{n} samples of each case; real images: {origin}. Errors are standard errors. An evaluation "
    "is an image seen by the network, so that a guided step has two. Seconds are those of all "
    "samples, on {devices}, without compilation."
)


def write(folder: Path, rows: Sequence[Row], about: Row) -> list[Path]:
    """Write results.md and results.png, and return their paths."""
    points = [point(row, rows) for row in rows]
    lines = "\n".join(f"- {sentence}" for sentence in advice(points))
    parts = ["# Quality against cost", header(about), HOW.format(**about), lines]
    text = "\n\n".join([part for part in parts if part] + [results(rows, points)]) + "\n"
    costs = {"seconds": f"seconds for {about['n']} images", "evaluations": "network evaluations"}
    real = {name: each for name, each in measures(rows[0]["real"]).items() if name in PLOTTED}
    paths = [folder / "results.md", folder / "results.png"]
    write_atomically(paths[0], text.encode())
    write_atomically(paths[1], plot(points, costs, real))
    return paths


def measures(found: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    """Return the measures to show, keyed by name in the table. KID is that of the first space."""
    chosen = {}
    for start, name in MEASURES.items():
        for key in [key for key in found if key.split(",")[0] == start][:1]:
            chosen[name] = Estimate(*found[key])
    return chosen


def point(row: Row, rows: Sequence[Row]) -> Point:
    """Return a row as a point of the plot. Its name leaves out what all rows share."""
    guided = "" if row["guidance"] == "1" else f", guidance {row['guidance']}"
    several = len({each["subject"] for each in rows}) > 1
    name = f"{row['subject']}, " if several else ""
    found = {k: v for k, v in measures(row["samples"]).items() if k in PLOTTED}
    label, series = (f"{name}{row[key]}{guided}" for key in ("sampler", "series"))
    return Point(label, series, row["evaluations"], row["seconds"], found)


def line(row: Row) -> str:
    """Return a result as a line to print."""
    found = ", ".join(f"{name} {each}" for name, each in measures(row["samples"]).items())
    return f"{row['subject']}, {row['sampler']}, guidance {row['guidance']}: {found}"


def results(rows: Sequence[Row], points: Sequence[Point]) -> str:
    """Return the table, cheapest rows first. Rows on the front of KID are marked."""
    names, best = list(measures(rows[0]["samples"])), front(points, "evaluations")
    real = measures(rows[0]["real"])
    titles = ["run", "sampler", "guidance", "evaluations", "seconds", *names, "front"]
    lines = [["real against real", *[""] * 4, *(str(real[name]) for name in names), ""]]
    for row, each in sorted(zip(rows, points, strict=True), key=lambda pair: pair[1][2:3]):
        cells = [row["subject"], row["sampler"], row["guidance"], str(row["evaluations"])]
        cells += [f"{row['seconds']:.3g}"]
        cells += [str(measures(row["samples"]).get(name, "")) for name in names]
        lines.append([*cells, "*" if each in best else ""])
    return table(titles, lines)


def advice(points: Sequence[Point]) -> Iterator[str]:
    """Yield the sampler to use for each budget, and a comparison of the best one with DDPM."""
    before = None
    for budget in BUDGETS:
        chosen = choose_within(points, budget)
        if chosen in (None, before):
            continue
        assert chosen is not None
        before, (cheapest, best) = chosen, chosen
        words = f"With at most {budget} evaluations use {_words(cheapest)}"
        if cheapest is not best:
            words += f", within a standard error of the best, {_words(best)}"
        yield words + "."
    few = choose_within(points, FEW)
    full = [p for p in points if p.series == "ddpm" and p.evaluations > FEW]
    if few and full:
        yield _comparison(few[1], max(full, key=lambda p: p.evaluations))


def _comparison(best: Point, full: Point) -> str:
    gap = difference(best, full)
    return (
        f"The best of at most {FEW} evaluations, {_words(best)}, against {_words(full)}: KID "
        f"differs by {gap} ({gap.value / gap.error:+.1f} standard errors), for "
        f"1/{full.evaluations / best.evaluations:.0f} of the evaluations and "
        f"1/{full.seconds / best.seconds:.0f} of the time."
    )


def _words(point: Point) -> str:
    return (
        f"{point.label} ({point.evaluations} evaluations, {point.seconds:.2g} s, "
        f"KID {point.quality})"
    )
