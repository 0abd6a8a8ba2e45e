"""Time samplers and training beside bare network passes, the machine's limit and PyTorch.

  python -m experiments.benchmark
  python -m experiments.benchmark --run=checkpoints/demo --samplers=ddim:10,ddim:25,unipc:10
  python -m experiments.benchmark --against=torch --training --budget=150s

Candidates take turns run by run. Times are medians with their 10th and 90th percentiles. The app
writes results.json and results.md. With --run, the errors of solvers are meaningful, and it also
plots error against time. To measure the quality of samples, use experiments.sweep.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from diffusion_jax import parallel, samplers, timing
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.runs import environment, load_config, load_model, untrained
from diffusion_jax.runs.config import Config
from diffusion_jax.samplers import Tableau
from diffusion_jax.spec import choose
from diffusion_jax.timing import Group, hardware
from diffusion_jax.typing import require
from experiments import app, benchmark_tables
from experiments.app import Args, describe
from experiments.measure import (
    Bare,
    Record,
    Setting,
    Trainer,
    compile_program,
    count_sweep,
    solver_errors,
)

OURS, BARE = "diffusion_jax", "bare passes"
PASSES = 10  # bare forward passes in a run
STEPS = 2  # training steps in a run
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}

app.define_config()
app.define_devices()
flags.DEFINE_string("run", None, "a run folder; by default an untrained network, as configured")
flags.DEFINE_string("samplers", "ddpm:500,ddim:25,unipc:10", "the samplers, with their options")
flags.DEFINE_list("batches", ["32"], "images at once")
flags.DEFINE_list("dtypes", ["float32"], f"what sampling computes in: {', '.join(PRECISIONS)}")
flags.DEFINE_list("device_counts", [], "numbers of devices; by default all that divide the batch")
flags.DEFINE_integer("repeats", 20, "runs of each candidate")
flags.DEFINE_string(
    "budget",
    None,
    "time for everything, such as 150s or 5min: fewer repeats, at least 3, to fit; if these do "
    "not fit, a line before the runs says so",
)
flags.DEFINE_boolean("training", False, "time training too, in batches of --batch_size")
flags.DEFINE_boolean("sweep", True, "count the compilations of all samplers at many steps")
flags.DEFINE_list("against", [], "peers to time in turn: torch")
flags.DEFINE_string("out", None, "the folder for the results; by default benchmarks/HARDWARE")


class Bench(NamedTuple):
    """The shared arguments and records of the parts of a benchmark."""

    args: Args
    config: Config
    model: Model
    record: Record

    def peers(self, batch: int, dtype: str, devices: Sequence[jax.Device]) -> Any:
        """Return the peers in PyTorch, on as many cores, or None."""
        if not self.args.against or dtype not in ("float32", "tf32"):
            return None
        from experiments.peers.torch_peers import TorchPeers

        on_cpu = devices[0].platform == "cpu"
        threads = len(devices) if on_cpu else len(os.sched_getaffinity(0))
        peers = TorchPeers(self.model, batch, threads, cuda=not on_cpu, tf32=dtype == "tf32")
        self.record["notes"].append(f"torch: {peers.device}, {threads} threads, {peers.format}")
        return peers

    def sampling(self, setting: Setting, bare: Bare, cases: dict[str, Tableau]) -> Iterator[Group]:
        """Yield bare passes and each sampler, ours and the peers', after a first run of each."""
        each = min(timing.seconds_of(partial(bare.run, 1)) for _ in range(3))
        peers, words = self.peers(*setting[1:]), setting.words

        def group(case: str, candidates: dict, units: dict[str, int], images: int) -> Group:
            words = {"case": case} | setting.words
            return Group(words, candidates, units, images, bare.flop, each * sum(units.values()))

        candidates = {BARE: partial(bare.run, PASSES)}
        if peers:
            candidates |= peers.passes(PASSES)
            self.record["alone"].append(words | {"seconds": alone(candidates)})
            self.note(words, "network", peers, peers.networks)
        yield group("network", candidates, dict.fromkeys(candidates, PASSES), 0)
        for case, tableau in cases.items():
            setting.draw(tableau, rows=2)
            candidates = {OURS: partial(setting.draw, tableau), BARE: partial(bare.run, PASSES)}
            units = {OURS: tableau.rows, BARE: PASSES}
            spec = samplers.parse(case, self.model.schedule)
            if peers and spec.options.keys() == {"steps"}:
                name, steps = spec.name, spec.options["steps"]
                for loop in peers.samplers(name, steps, rows=2).values():
                    loop()
                loops = peers.samplers(name, steps)
                candidates |= loops
                units |= dict.fromkeys(loops, steps)
            yield group(case, candidates, units, setting.batch)

    def training(self, devices: Sequence[jax.Device]) -> Group:
        """Return the training steps, ours and the peers'."""
        batch, dtype = self.config.batch_size, self.config.dtype
        words = {"batch": batch, "dtype": dtype, "devices": len(devices)}
        trainer = Trainer(self.config, devices)
        self.record["programs"].append({"program": "training"} | words | trainer.record)
        candidates: dict[str, Callable[[], Any]] = {OURS: partial(trainer.run, STEPS)}
        if peers := self.peers(batch, dtype, devices):
            steps = peers.training()
            candidates |= {name: partial(peer.run, STEPS) for name, peer in steps.items()}
            self.note(words, "training", peers, steps)
        seconds = sum(map(timing.seconds_of, candidates.values()))
        units = dict.fromkeys(candidates, STEPS)
        words = {"case": "training"} | words
        return Group(words, candidates, units, batch * STEPS, trainer.flop, seconds)

    def note(self, words: Record, what: str, peers: Any, ready: dict[str, Any]) -> None:
        """Record which peers failed, and what the first run of the others cost with compilation."""
        self.record["programs"] += [
            {"program": f"{name}: {what}"} | words | {"cold": {"seconds": peer.seconds}}
            for name, peer in ready.items()
        ]
        self.record["notes"] += peers.notes


