"""The benchmark's results as files: JSON, Markdown tables, and the plot of error against cost."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter

from diffusion_jax.files import write_atomically

Record = dict[str, Any]
T = TypeVar("T")
HEAD = ("case", "batch", "dtype", "devices", "candidate")


def write(folder: Path, record: Record) -> list[Path]:
    """Write results.json, results.md, which is printed too, and results.png of known errors."""
    text = markdown(record)
    print(text)
    paths = [folder / "results.json", folder / "results.md"]
    write_atomically(paths[0], (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(paths[1], text.encode())
    if points(record):
        paths.append(folder / "results.png")
        write_atomically(paths[-1], plot(record))
    return paths


def markdown(record: Record) -> str:
    """All tables, under the hardware and the versions."""
    about, peaks = record["about"], record["peaks"]
    parts = [
        f"# Benchmark: {about['devices']}",
        header(about),
        "\n".join(
            f"Limit in {dtype}: {_giga(peak['matmul'])} GFLOP/s in a large matrix product, "
            f"{_giga(peak['convolution'])} in a large 3x3 convolution."
            for dtype, peak in peaks.items()
        ),
        "## Runs\n\n" + runs(record["rows"]),
        "## Programs\n\n" + programs(record),
    ]
    if sweep := record.get("sweep"):
        parts.append(
            f"A sweep of {len(sweep['samplers'])} samplers over {_word(sweep['steps'])} steps "
            f"({sweep['runs']} runs) compiles {sweep['compilations']} programs, from none."
        )
    for alone in record["alone"]:
        parts.append("The peers' bare passes before anything takes turns: " + _alone(alone))
    if record["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in record["notes"]))
    return "\n\n".join(parts) + "\n"


def header(about: Record) -> str:
    """What the numbers were made with."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    flags = " ".join(f"--{name}={_word(value)}" for name, value in about["flags"].items())
    return (
        f"{about['processor']}, {about['date']}, Python {about['python']}, {versions}.\n\n"
        f"Flags: {flags or 'none'}"
    )


def runs(rows: Iterable[Record]) -> str:
    """The table of runs: seconds are medians (p10 to p90)."""
    titles = [*HEAD, "passes or steps", "runs", "seconds", "images/s", "GFLOP/s"]
    titles += ["of matmul", "of conv", "overhead, %", "a pass, times ours", "error"]
    lines = []
    for row in rows:
        cells = [str(row[name]) for name in HEAD] + [str(row["evaluations"]), str(row["runs"])]
        rate = row.get("images_per_second")
        cells += [_spread(row["seconds"]), f"{rate:.1f}" if rate else ""]
        cells += [_giga(row["flop_per_second"])]
        cells += [f"{row['of_matmul']:.2f}", f"{row['of_convolution']:.2f}"]
        cells += [_spread(row.get("overhead_percent"), 1), _spread(row.get("times_ours"), 2)]
        cells += ["" if row.get("error") is None else f"{row['error']:.2e}"]
        lines.append(cells)
    return table(titles, lines)


def programs(record: Record) -> str:
    """The table of programs: what they cost before they run, and what they need."""
    titles = ["program", *HEAD[1:4], "first call, s", "of it XLA", "from cache, s"]
    titles += ["GFLOP a pass or step", "MiB a device", "collectives"]
    lines = []
    for program in record["programs"]:
        lines.append(["sampling", *_program(program)])
    if "training" in record:
        lines.append(["training", *_program(record["training"])])
    for peer in record["peers"]:
        lines.append([peer["program"], *_program(peer)])
    return table(titles, lines)


def _program(program: Record) -> list[str]:
    cells = [str(program[name]) for name in HEAD[1:4]]
    for state, name in (("cold", "seconds"), ("cold", "xla_seconds"), ("cached", "seconds")):
        seconds = program.get(state, {}).get(name)
        cells.append("" if seconds is None else f"{seconds:.2f}")
    if "collectives" not in program:
        return [*cells, "", "", ""]
    counts = program["collectives"].items()
    return [
        *cells,
        f"{program['flop_per_pass'] / 1e9:.3f}",
        f"{program['memory_bytes'] / 2**20:.0f}",
        ", ".join(f"{count} {kind}" for kind, count in counts) or "none",
    ]


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def points(record: Record) -> list[Record]:
    """The rows whose error is known."""
    return [row for row in record["rows"] if row.get("error") is not None]


def front(rows: Iterable[T], cost: Callable[[T], float], error: Callable[[T], float]) -> list[T]:
    """The Pareto front: the rows whose error nothing as cheap or cheaper reaches, by cost."""
    chosen: list[T] = []
    for row in sorted(rows, key=lambda row: (cost(row), error(row))):
        if not chosen or error(row) < error(chosen[-1]):
            chosen.append(row)
    return chosen


def name_decades(axis: Axis) -> None:
    """Put plain numbers at 1, 2 and 5 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def plot(record: Record) -> bytes:
    """Error against seconds and against evaluations, with the Pareto front, as PNG."""
    rows = points(record)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    costs: dict[str, Callable[[Record], float]] = {
        "seconds": lambda row: row["seconds"]["median"],
        "network evaluations": lambda row: row["evaluations"],
    }
    for place, (label, cost) in zip(axes, costs.items(), strict=True):
        best = front(rows, cost, itemgetter("error"))
        place.step(*_places(best, cost), where="post", color="0.6", label="Pareto front")
        place.plot(*_places(rows, cost), "o")
        for row in rows:
            where = cost(row), row["error"]
            place.annotate(row["case"], where, xytext=(4, 4), textcoords="offset points")
        place.set(xscale="log", yscale="log")
        name_decades(place.xaxis)
        name_decades(place.yaxis)
        place.margins(x=0.25)  # for the names
        place.set_xlabel(label)
        place.grid(alpha=0.3)
    axes[0].legend(loc="lower left", frameon=False)
    axes[0].set_ylabel("relative error")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _places(rows: Sequence[Record], cost: Callable[[Record], float]) -> tuple[list[float], ...]:
    return [cost(row) for row in rows], [row["error"] for row in rows]


def _spread(values: Record | None, digits: int = 3) -> str:
    if values is None:
        return ""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} ({low} to {high})"


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.1f}"


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _alone(medians: Record) -> str:
    return ", ".join(f"{name} {s:.3f} s" for name, s in medians["seconds"].items()) + "."
