"""Time samplers and training beside bare network passes, the machine's limit and PyTorch.

  python -m experiments.benchmark
  python -m experiments.benchmark --run=checkpoints/demo --samplers=ddim:10,ddim:25,unipc:10
  python -m experiments.benchmark --against=torch --training --budget=150s

Candidates take turns run by run. Times are medians with their 10th and 90th percentiles. The app
writes results.json and results.md after each group of candidates. With --run, it also measures and
plots the errors of solvers. To measure the quality of samples, use experiments.sweep.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion_jax import parallel, samplers
from diffusion_jax.evaluation import Estimate
from diffusion_jax.evaluation.sweep import Point
from diffusion_jax.files import write_atomically
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.runs import environment, load_config, load_model, untrained
from diffusion_jax.runs.config import Config
from diffusion_jax.samplers import Tableau
from diffusion_jax.spec import choose
from diffusion_jax.typing import require
from experiments import app, tables, timing
from experiments.app import Args, describe, numbers
from experiments.measure import (
    Bare,
    Record,
    Setting,
    Trainer,
    compile_program,
    program_row,
    solver_errors,
)
from experiments.timing import Group

OURS, BARE = "diffusion_jax", "bare passes"
PASSES = 10  # bare forward passes in a run
STEPS = 2  # training steps in a run
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
COSTS = {"seconds": "seconds", "evaluations": "network evaluations"}
ERROR = "relative error"

BUDGET = (
    "the time for everything, compilation included, such as 150s or 5min; the app then repeats "
    "fewer times, but at least 3"
)
app.define("preset", "cpu_devices")
flags.DEFINE_string("run", None, "a run folder; by default an untrained network, as configured")
flags.DEFINE_string("samplers", "ddpm:500,ddim:25,unipc:10", "the samplers, with their options")
flags.DEFINE_list("batches", ["32"], "numbers of images to sample at once")
flags.DEFINE_list("dtypes", ["float32"], f"the precisions of sampling: {', '.join(PRECISIONS)}")
flags.DEFINE_list("devices", [], "numbers of devices; by default all that divide the batch")
flags.DEFINE_integer("repeats", 20, "how often to run each candidate", 1)
flags.DEFINE_string("budget", None, BUDGET)
flags.DEFINE_boolean("training", False, "time training too, in batches of --batch_size")
flags.DEFINE_list("against", [], "other libraries to time in turn with this one: torch")
flags.DEFINE_string("out", None, "the folder to write to; by default benchmarks/HARDWARE")


def main(args: Args) -> None:
    """Check all flags, measure, and write the results as they come."""
    begin = time.monotonic()
    budget, repeats, config = parse_budget(args.budget), args.repeats, read_config(args)
    check_against(args, config)
    schedule = config.build_schedule()
    specs = [samplers.parse(text, schedule) for text in samplers.split(args.samplers)]
    cases = {str(spec): samplers.build(spec, schedule) for spec in specs}
    programs, here = parse_programs(args), describe(jax.local_devices())
    count = len(programs[0][2]) if args.devices else None
    trained_on = parallel.choose_devices(config.batch_size, count) if args.training else []
    slug = re.sub(r"\W+", "-", here.lower()).strip("-")
    out = app.output_folder(args.out, Path("benchmarks") / slug)
    args.refuse_unread("a benchmark with --run")
    limit = "" if budget is None else f", which the budget of {budget:.0f} s includes"
    print(f"{describe(programs[0][2])}; results go to {out}; compiling first{limit}", flush=True)
    model = load_model(args.run) if args.run else untrained(config)
    about = environment.describe(sys.argv, jax.local_devices()) | {"devices": here}
    about["versions"] |= {name: version(name) for name in ("torch", "diffusers") if find_spec(name)}
    record: Record = {"about": about, "configuration": config.to_dict(), "peaks": {}}
    record |= {"rows": [], "programs": [], "notes": []}
    settings = [Setting(model, *program) for program in programs]
    bare = [Bare(setting) for setting in settings]  # this checks the memory before anything runs
    errors: dict[str, Any] = {}
    groups: list[Group] = []
    for setting, passes in zip(settings, bare, strict=True):
        found = compile_program(setting)
        record["programs"].append(program_row("sampling", setting.words, found, passes.flop))
        peers = torch_peers(args, model, setting.batch, setting.dtype, setting.devices)
        groups += sampling_groups(setting, passes, cases, peers)
        note_peers(record, peers, setting.words)
        if args.run:
            errors |= {str((c, setting.words)): e for c, e in solver_errors(setting, cases).items()}
        write(out, record)
    if trained_on:
        groups.append(training_group(args, config, model, trained_on, record))
    for dtype in dict.fromkeys(group.words["dtype"] for group in groups):
        record["peaks"][dtype] = timing.peaks(jax.local_devices(), dtype)._asdict()
    write(out, record)
    print(estimate(groups, repeats, time.monotonic() - begin, budget), flush=True)
    for group, seconds in timing.run_groups(groups, repeats, begin, budget):
        rows = rows_of(group, seconds, record["peaks"][group.words["dtype"]])
        words = dict(group.words)
        error = errors.get(str((words.pop("case"), words)))
        for row in rows:
            if errors and row["candidate"] == OURS:
                row["error"] = error
        record["rows"] += rows
        write(out, record)
    print((out / "results.md").read_text())
    written = [out / "results.json", out / "results.md"]
    if points := points_of(record["rows"]):
        written.append(out / "results.png")
        write_atomically(written[-1], tables.plot(points, COSTS, [ERROR]))
    print(f"written: {', '.join(map(str, written))}")


def read_config(args: Args) -> Config:
    """Return the configuration of --run or of the flags. Raise InputError if it is invalid."""
    config = load_config(Path(args.run)) if args.run else app.config(args)
    return config if args.batch_size is None else config.override(batch_size=args.batch_size)


def parse_budget(text: str | None) -> float | None:
    """Return the seconds of a budget such as 150s or 5min. Raise InputError if it is invalid."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h|)", text.strip())
    require(found and float(found[1]) > 0, f"budget={text}: write it as 150s, 5min or 1h")
    assert found is not None
    return float(found[1]) * UNITS[found[2]]


