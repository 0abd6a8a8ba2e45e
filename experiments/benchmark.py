"""Time samplers and training: against bare passes of the network, the machine's limit, PyTorch.

  python -m experiments.benchmark
  python -m experiments.benchmark --run=checkpoints/demo --samplers=ddim:10,ddim:25,unipc:10
  python -m experiments.benchmark --against=torch --training --budget=150s
  python -m experiments.benchmark --quality --guidance_scales=1,1.5

Candidates take turns run by run; medians are given with their 10th and 90th percentiles. Writes
results.json and results.md, and with --run, which makes errors of solvers meaningful, a plot of
error against time. With --quality, KID and class accuracy of samples of a run (by default the
project's own model) are measured instead, and drawn against seconds and network evaluations:
quality.json, quality.md and quality.png.
"""

import datetime
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from tqdm import tqdm

from diffusion_jax import hardware, parallel, timing
from diffusion_jax.config import Config, at_least
from diffusion_jax.precisions import PRECISIONS
from diffusion_jax.runs import Model, init_variables, load_config, load_model
from diffusion_jax.samplers import SAMPLERS, Tableau
from diffusion_jax.typing import InputError, choose, require
from experiments import quality, quality_tables, tables
from experiments.flags import (
    FLAGS,
    SHIPPED,
    config,
    define_config,
    define_devices,
    describe,
    output_folder,
    run,
)
from experiments.measure import (
    Bare,
    Setting,
    Trainer,
    compile_program,
    count_sweep,
    parse_case,
    solver_errors,
)

DEFAULT = ("ddpm:500", "ddim:25", "unipc:10")  # samplers
OURS, BARE = "diffusion_jax", "bare passes"
PASSES = 10  # bare forward passes in a run
PEERS = ("torch",)
PEER_DTYPES = ("float32", "tf32")  # one of them in a process
STEPS = 2  # training steps in a run
BAR = "{l_bar}{bar}| {elapsed}<{remaining}"  # it counts seconds
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
VERSIONS = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "diffusers")

define_config()
define_devices()
flags.DEFINE_string("run", None, "a run folder; by default an untrained network, as configured")
flags.DEFINE_list(
    "samplers",
    [],
    f"name:steps, or name:steps:option=value, from {', '.join(SAMPLERS)}; by default "
    f"{', '.join(DEFAULT)}; with --quality, all; there, a name alone is its steps with up to "
    f"{', '.join(map(str, quality.EVALUATIONS))} network evaluations",
)
flags.DEFINE_list("batches", ["32"], "images at once")
flags.DEFINE_list("dtypes", ["float32"], f"what the network computes in: {', '.join(PRECISIONS)}")
flags.DEFINE_list("device_counts", [], "numbers of devices; by default all that divide the batch")
flags.DEFINE_integer("repeats", 20, "runs of each candidate; with --quality, at most 3")
flags.DEFINE_string(
    "budget",
    None,
    "time for everything, such as 150s or 5min: fewer repeats, at least 3, to fit; where these do "
    "not, a line before the runs says so",
)
flags.DEFINE_boolean("training", False, "time training too, in batches of --batch_size")
flags.DEFINE_boolean("sweep", True, "count the compilations of all samplers at many steps")
flags.DEFINE_list("against", [], "peers to time in turn: torch")
flags.DEFINE_boolean("quality", False, "measure the quality of samples against their cost")
flags.DEFINE_integer("n", 2000, "with --quality: samples of each point")
flags.DEFINE_integer("real_n", 5000, "with --quality: real images in each of two sets")
flags.DEFINE_integer("sampling_seed", 0, "with --quality: the seed of the samples")
flags.DEFINE_list("guidance_scales", ["1"], "with --quality: scales of guidance; 1 is none")
flags.DEFINE_string("out", None, "the folder for the results; by default benchmarks/HARDWARE")


class Group(NamedTuple):
    """Candidates that take turns, as the tables show them.

    units: how many network passes, or training steps, a run of each has; images: how many a run
    makes or trains on, 0 for bare passes; flop: of a unit; seconds: of a round, about.
    """

    words: dict[str, Any]
    candidates: dict[str, Callable[[], Any]]
    units: dict[str, int]
    images: int
    flop: float
    seconds: float


