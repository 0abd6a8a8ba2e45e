"""Write the results of the benchmark: JSON, tables, and a plot of solvers' errors."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.evaluation import Estimate
from diffusion_jax.evaluation.sweep import Point, Record
from diffusion_jax.files import write_atomically
from experiments.tables import header, plot, table

HEAD = ("batch", "dtype", "devices")
COSTS = {"seconds": "seconds", "evaluations": "network evaluations"}


def write(folder: Path, record: Record) -> list[Path]:
    """Write results.json, results.md and results.png of known errors, and print results.md."""
    text = markdown(record)
    print(text)
    files = {"json": (json.dumps(record, indent=1) + "\n").encode(), "md": text.encode()}
    if found := points(record["rows"]):
        files["png"] = plot(found, COSTS)
    for kind, content in files.items():
        write_atomically(folder / f"results.{kind}", content)
    return [folder / f"results.{kind}" for kind in files]


def markdown(record: Record) -> str:
    """Return all tables, below a line about the hardware and the versions."""
    limits = [
        f"Limit in {dtype}: {_giga(peak['matmul'])} GFLOP/s in a large matrix product, "
        f"{_giga(peak['convolution'])} in a large 3x3 convolution."
        for dtype, peak in record["peaks"].items()
    ]
    parts = [f"# Benchmark: {record['about']['devices']}", header(record["about"])]
    parts += ["\n".join(limits), "## Runs", runs(record["rows"])]
    parts += ["## Programs", programs(record["programs"])]
    if sweep := record.get("sweep"):
        parts.append(
            f"A sweep of {len(sweep['samplers'])} samplers over "
            f"{','.join(map(str, sweep['steps']))} steps ({sweep['runs']} runs) compiles "
            f"{sweep['compilations']} programs, starting with none."
        )
    for alone in record["alone"]:
        medians = ", ".join(f"{name} {s:.3f} s" for name, s in alone["seconds"].items())
        parts.append(f"The peers' bare passes before anything takes turns: {medians}.")
    if record["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in record["notes"])]
    return "\n\n".join(parts) + "\n"


def runs(rows: Sequence[Record]) -> str:
    """Return the table of runs. Seconds are medians (p10 to p90)."""
    titles = ["case", *HEAD, "candidate", "passes or steps", "runs", "seconds", "images/s"]
    titles += ["GFLOP/s", "of matmul", "of conv", "overhead, %", "a pass, times ours", "error"]
    lines = []
    for row in rows:
        cells = [str(row[name]) for name in ("case", *HEAD, "candidate", "evaluations", "runs")]
        rate, error = row.get("images_per_second"), row.get("error")
        cells += [_spread(row["seconds"]), f"{rate:.1f}" if rate else ""]
        cells += [_giga(row["flop_per_second"])]
        cells += [f"{row['of_matmul']:.2f}", f"{row['of_convolution']:.2f}"]
        cells += [_spread(row.get("overhead_percent"), 1), _spread(row.get("times_ours"), 2)]
        lines.append([*cells, "" if error is None else f"{error:.2e}"])
    return table(titles, lines)


def programs(found: Sequence[Record]) -> str:
    """Return the table of programs: their cost before they run, and their needs."""
    titles = ["program", *HEAD, "first call, s", "of it XLA", "from cache, s"]
    titles += ["GFLOP a pass or step", "MiB a device", "collectives"]
    lines = []
    for program in found:
        cells = [str(program[name]) for name in ("program", *HEAD)]
        for state, name in (("cold", "seconds"), ("cold", "xla_seconds"), ("cached", "seconds")):
            seconds = program.get(state, {}).get(name)
            cells.append("" if seconds is None else f"{seconds:.2f}")
        needs = ["", "", ""]
        if "collectives" in program:
            counts = ", ".join(f"{n} {kind}" for kind, n in program["collectives"].items())
            needs = [f"{program['flop_per_pass'] / 1e9:.3f}", counts or "none"]
            needs.insert(1, f"{program['memory_bytes'] / 2**20:.0f}")
        lines.append([*cells, *needs])
    return table(titles, lines)


def points(rows: Sequence[Record]) -> list[Point]:
    """Return the rows whose error is known as points of the plot."""
    return [
        Point(
            row["case"],
            row["case"].partition(":")[0],
            row["evaluations"],
            row["seconds"]["median"],
            {"relative error": Estimate(row["error"], 0.0)},
        )
        for row in rows
        if row.get("error") is not None
    ]


def _spread(values: Record | None, digits: int = 3) -> str:
    if values is None:
        return ""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} ({low} to {high})"


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.1f}"
