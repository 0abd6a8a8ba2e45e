"""Time synchronised runs in turns, and measure programs: compilations, FLOP, memory, peaks."""

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, monitoring
from jax.experimental.compilation_cache import compilation_cache
from jax.typing import ArrayLike
from jaxtyping import Float
from numpy import ndarray
from tqdm import tqdm

from diffusion_jax.networks.precisions import PRECISIONS, products_in
from diffusion_jax.parallel import data_parallel, replicate, scatter

COMPILATION = "/jax/core/compile/backend_compile_duration"
LEAST = 3  # the fewest runs, however short the time
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
RUNS = 5  # runs for each peak; the fastest counts


class Timing(NamedTuple):
    """The median and the 10th and 90th percentiles of several runs, in seconds or as ratios."""

    median: float
    p10: float
    p90: float


def process_seconds() -> float:
    """Return the seconds since this process started, including the start of Python (on Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd field: ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Compilations:
    """The number of programs that XLA compiled within `counting`, and the seconds it took."""

    count = 0
    seconds = 0.0


@contextmanager
def counting() -> Iterator[Compilations]:
    """Count the compilations in the body. A program that JAX still holds does not count."""
    compilations = Compilations()

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event == COMPILATION:
            compilations.count += 1
            compilations.seconds += duration_secs

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        monitoring.unregister_event_duration_listener(listen)


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the seconds of one run, until all arrays that it returns are ready."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def interleave(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, budget: float | None = None
) -> dict[str, Float[ndarray, "runs"]]:
    """Return the seconds of each run of candidates that take turns.

    A slow spell of the machine then affects all of them. Every run counts, so compile before. After
    LEAST rounds, stop if the next one would exceed budget seconds in all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(repeats):
        spent = time.perf_counter() - begin
        if budget is not None and done >= LEAST and spent * (done + 1) / done > budget:
            break
        for name, run in candidates.items():
            seconds[name].append(seconds_of(run))
    return {name: np.array(runs) for name, runs in seconds.items()}


def summary(values: ArrayLike) -> Timing:
    """Return the median and the percentiles of several runs."""
    return Timing(*map(float, np.percentile(np.asarray(values), [50, 10, 90])))


class Group(NamedTuple):
    """Candidates that take turns.

    words: the group's columns in a table; "case" is its name. units: the network passes or
    training steps in a run of each candidate. images: the images that a run draws or trains on, 0
    for bare passes. flop: the FLOP of a unit.
    """

    words: dict[str, Any]
    candidates: Mapping[str, Callable[[], Any]]
    units: Mapping[str, int]
    images: int
    flop: float


def run_groups(
    groups: Sequence[Group], repeats: int, begin: float, budget: float | None
) -> Iterator[tuple[Group, dict[str, Float[ndarray, "runs"]]]]:
    """Time groups one after the other, with a progress bar, and yield the seconds of each run.

    begin: the time.monotonic() at which the budget started; compilation has used part of it.
    budget: in seconds, or None for no limit. Each group gets an equal share of what is left.
    """
    with tqdm(groups, unit="group") as bar:
        for place, group in enumerate(bar):
            bar.set_description(group.words["case"])
            left = None if budget is None else budget + begin - time.monotonic()
            share = None if left is None else left / (len(groups) - place)
            yield group, interleave(group.candidates, repeats, share)


class Peaks(NamedTuple):
    """FLOP/s of a large matrix product and of a large 3x3 convolution, over all devices."""

    matmul: float
    convolution: float


def peaks(devices: Sequence[jax.Device], dtype: str = "float32") -> Peaks:
    """Measure the peaks on all devices; the fastest of RUNS runs counts. A product is 2 FLOP.

    dtype: a name in precisions.PRECISIONS.
    """
    on_cpu = devices[0].platform == "cpu"
    n, batch, side, channels = (2048, 16, 32, 128) if on_cpu else (8192, 256, 64, 256)
    layout = ("NHWC", "HWIO", "NHWC")

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    square, kernel = (n, n), (3, 3, channels, channels)
    images = (batch, side, side, channels)
    flop = 2 * n**3, 2 * batch * side**2 * 9 * channels**2
    return Peaks(
        flop[0] * len(devices) / _fastest(jnp.matmul, square, square, devices, dtype),
        flop[1] * len(devices) / _fastest(convolve, images, kernel, devices, dtype),
    )


def _fastest(
    fn: Callable, one: tuple, two: tuple, devices: Sequence[jax.Device], dtype: str
) -> float:
    """Return the seconds of fn on arrays of these shapes. All devices share the second array."""
    run = data_parallel(products_in(dtype)(fn), (0, None), 0, devices=devices)
    kind = PRECISIONS[dtype].dtype
    x, y = (np.full(shape, 0.5, kind) for shape in ((len(devices), *one), two))
    args = scatter(x, devices), replicate(y, devices)
    jax.block_until_ready(run(*args))
    return min(seconds_of(lambda: run(*args)) for _ in range(RUNS))


def flop(fn: Callable, *args: Any) -> float:
    """Return the FLOP of a function of these arguments on one device, as XLA counts them.

    They are counted in the program for a TPU, before XLA rewrites it, so they are the same on every
    machine. The program for CPUs runs Winograd's algorithm in loops, whose body counts only once.
    """
    lowered = jax.jit(lambda *args: fn(*args)).trace(*args).lower(lowering_platforms=("tpu",))
    return float(lowered.cost_analysis()["flops"])


def memory(compiled: Any) -> int:
    """Return the peak bytes of a compiled program on one device."""
    return _bytes(compiled.memory_analysis())


def _bytes(stats: Any) -> int:
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(held + stats.temp_size_in_bytes)


def available_memory(device: jax.Device) -> int | None:
    """Return the free bytes of the accelerator or of the host, or None if they are unknown."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free += [1024 * int(found[1])] if found else []
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        free.append(int(limit.read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class Program(NamedTuple):
    """The peak bytes of a compiled program on one device, and its collectives."""

    name: str
    memory: int
    collectives: dict[str, int]


@contextmanager
def programs(device: jax.Device) -> Iterator[list[Program]]:
    """Collect the programs that the body compiles for the device's backend and keeps."""
    before = device.client.live_executables()
    found: list[Program] = []
    yield found
    for executable in device.client.live_executables():
        if not any(executable is old for old in before):
            (module,) = executable.hlo_modules()
            stats = executable.get_compiled_memory_stats()
            found.append(Program(module.name, _bytes(stats), count_collectives(module.to_string())))


def count_collectives(text: str) -> dict[str, int]:
    """Count the collectives of each kind in a program's text. A loop's body counts once."""
    kinds = "|".join(COLLECTIVES)
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", text)))


@contextmanager
def empty_cache() -> Iterator[None]:
    """Give the body a persistent compilation cache of its own, which is empty at first."""
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old = {name: getattr(jax.config, name) for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        settings["jax_compilation_cache_dir"] = folder
        try:
            _configure(settings)
            yield
        finally:
            _configure(old)


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def first_run(run: Callable[[], Any], device: jax.Device) -> dict[str, Any]:
    """Return the seconds of a run that compiles, and the needs of its largest program."""
    with counting() as compilations, programs(device) as found:
        seconds = seconds_of(run)
    largest = max(found, key=lambda program: program.memory)
    return {
        "cold": {"seconds": seconds, "xla_seconds": compilations.seconds},
        "memory_bytes": largest.memory,
        "collectives": largest.collectives,
    }