def main() -> None:
    """Check all flags, measure, and write the results."""
    begin = time.monotonic()
    at_least("repeats", FLAGS.repeats, 1)
    budget = parse_budget(FLAGS.budget)
    for dtype in FLAGS.dtypes:
        choose(PRECISIONS, "dtypes", dtype)
    named = FLAGS.run or (SHIPPED if FLAGS.quality else None)
    chosen = load_config(Path(named)) if named else config()
    schedule = chosen.diffusion.build()
    check_against(chosen)
    if FLAGS.quality:
        measure_quality(chosen)
        return
    cases = {word: parse_case(word, schedule) for word in FLAGS.samplers or DEFAULT}
    if FLAGS.training:
        parallel.choose_devices(config().training.batch_size, FLAGS.devices)
    programs = parse_programs()
    out = results_folder()
    print(f"{describe(programs[0][2])}; results go to {out}", flush=True)
    model = load_model(FLAGS.run) if FLAGS.run else untrained(chosen)
    settings = [Setting(model, *program) for program in programs]
    record: dict[str, Any] = {"about": about(model), "notes": [], "programs": []}
    record |= {"peers": [], "alone": []}
    bare = [Bare(setting) for setting in settings]  # which checks the memory, before anything runs
    for setting, passes in zip(settings, bare, strict=True):
        program = compile_program(setting) | {"flop_per_pass": passes.flop}
        record["programs"].append(setting.words | program)
    groups = []
    for setting, passes in zip(settings, bare, strict=True):
        groups += sampling_groups(setting, passes, cases, record)
    if FLAGS.training:
        groups.append(training_group(model, record))
    record["peaks"] = {
        dtype: hardware.peaks(jax.local_devices(), dtype)._asdict()
        for dtype in {group.words["dtype"]: None for group in groups}
    }
    errors = [solver_errors(setting, cases) if FLAGS.run else {} for setting in settings]
    if FLAGS.sweep:
        record["sweep"] = count_sweep(settings[0])
    record["rows"] = run_groups(groups, begin, budget, record)
    add_errors(settings, errors, record)
    for path in tables.write(out, record):
        print(f"written: {path}")


def results_folder() -> Path:
    """The folder for the results."""
    return output_folder("out", Path("benchmarks") / slug(describe(jax.local_devices())))


def measure_quality(chosen: Config) -> None:
    """Measure the quality of each case, time all of them, and write what came of it."""
    words = FLAGS.samplers or quality.default_words(chosen.diffusion.build())
    cases = quality.plan(words, FLAGS.guidance_scales, chosen)
    one = len(FLAGS.dtypes) == len(FLAGS.batches) == 1 and len(FLAGS.device_counts) <= 1
    require(one, "dtypes, batches and device_counts: with --quality, give one of each")
    (batch,), count = integers("batches"), (integers("device_counts") or [FLAGS.devices])[0]
    devices = parallel.choose_devices(batch, count)
    out = results_folder()
    print(f"{describe(devices)}; results go to {out}")
    model, dtype = load_model(FLAGS.run or SHIPPED), FLAGS.dtypes[0]
    sweep = quality.sweep(model, FLAGS.n, FLAGS.real_n, FLAGS.sampling_seed, dtype, out, devices)
    points = quality.measure_points(sweep, cases)
    rounds = min(FLAGS.repeats, timing.LEAST)
    seconds = quality.time_points(model, cases, batch, dtype, devices, rounds)
    record = {
        "about": about(model) | {"sampling_seed": FLAGS.sampling_seed},
        "n": FLAGS.n,
        "batch": batch,
        "devices": describe(devices),
        "origin": sweep.yardstick.real.origin,
        "real": {k: v._asdict() for k, v in sweep.yardstick.real_against_real(FLAGS.n).items()},
        "points": [point | {"seconds": s} for point, s in zip(points, seconds, strict=True)],
    }
    for path in quality_tables.write(out, record):
        print(f"written: {path}")


