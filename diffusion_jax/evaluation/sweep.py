"""A sweep measures many cases one by one, keeps the results in a file, and compares their costs.

Each line of the file is a result in JSON: the settings that determine it, the measures, and a
checksum of both. The same command continues a sweep that was stopped.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.evaluation.estimate import Estimate, from_left
from diffusion_jax.files import open_file, write_atomically
from diffusion_jax.typing import InputError

Record = dict[str, Any]
BUDGETS = (5, 10, 25, 50, 100, 1000)  # network evaluations


class Case(NamedTuple):
    """The settings that determine a result, ready for JSON, and the function that measures it."""

    settings: Record
    measure: Callable[[], Record]


def run(path: Path, cases: Iterable[Case]) -> Iterator[Record]:
    """Yield the result of each case, from the file if it is there; else measure and store it.

    Raise InputError if the file is damaged.
    """
    kept = read(path)
    for case in cases:
        if (key := _text(case.settings)) not in kept:
            found = json.loads(_text(case.measure()))
            kept = read(path) | {key: found}  # a different command may have added some
            lines = (f"{_text(_line(*each))}\n" for each in kept.items())
            write_atomically(path, "".join(lines).encode())
        yield kept[key]


def read(path: Path) -> dict[str, Record]:
    """Return the results in a file, keyed by the text of their settings.

    Raise InputError naming the first line that this module did not write, or that was changed.
    """
    if not path.exists():
        return {}
    kept = {}
    with open_file(path) as file:
        for number, text in enumerate(file.read().splitlines(), start=1):
            try:
                line = json.loads(text)
                key, found = _text(line["settings"]), line["found"]
                sound = line == _line(key, found)
            except (ValueError, KeyError, TypeError, RecursionError):
                sound = False
            if not sound:
                raise InputError(f"{path}: line {number} is damaged: remove the line")
            kept[key] = found
    return kept


def digest(*parts: str | bytes | ArrayLike) -> str:
    """Return a short hash of texts and arrays."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(data if isinstance(data, bytes) else np.asarray(data).tobytes())
    return total.hexdigest()[:16]


def _line(key: str, found: Record) -> Record:
    return {"settings": json.loads(key), "found": found, "sha256": digest(key, _text(found))}


def _text(record: Record) -> str:
    return json.dumps(record, sort_keys=True)


class Point(NamedTuple):
    """The cost and the quality of a method.

    series: the method's name without its number of steps. evaluations: passes of the network for
    an image. measures: the first one is compared, and lower is better.
    """

    label: str
    series: str
    evaluations: int
    seconds: float
    measures: dict[str, Estimate]

    @property
    def quality(self) -> Estimate:
        """Return the first measure."""
        return next(iter(self.measures.values()))


def front(points: Iterable[Point], cost: str) -> list[Point]:
    """Return the Pareto front by cost: the points that no equally cheap or cheaper point beats.

    cost: "evaluations" or "seconds".
    """
    chosen: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, cost), p.quality)):
        if not chosen or point.quality.value < chosen[-1].quality.value:
            chosen.append(point)
    return chosen


def choose_within(points: Sequence[Point], budget: int) -> tuple[Point, Point] | None:
    """Return the cheapest good point and the best point with at most `budget` evaluations.

    A point is good if its difference from the best one is within a standard error. Return None if
    every point has more evaluations.
    """
    able = [point for point in points if point.evaluations <= budget]
    if not able:
        return None
    best = min(able, key=lambda p: p.quality)
    good = [point for point in able if point is best or _is_within_error(point, best)]
    return min(good, key=lambda p: (p.evaluations, p.quality)), best


def difference(point: Point, other: Point) -> Estimate:
    """Return the difference in quality of two points, paired block by block if both have blocks.

    If the images have the same noise and contexts, the difference has a smaller error than the
    points have. Without blocks, the error assumes independent samples.
    """
    ours, theirs = point.quality, other.quality
    value = ours.value - theirs.value
    if ours.left and theirs.left:
        return from_left(value, np.subtract(ours.left, theirs.left))
    return Estimate(value, math.hypot(ours.error, theirs.error))


def advise(points: Sequence[Point], budgets: Sequence[int] = BUDGETS) -> Iterator[str]:
    """Yield a sentence for each budget of network evaluations: which point to use within it."""
    before = None
    for budget in budgets:
        chosen = choose_within(points, budget)
        if chosen is not None and chosen != before:
            cheapest, best = map(_describe, chosen)
            also = "" if chosen[0] is chosen[1] else f", which is as good as the best, {best}"
            yield f"With at most {budget} evaluations use {cheapest}{also}."
        before = chosen


def _describe(point: Point) -> str:
    cost = f"{point.evaluations} evaluations, {point.seconds:.2g} s"
    return f"{point.label} ({cost}, {next(iter(point.measures))} {point.quality})"


def _is_within_error(point: Point, best: Point) -> bool:
    gap = difference(point, best)
    return gap.value <= gap.error