def main(args: Args) -> None:
    """Check all flags, measure, and write the results."""
    begin = time.monotonic()
    require(args.repeats >= 1, f"repeats={args.repeats}: it must be at least 1")
    budget, config = parse_budget(args.budget), read_config(args)
    check_against(args, config)
    schedule = config.build_schedule()
    specs = [samplers.parse(text, schedule) for text in samplers.split(args.samplers)]
    cases = {str(spec): samplers.build(spec, schedule) for spec in specs}
    trained_on = parallel.choose_devices(config.batch_size, args.devices) if args.training else []
    programs, here = parse_programs(args), describe(jax.local_devices())
    slug = re.sub(r"\W+", "-", here.lower()).strip("-")
    out, count = app.output_folder(args.out, Path("benchmarks") / slug), args.sweep
    args.refuse_unread("a benchmark with --run")
    print(f"{describe(programs[0][2])}; results go to {out}", flush=True)
    model = load_model(args.run) if args.run else untrained(config)
    about = environment.describe(sys.argv, jax.local_devices()) | {"devices": here}
    about["versions"] |= {name: version(name) for name in ("torch", "diffusers") if find_spec(name)}
    record: Record = {"about": about, "configuration": config.to_dict()}
    record |= {"notes": [], "programs": [], "alone": []}
    bench = Bench(args, config, model, record)
    settings = [Setting(model, *program) for program in programs]
    bare = [Bare(setting) for setting in settings]  # this checks the memory before anything runs
    for setting, passes in zip(settings, bare, strict=True):
        program = compile_program(setting) | {"flop_per_pass": passes.flop}
        record["programs"].append({"program": "sampling"} | setting.words | program)
    pairs = zip(settings, bare, strict=True)
    groups = [group for pair in pairs for group in bench.sampling(*pair, cases)]
    groups += [bench.training(trained_on)] if trained_on else []
    dtypes = dict.fromkeys(group.words["dtype"] for group in groups)
    record["peaks"] = {d: hardware.peaks(jax.local_devices(), d)._asdict() for d in dtypes}
    errors = [solver_errors(setting, cases) if args.run else {} for setting in settings]
    if count:
        record["sweep"] = count_sweep(settings[0])
    record["rows"] = []
    for group, seconds in timing.run_groups(groups, args.repeats, begin, budget):
        record["rows"] += rows_of(group, seconds, record["peaks"][group.words["dtype"]])
        done = len(next(iter(seconds.values())))
        if done < args.repeats:
            note = f"{group.words['case']}: {done} runs of {args.repeats}, by the budget"
            record["notes"].append(note)
    add_errors(settings, errors, record)
    for path in benchmark_tables.write(out, record):
        print(f"written: {path}")


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
    for name in ("batches", "device_counts"):
        for word in getattr(args, name):
            right = word.isdecimal() and int(word) > 0
            require(right, f"{name}={word}: give numbers from 1 up")
    programs = []
    for batch in map(int, args.batches):
        for count in map(int, args.device_counts) if args.device_counts else [args.devices]:
            devices = tuple(parallel.choose_devices(batch, count))
            programs += [(batch, dtype, devices) for dtype in args.dtypes]
    require(programs, "batches and dtypes: give at least one of each")
    return programs


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


def alone(candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return medians of the peers' bare passes, which here do not take turns with ours."""
    medians = {}
    for name, run_passes in candidates.items():
        if name != BARE:
            seconds = timing.interleave({name: run_passes}, repeats=5)
            medians[name] = timing.summary(seconds[name][1:]).median
    return medians


def rows_of(group: Group, seconds: dict[str, Any], peaks: dict[str, float]) -> list[Record]:
    """Return the row of each candidate. Ratios compare neighbouring runs."""
    first, rows = next(iter(seconds)), []
    for name, runs in seconds.items():
        median = timing.summary(runs).median
        rate = group.flop * group.units[name] / median
        row = group.words | {
            "candidate": name,
            "evaluations": group.units[name],
            "runs": len(runs),
            "seconds": timing.summary(runs)._asdict(),
            "units_per_second": group.units[name] / median,
            "flop_per_second": rate,
            "of_matmul": rate / peaks["matmul"],
            "of_convolution": rate / peaks["convolution"],
        }
        per_unit = runs / group.units[name]
        ours = seconds[first] / group.units[first]
        if group.images and name != BARE:
            row["images_per_second"] = group.images / median
        if name not in (first, BARE):
            row["times_ours"] = timing.summary(per_unit / ours)._asdict()
        if name == OURS and BARE in seconds:
            bare = seconds[BARE] / group.units[BARE]
            row["overhead_percent"] = timing.summary(100 * (per_unit / bare - 1))._asdict()
        rows.append(row)
    return rows


def add_errors(settings: Sequence[Setting], errors: Sequence[dict], record: Record) -> None:
    """Add to each sampler's row its distance from a fine solution."""
    for setting, found in zip(settings, errors, strict=True):
        for row in record["rows"]:
            if row["candidate"] == OURS and row.items() >= setting.words.items():
                row["error"] = found.get(row["case"])


if __name__ == "__main__":
    app.run(main)