def parse_budget(text: str | None) -> float | None:
    """Seconds of a budget such as 150s, 5min or 1h."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h|)", text.strip())
    require(found and float(found[1]) > 0, f"budget={text}: write it as 150s, 5min or 1h")
    assert found is not None
    return float(found[1]) * UNITS[found[2]]


def parse_programs() -> list[tuple[int, str, tuple[jax.Device, ...]]]:
    """Every batch, dtype and number of devices that is asked for."""
    programs = []
    for batch in integers("batches"):
        for count in integers("device_counts") or [FLAGS.devices]:
            devices = tuple(parallel.choose_devices(batch, count))
            programs += [(batch, dtype, devices) for dtype in FLAGS.dtypes]
    require(programs, "batches and dtypes: give at least one of each")
    return programs


def integers(flag: str) -> list[int]:
    """The positive numbers of a list flag."""
    words: list[str] = FLAGS.get_flag_value(flag, [])
    for word in words:
        require(word.isdecimal() and int(word) > 0, f"{flag}={word}: give numbers from 1 up")
    return [int(word) for word in words]


def check_against(chosen: Config) -> None:
    """Raise InputError for a peer that is unknown, not installed or asked for two precisions."""
    for name in FLAGS.against:
        require(name in PEERS, f"against={name}: choose from {', '.join(PEERS)}")
        both = {*FLAGS.dtypes, chosen.training.dtype if FLAGS.training else ""} >= {*PEER_DTYPES}
        require(not both, "against=torch: choose one of float32 and tf32, for training too")
        if find_spec("torch") is None:
            raise InputError("against=torch: PyTorch is not installed: pip install '.[peers]'")


def untrained(settings: Config) -> Model:
    """A configuration's network with its initial weights."""
    network = settings.network.build()
    variables = init_variables(network, settings.training.seed)
    return Model(settings, network, settings.diffusion.build(), variables)


def slug(words: str) -> str:
    """Words as a folder's name."""
    return re.sub(r"\W+", "-", words.lower()).strip("-")


def about(model: Model) -> dict[str, Any]:
    """What the numbers depend on."""
    versions: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "processor": processor(),
        "devices": describe(jax.local_devices()),
        "flags": {name: FLAGS[name].value for name in flags_of_app()},
        "configuration": model.config.to_dict(),
        "sampling_seed": 0,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def flags_of_app() -> list[str]:
    """The names of the flags that the user has given."""
    return [flag.name for flag in FLAGS.get_flags_for_module(__name__) if flag.present]


def sampling_groups(
    setting: Setting, bare: Bare, cases: dict[str, Tableau], record: dict[str, Any]
) -> list[Group]:
    """Bare passes and each sampler, ours and the peers', compiled and run once for a moment."""
    each = min(timing.seconds_of(partial(bare.run, 1)) for _ in range(3))
    peers = torch_peers(*setting, record)
    words = {"case": "network"} | setting.words
    candidates = {BARE: partial(bare.run, PASSES)} | (peers.passes(PASSES) if peers else {})
    if peers:
        record["alone"].append(setting.words | {"seconds": alone(peers)})
        record["peers"] += compiled(setting.words, "network", peers.networks)
        record["notes"] += peers.notes
    groups = [group(words, candidates, dict.fromkeys(candidates, PASSES), bare, each)]
    for word, tableau in cases.items():
        name, steps, *options = word.split(":")
        setting.draw(tableau, rows=2)
        candidates = {OURS: partial(setting.draw, tableau), BARE: partial(bare.run, PASSES)}
        units = {OURS: tableau.rows, BARE: PASSES}
        if peers and not options:
            for loop in peers.samplers(name, int(steps), rows=2).values():
                loop()
            loops = peers.samplers(name, int(steps))
            candidates |= loops
            units |= dict.fromkeys(loops, int(steps))
        groups.append(group({"case": word} | setting.words, candidates, units, bare, each))
    return groups


def group(
    words: dict[str, Any],
    candidates: dict[str, Callable],
    units: dict[str, int],
    bare: Bare,
    each: float,
) -> Group:
    """A group whose unit is a pass of so many seconds."""
    seconds = each * sum(units.values())
    images = words["batch"] if OURS in candidates else 0
    return Group(words, candidates, units, images, bare.flop, seconds)


def torch_peers(
    model: Model, batch: int, dtype: str, devices: Sequence[jax.Device], record: dict[str, Any]
) -> Any:
    """PyTorch's side, on as many cores, or None."""
    if "torch" not in FLAGS.against or dtype not in PEER_DTYPES:
        return None
    from experiments.peers.torch_peers import TorchPeers

    on_cpu = devices[0].platform == "cpu"
    threads = len(devices) if on_cpu else len(os.sched_getaffinity(0))
    peers = TorchPeers(model, batch, threads, cuda=not on_cpu, tf32=dtype == "tf32")
    record["notes"].append(f"torch: {peers.device}, {threads} threads, {peers.format}")
    return peers