def parse_programs(args: Args) -> list[tuple[int, str, tuple[jax.Device, ...]]]:
    """Return every batch, dtype and number of devices. Raise InputError if one is invalid."""
    for dtype in args.dtypes:
        choose(PRECISIONS, "dtypes", dtype)
    batches, counts = numbers("batches", args.batches, int), numbers("devices", args.devices, int)
    least = min([*batches, *counts], default=1)
    require(least >= 1, f"batches and devices: {least}: they must be at least 1")
    require(batches and args.dtypes, "batches and dtypes: give at least one of each")
    return [
        (batch, dtype, tuple(parallel.choose_devices(batch, count)))
        for batch in batches
        for count in counts or [None]
        for dtype in args.dtypes
    ]


def check_against(args: Args, config: Config) -> None:
    """Raise InputError if a peer is unknown, is not installed, or does not support the flags."""
    for name in args.against:
        require(name == "torch", f"against={name}: choose from torch")
        dtypes = {*args.dtypes, config.dtype if args.training else ""}
        one = not dtypes >= {"float32", "tf32"}
        require(one, "against=torch: choose one of float32 and tf32, for training too")
        known = config.specs()["network"].name == "context_unet"
        require(known, "against=torch: its only network is context_unet")
        installed = find_spec("torch") is not None
        require(installed, "against=torch: PyTorch is not installed: pip install '.[peers]'")


def torch_peers(args: Args, model: Any, batch: int, dtype: str, devices: Any) -> Any:
    """Return the peers in PyTorch, on as many cores, or None."""
    if not args.against or dtype not in ("float32", "tf32"):
        return None
    from experiments.peers.torch_peers import TorchPeers

    on_cpu = devices[0].platform == "cpu"
    threads = len(devices) if on_cpu else len(os.sched_getaffinity(0))
    return TorchPeers(model, batch, threads, cuda=not on_cpu, tf32=dtype == "tf32")


def note_peers(record: Record, peers: Any, words: Record) -> None:
    """Record the first calls of peers, and which of them failed."""
    if peers:
        record["programs"] += [
            {"program": name} | words | {"first call, s": seconds}
            for name, seconds in peers.first.items()
        ]
        record["notes"] += peers.notes


def sampling_groups(
    setting: Setting, bare: Bare, cases: Mapping[str, Tableau], peers: Any
) -> Iterator[Group]:
    """Yield bare passes and each sampler, ours and the peers', after a first run of each."""

    def group(case: str, candidates: dict, units: dict[str, int], images: int) -> Group:
        return Group({"case": case} | setting.words, candidates, units, images, bare.flop)

    passes: dict[str, Callable] = {BARE: partial(bare.run, PASSES)}
    candidates = passes | (peers.passes(PASSES) if peers else {})
    yield group("network", candidates, dict.fromkeys(candidates, PASSES), 0)
    for case, tableau in cases.items():
        setting.draw(tableau, rows=2)
        candidates = {OURS: partial(setting.draw, tableau)} | passes
        units = {OURS: tableau.rows, BARE: PASSES}
        spec = samplers.parse(case, setting.model.schedule)
        if peers and spec.options.keys() == {"steps"}:
            name, steps = spec.name, spec.options["steps"]
            loops = peers.samplers(name, steps)
            candidates |= loops
            units |= dict.fromkeys(loops, steps)
        yield group(case, candidates, units, setting.batch)


