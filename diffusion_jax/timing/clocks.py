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
BAR = "{l_bar}{bar}| {elapsed}<{remaining}"  # the bar counts seconds
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
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int,
    budget: float | None = None,
    progress: Callable[[float], Any] | None = None,
) -> dict[str, Float[ndarray, "runs"]]:
    """Return the seconds of each run of candidates that take turns.

    A slow spell of the machine then affects all of them. Every run counts, so compile before. After
    LEAST rounds, stop if the next one would exceed budget seconds in all. progress: called with the
    seconds of each run.
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
    """Return the median and the percentiles of several runs."""
    return Timing(*map(float, np.percentile(np.asarray(values), [50, 10, 90])))


def rounds(each: Mapping[str, float], repeats: int, budget: float | None) -> dict[str, int]:
    """Return how many rounds of each group fit into a budget in seconds.

    each: the seconds of a round of each group. A group gets LEAST to repeats rounds. Time that
    short groups do not use goes to longer ones.
    """
    if budget is None:
        return dict.fromkeys(each, repeats)
    chosen = {}
    for place, name in enumerate(sorted(each, key=lambda name: each[name])):
        share = budget / (len(each) - place)
        chosen[name] = int(np.clip(share / each[name], min(LEAST, repeats), repeats))
        budget = max(budget - chosen[name] * each[name], 0.0)
    return chosen


class Group(NamedTuple):
    """Candidates that take turns.

    words: the group's columns in a table; "case" is its name. units: the network passes or
    training steps in a run of each candidate. images: the images that a run draws or trains on, 0
    for bare passes. flop: the FLOP of a unit. seconds: the approximate time of a round.
    """

    words: dict[str, Any]
    candidates: Mapping[str, Callable[[], Any]]
    units: Mapping[str, int]
    images: int
    flop: float
    seconds: float


def run_groups(
    groups: Sequence[Group], repeats: int, begin: float, budget: float | None
) -> Iterator[tuple[Group, dict[str, Float[ndarray, "runs"]]]]:
    """Time groups one after the other, with a progress bar, and yield the seconds of each run.

    begin: the time.monotonic() at which the budget started; compilation has used part of it.
    budget: in seconds; None sets no limit.
    """
    each = {str(place): group.seconds for place, group in enumerate(groups)}

    def plan() -> dict[str, int]:
        left = None if budget is None else max(budget + begin - time.monotonic(), 0.0)
        return rounds(each, repeats, left)

    planned = plan()
    total = sum(planned[place] * seconds for place, seconds in each.items())
    print(_estimate(groups, total, time.monotonic() - begin, repeats, budget), flush=True)
    with tqdm(total=total, bar_format=BAR) as bar:

        def advance(seconds: float) -> None:
            bar.total = max(bar.total, bar.n + seconds)  # the estimate may have been too short
            bar.update(seconds)

        for place, group in enumerate(groups):
            bar.set_description(group.words["case"])
            count = plan()[str(place)]
            share = None if budget is None else count * each.pop(str(place))
            yield group, interleave(group.candidates, count, share, advance)


def _estimate(
    groups: Sequence[Group], total: float, spent: float, repeats: int, budget: float | None
) -> str:
    """Return the seconds that the runs will take, and a message if they exceed the budget."""
    words = f"{spent:.0f} s until here, compilation included; about {total:.0f} s of runs"
    if budget is None or spent + total <= budget:
        return words
    longest = max(groups, key=lambda group: group.seconds)
    return (
        f"{words}: more than the budget of {budget:.0f} s, since each candidate has at least "
        f"{min(LEAST, repeats)} runs; the longest is {longest.words['case']}, with "
        f"{longest.seconds:.0f} s a round"
    )