def compiled(words: dict[str, Any], what: str, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """What each peer's first run costs, compilation included."""
    return [
        words | {"program": f"{name}: {what}", "cold": {"seconds": peer.seconds}}
        for name, peer in peers.items()
    ]


def alone(peers: Any) -> dict[str, Any]:
    """Medians of the peers' bare passes while nothing of ours runs: what taking turns costs."""
    medians = {}
    for name, run_passes in peers.passes(PASSES).items():
        seconds = timing.interleave({name: run_passes}, repeats=5)
        medians[name] = timing.summary(seconds[name][1:]).median
    return medians


def training_group(model: Model, record: dict[str, Any]) -> Group:
    """Training steps, ours and the peers'."""
    batch = config().training.batch_size
    devices = parallel.choose_devices(batch, FLAGS.devices)
    dtype = model.config.training.dtype
    words = {"case": "training", "batch": batch, "dtype": dtype, "devices": len(devices)}
    trainer = Trainer(model.config, batch, devices)
    record["training"] = trainer.record()
    candidates: dict[str, Callable[[], Any]] = {OURS: partial(trainer.run, STEPS)}
    if peers := torch_peers(model, batch, dtype, devices, record):
        steps = peers.training()
        candidates |= {name: partial(peer.run, STEPS) for name, peer in steps.items()}
        record["peers"] += compiled(words, "training", steps)
        record["notes"] += peers.notes
    seconds = sum(map(timing.seconds_of, candidates.values()))
    units = dict.fromkeys(candidates, STEPS)
    return Group(words, candidates, units, batch * STEPS, trainer.flop, seconds)


def run_groups(
    groups: list[Group], begin: float, budget: float | None, record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Time all groups, with a bar in seconds; a row for each candidate.

    budget: seconds from begin, of which compilation has taken some; None is no bound.
    """
    each = {str(place): group.seconds for place, group in enumerate(groups)}
    planned = plan(each, begin, budget)
    total = sum(planned[place] * seconds for place, seconds in each.items())
    print(estimate(groups, total, time.monotonic() - begin, budget), flush=True)
    rows = []
    with tqdm(total=total, bar_format=BAR) as bar:
        for place, group in enumerate(groups):
            bar.set_description(group.words["case"])
            count = plan(each, begin, budget)[str(place)]
            share = None if budget is None else count * each.pop(str(place))
            seconds = timing.interleave(group.candidates, count, share, partial(advance, bar))
            rows += rows_of(group, seconds, record["peaks"][group.words["dtype"]])
            done = len(next(iter(seconds.values())))
            if done < FLAGS.repeats:
                note = f"{group.words['case']}: {done} runs of {FLAGS.repeats}, by the budget"
                record["notes"].append(note)
    return rows


def plan(each: dict[str, float], begin: float, budget: float | None) -> dict[str, int]:
    """How many rounds of each group are left room for by what is left of the budget."""
    left = None if budget is None else max(budget + begin - time.monotonic(), 0.0)
    return timing.rounds(each, FLAGS.repeats, left)


def estimate(groups: list[Group], total: float, spent: float, budget: float | None) -> str:
    """What the runs will take; why the budget does not hold, if it does not."""
    words = f"{spent:.0f} s until here, compilation included; about {total:.0f} s of runs"
    if budget is None or spent + total <= budget:
        return words
    longest = max(groups, key=lambda group: group.seconds)
    return (
        f"{words}: more than the budget of {budget:.0f} s, since each candidate has at least "
        f"{min(timing.LEAST, FLAGS.repeats)} runs; the longest is {longest.words['case']}, with "
        f"{longest.seconds:.0f} s a round"
    )


def advance(bar: tqdm, seconds: float) -> None:
    """Move the bar on; the estimate that it started with may have been too short."""
    bar.total = max(bar.total, bar.n + seconds)
    bar.update(seconds)


def rows_of(group: Group, seconds: dict[str, Any], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """What is reported of each candidate; ratios are of runs beside each other."""
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


def add_errors(settings: list[Setting], errors: list[dict], record: dict[str, Any]) -> None:
    """Each sampler's distance to a fine solution, into its row."""
    for setting, found in zip(settings, errors, strict=True):
        for row in record["rows"]:
            if row["candidate"] == OURS and row.items() >= setting.words.items():
                row["error"] = found.get(row["case"])


if __name__ == "__main__":
    run(main)