def training_group(
    args: Args, config: Config, model: Any, devices: Sequence[jax.Device], record: Record
) -> Group:
    """Return the training steps, ours and the peers', and record their first calls."""
    batch, dtype = config.batch_size, config.dtype
    words = {"batch": batch, "dtype": dtype, "devices": len(devices)}
    trainer = Trainer(config, devices)
    record["programs"].append(program_row("training", words, trainer.record, trainer.flop))
    candidates: dict[str, Callable] = {OURS: partial(trainer.run, STEPS)}
    if peers := torch_peers(args, model, batch, dtype, devices):
        candidates |= {name: partial(step, STEPS) for name, step in peers.training().items()}
        note_peers(record, peers, words)
    for run in candidates.values():
        run()
    units, words = dict.fromkeys(candidates, STEPS), {"case": "training"} | words
    return Group(words, candidates, units, batch * STEPS, trainer.flop)


def estimate(groups: Sequence[Group], repeats: int, spent: float, budget: float | None) -> str:
    """Return what the runs will take, from one run of the shortest candidate of each group."""
    total = 0.0
    for group in groups:
        name = min(group.units, key=lambda name: group.units[name])
        each = timing.seconds_of(group.candidates[name]) / group.units[name]
        total += each * sum(group.units.values())
    least, most = total * min(timing.LEAST, repeats), total * repeats
    words = f"{spent:.0f} s until here, compilation included"
    if budget is None or spent + most <= budget:
        return f"{words}; about {most:.0f} s of runs"
    if spent + least <= budget:
        return f"{words}; the runs then fill the budget of {budget:.0f} s"
    return f"{words}; about {least:.0f} s of runs, more than the budget of {budget:.0f} s"


def rows_of(group: Group, seconds: Mapping[str, Any], peaks: Record) -> list[Record]:
    """Return the row of each candidate. Ratios are medians over neighbouring runs."""
    each = {name: runs / group.units[name] for name, runs in seconds.items()}
    first, rows = next(iter(each)), []
    for name, runs in seconds.items():
        rate = group.flop / float(np.median(each[name]))
        row = group.words | {"candidate": name, "passes or steps": group.units[name]}
        row |= {"runs": len(runs), "seconds": timing.summary(runs)._asdict()}
        if group.images and name != BARE:
            row["images/s"] = group.images / row["seconds"]["median"]
        row["GFLOP/s"] = rate / 1e9
        row |= {f"of {what}": rate / peak for what, peak in peaks.items()}
        if name == OURS and BARE in each:
            row["overhead, %"] = timing.summary(100 * (each[name] / each[BARE] - 1))._asdict()
        if name not in (first, BARE):
            row["a pass, times ours"] = timing.summary(each[name] / each[first])._asdict()
        rows.append(row)
    return rows


def points_of(rows: Sequence[Record]) -> list[Point]:
    """Return the points of the plot: the rows that have an error."""
    return [
        Point(
            *(row["case"], row["case"].partition(":")[0], row["passes or steps"]),
            *(row["seconds"]["median"], {ERROR: Estimate(row["error"], 0.0)}),
        )
        for row in rows
        if row.get("error") is not None
    ]


def write(out: Path, record: Record) -> None:
    """Write results.json, and results.md with all tables."""
    limits = [
        f"Limit in {dtype}: {peak['matmul'] / 1e9:.1f} GFLOP/s in a large matrix product, "
        f"{peak['convolution'] / 1e9:.1f} in a large 3x3 convolution."
        for dtype, peak in record["peaks"].items()
    ]
    parts = [f"# Benchmark: {record['about']['devices']}", tables.header(record["about"])]
    parts += ["\n".join(limits), "## Runs", tables.table(record["rows"])]
    parts += ["## Programs", tables.table(record["programs"])]
    notes = "\n".join(f"- {note}" for note in record["notes"])
    parts += ["## Notes", notes] if notes else []
    write_atomically(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(out / "results.md", ("\n\n".join(parts) + "\n").encode())


if __name__ == "__main__":
    app.run(main)
