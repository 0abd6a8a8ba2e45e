"""Timing: synchronised runs, candidates interleaved run by run, and compilations counted."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import monitoring
from jax.typing import ArrayLike
from jaxtyping import Float
from numpy import ndarray

COMPILATION = "/jax/core/compile/backend_compile_duration"
LEAST = 3  # runs, however short the time


class Timing(NamedTuple):
    """The median and the 10th and 90th percentiles of several runs: of seconds, or of ratios."""

    median: float
    p10: float
    p90: float


def process_seconds() -> float:
    """The seconds since this process was started, the start of Python included (on Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd field: ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Compilations:
    """How many programs XLA has compiled within `counting`, and the seconds that it took."""

    count = 0
    seconds = 0.0


@contextmanager
def counting() -> Iterator[Compilations]:
    """Count the compilations of the body; a program that JAX still holds is none."""
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
    """The seconds of one run, up to the last of the arrays that it returns."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    budget: float | None = None,
    progress: Callable[[float], Any] | None = None,
) -> dict[str, Float[ndarray, "runs"]]:
    """The seconds of each run of candidates that take turns, so that what slows the machine
    down for a while meets all of them.

    Every run counts: compile before. The rounds end early, after LEAST of them, where the next
    one would take more than budget seconds in all. progress is told the seconds of each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(repeats):
        spent = time.perf_counter() - begin
        if budget is not None and done >= LEAST and spent * (done + 1) / done > budget:
            break
        for name, run in candidates.items():
            seconds[name].append(seconds_of(run))
            if progress is not None:
                progress(seconds[name][-1])
    return {name: np.array(runs) for name, runs in seconds.items()}


def summary(values: ArrayLike) -> Timing:
    """What is reported of several runs."""
    return Timing(*map(float, np.percentile(np.asarray(values), [50, 10, 90])))


def rounds(each: Mapping[str, float], repeats: int, budget: float | None) -> dict[str, int]:
    """How many rounds of each group, of so many seconds a round, fit into a budget of seconds.

    At least LEAST and at most repeats; what short groups leave goes to the longer ones.
    """
    if budget is None:
        return dict.fromkeys(each, repeats)
    chosen = {}
    for place, name in enumerate(sorted(each, key=lambda name: each[name])):
        share = budget / (len(each) - place)
        chosen[name] = int(np.clip(share / each[name], min(LEAST, repeats), repeats))
        budget = max(budget - chosen[name] * each[name], 0.0)
    return chosen
