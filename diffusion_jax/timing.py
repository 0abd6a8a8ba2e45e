"""Timing: synchronised medians, candidates interleaved run by run, and compilations counted."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import monitoring

COMPILATION = "/jax/core/compile/backend_compile_duration"


class Timing(NamedTuple):
    """Seconds of one run: the median and the 10th and 90th percentiles of several."""

    median: float
    p10: float
    p90: float


def process_seconds() -> float:
    """The seconds since this process was started, the start of Python included (on Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd field: ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Compilations:
    """How many programs XLA has compiled within `counting`."""

    count = 0


@contextmanager
def counting() -> Iterator[Compilations]:
    """Count the compilations of the body; what a cache answers is none."""
    compilations = Compilations()

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        compilations.count += event == COMPILATION

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        monitoring.unregister_event_duration_listener(listen)


def interleave(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time candidates in turn, after one run of each that does not count.

    What slows the machine down for a while then meets all of them. A candidate returns arrays,
    for which the clock waits.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in candidates.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(*np.percentile(s, [50, 10, 90])) for name, s in seconds.items()}
