"""Time synchronised runs, interleave candidates run by run, and count compilations."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import monitoring
from jax.typing import ArrayLike
from jaxtyping import Float
from numpy import ndarray
from tqdm import tqdm

COMPILATION = "/jax/core/compile/backend_compile_duration"
LEAST = 3  # the fewest runs, however short the time


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
