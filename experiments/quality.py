"""Quality against cost: KID and class accuracy of many samplers, point by point.

A point is a sampler, a number of steps and a scale of guidance. Samples are kept in parts as they
are drawn, and points as they are measured, by what determines them: the same command goes on where
it was stopped, and a larger n draws only what is missing. Both carry checksums: a damaged part is
drawn anew, a damaged list of points is refused.
"""

import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from tqdm import tqdm

from diffusion_jax import evaluation, timing
from diffusion_jax.config import Config, at_least
from diffusion_jax.evaluation import LEAST, Estimate, Yardstick
from diffusion_jax.files import write_atomically
from diffusion_jax.runs import Model
from diffusion_jax.samplers import SAMPLERS, Tableau
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, RunWarning, choose, require
from experiments import tables
from experiments.measure import Setting, parse_case
from experiments.tables import Record

EVALUATIONS = (3, 5, 8, 10, 15, 25, 50)  # of a sampler that is named without steps
PART = 250  # images that are drawn at once, and stored as one file
BAR = "{l_bar}{bar}| {elapsed}<{remaining}"


class Case(NamedTuple):
    """A sampler with its steps, as it was asked for, and a scale of guidance; 1 is none."""

    word: str
    tableau: Tableau
    guidance: float

    @property
    def passes(self) -> int:
        """How many images the network sees for each that is drawn: two in a guided evaluation."""
        return self.tableau.rows * (1 if self.guidance == 1 else 2)

    @property
    def options(self) -> dict[str, float]:
        """The guidance, as sampling takes it."""
        return {} if self.guidance == 1 else {"guidance": self.guidance}


def plan(words: Sequence[str], scales: Sequence[str], config: Config) -> list[Case]:
    """The cases, the cheapest first. Raises InputError for what cannot be."""
    schedule = config.diffusion.build()
    tableaus = {name: made for word in words for name, made in _expand(word, schedule).items()}
    numbers = [_scale(scale, config) for scale in scales]
    require(tableaus and numbers, "samplers and guidance_scales: give at least one of each")
    cases = [Case(*item, scale) for item in tableaus.items() for scale in dict.fromkeys(numbers)]
    return sorted(cases, key=lambda case: case.passes)


def default_words(schedule: NoiseSchedule) -> list[str]:
    """All samplers, and DDPM at every step of the schedule."""
    return [*SAMPLERS, f"ddpm:{schedule.steps}"]


def _expand(word: str, schedule: NoiseSchedule) -> dict[str, Tableau]:
    """The tableau of name:steps; of a name alone those that EVALUATIONS leave room for."""
    if ":" in word:
        return {word: parse_case(word, schedule)}
    choose(SAMPLERS, "samplers", word)
    found: dict[str, Tableau] = {}
    for budget in EVALUATIONS:
        for steps in range(min(budget, schedule.steps), 0, -1):
            tableau = parse_case(f"{word}:{steps}", schedule)
            if tableau.rows <= budget:
                found[f"{word}:{steps}"] = tableau
                break
    return found


def _scale(text: str, config: Config) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    require(math.isfinite(scale), f"guidance_scales={text}: they must be finite numbers")
    without = config.data.null_context or config.training.keep_probability in (0, 1)
    if scale != 1 and without:
        raise InputError(
            f"guidance_scales={text}: this run was trained only with or only without context; "
            "guidance needs both: leave it at 1"
        )
    return scale


class Sweep(NamedTuple):
    """What all points of a sweep share."""

    model: Model
    yardstick: Yardstick
    n: int
    seed: int
    dtype: str
    folder: Path
    setting: Record  # all of it that decides what an image is

    def describe(self, case: Case) -> Record:
        """What determines the images of a case."""
        return {"case": case.word, "guidance": case.guidance} | self.setting

    def key(self, case: Case) -> str:
        """What determines a point."""
        real = self.yardstick.real.reference
        against = _digest(real.images, real.labels, *jax.tree.leaves(self.yardstick.params))
        return _text(self.describe(case) | {"n": self.n, "against": against})

    def parts(self, case: Case) -> list[tuple[Path, int]]:
        """The stems of the files of a case's samples, and how many images each must hold."""
        name = case.word.replace(":", "-").replace("=", "-")
        digest = _digest(_text(self.describe(case)).encode())
        folder = self.folder / "samples" / f"{name}-{digest}"
        firsts = range(0, self.n, PART)
        return [(folder / f"{i:04d}", min(PART, self.n - k)) for i, k in enumerate(firsts)]

    @property
    def labels(self) -> np.ndarray | None:
        """The samples' contexts, those of the real images; None for a run without context."""
        if self.model.config.data.null_context:
            return None
        labels = self.yardstick.real.reference.labels
        return labels[np.arange(self.n) % len(labels)]


def sweep(
    model: Model,
    n: int,
    real_n: int,
    seed: int,
    dtype: str,
    folder: Path,
    devices: Sequence[jax.Device],
) -> Sweep:
    """A sweep that keeps what it finds in a folder. Raises InputError for what cannot be."""
    at_least("n", n, LEAST)
    last = seed + (n - 1) // PART
    require(seed >= 0 and last < 2**32, f"seed={seed}: {n} images need it in 0..{2**32 - 1}")
    path = folder / "classifier.npz"
    yardstick = evaluation.yardstick(model.config, real_n, path, devices, print)
    setting = {"model": fingerprint(model), "real": real_n, "seed": seed, "dtype": dtype}
    return Sweep(model, yardstick, n, seed, dtype, folder, setting)


def fingerprint(model: Model) -> str:
    """A hash of a model's configuration and weights."""
    return _digest(_text(model.config.to_dict()).encode(), *jax.tree.leaves(model.variables))


def _digest(*parts: bytes | ArrayLike) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.asarray(part).tobytes())
    return digest.hexdigest()[:16]


def _text(record: Record) -> str:
    return json.dumps(record, sort_keys=True)


def measure_points(sweep: Sweep, cases: Sequence[Case]) -> list[Record]:
    """A record for each case, with those found before; every new one is written at once."""
    path = sweep.folder / "points.jsonl"
    kept = read_points(path)
    keys = [sweep.key(case) for case in cases]
    missing = [case for case, key in zip(cases, keys, strict=True) if key not in kept]
    todo = [(case, p) for case in missing for p in sweep.parts(case) if _stored(*p) is None]
    total = sum(case.passes * count for case, (_, count) in todo)
    print(f"{len(cases)} points, {len(cases) - len(missing)} of them known", flush=True)
    with tqdm(total=total, bar_format=BAR, smoothing=0.1) as bar:
        for case, key in zip(cases, keys, strict=True):
            if key in kept:
                continue
            bar.set_description(f"{case.word} x{case.guidance:g}")
            images = draw(sweep, case, bar)
            found = sweep.yardstick.measure(images, sweep.labels)
            kept[key] = {name: estimate._asdict() for name, estimate in found.items()}
            kept = read_points(path) | kept  # another command may have added some
            lines = (f"{_text(_line(k, found))}\n" for k, found in kept.items())
            write_atomically(path, "".join(lines).encode())
    return [_point(case, kept[key]) for case, key in zip(cases, keys, strict=True)]


def read_points(path: Path) -> dict[str, Record]:
    """What is known already, by what determines it."""
    if not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        points = {_text(line["key"]): line["found"] for line in lines}
        sound = lines == [_line(*point) for point in points.items()]
    except (ValueError, KeyError, TypeError):
        sound = False
    require(sound, f"{path} is damaged: move it away, the samples beside it are kept")
    return points


def _line(key: str, found: Record) -> Record:
    """A point as it is stored, with its checksum."""
    sha256 = _digest(key.encode(), _text(found).encode())
    return {"key": json.loads(key), "found": found, "sha256": sha256}


def draw(sweep: Sweep, case: Case, bar: tqdm) -> np.ndarray:
    """The samples of a case in uint8, read where they are stored; part i has the seed seed + i."""
    parts, labels = [], sweep.labels
    for number, (stem, count) in enumerate(sweep.parts(case)):
        stored = _stored(stem, count)
        if stored is None:
            context = None if labels is None else labels[number * PART :][:count]
            setting = Setting(sweep.model, count, sweep.dtype, sweep.yardstick.devices)
            options = case.options | {"context": context, "seed": sweep.seed + number}
            images = setting.draw(case.tableau, **options)
            require(np.all(np.isfinite(images)), f"samplers={case.word}: it gives no numbers")
            stored = evaluation.to_pixels(images)
            _save(stem, stored)
            bar.update(case.passes * count)
        parts.append(stored)
    return np.concatenate(parts)


def _stored(stem: Path, count: int) -> np.ndarray | None:
    """The first images of a part, if its file is sound, as its name tells, and has so many."""
    for path in stem.parent.glob(f"{stem.name}-*.npy"):
        data = path.read_bytes()
        if path.stem != f"{stem.name}-{_digest(data)}":
            warnings.warn(RunWarning(f"{path} is damaged: its images are drawn anew"), stacklevel=2)
        elif len(images := np.load(io.BytesIO(data), allow_pickle=False)) >= count:
            return images[:count]
    return None


def _save(stem: Path, images: np.ndarray) -> None:
    """Write a part as STEM-CHECKSUM.npy, in place of a shorter or damaged one."""
    buffer = io.BytesIO()
    np.save(buffer, images)
    for path in stem.parent.glob(f"{stem.name}-*.npy"):
        path.unlink()
    write_atomically(
        stem.with_name(f"{stem.name}-{_digest(buffer.getvalue())}.npy"), buffer.getvalue()
    )


def _point(case: Case, found: Record) -> Record:
    words = {"case": case.word, "guidance": case.guidance, "evaluations": case.passes}
    return words | found


def time_points(
    model: Model,
    cases: Sequence[Case],
    batch: int,
    dtype: str,
    devices: Sequence[jax.Device],
    rounds: int,
) -> list[Record]:
    """The seconds of a batch of each case: all take turns, so many times; compiled before."""
    setting = Setting(model, batch, dtype, tuple(devices))
    for options in {case.guidance == 1: case.options for case in cases}.values():
        setting.draw(cases[0].tableau, rows=2, **options)
    runs = {
        str(i): partial(setting.draw, case.tableau, **case.options) for i, case in enumerate(cases)
    }
    with tqdm(total=rounds * len(cases), desc="timing", unit="run") as bar:
        seconds = timing.interleave(runs, rounds, progress=lambda _: bar.update())
    return [timing.summary(each)._asdict() for each in seconds.values()]


def front(points: Iterable[Record], cost: str = "evaluations") -> list[Record]:
    """The Pareto front of cost, "evaluations" or "seconds", and KID."""
    return tables.front(points, lambda p: cost_of(p, cost), lambda p: p["KID"]["value"])


def cost_of(point: Record, name: str) -> float:
    """A point's evaluations or seconds."""
    return point["seconds"]["median"] if name == "seconds" else point[name]


def choose_within(points: Iterable[Record], budget: int) -> tuple[Record, Record] | None:
    """Of the points of at most so many evaluations: the cheapest whose KID is within a standard
    error of the best one's, and the best; None where there is no point."""
    able = [point for point in points if point["evaluations"] <= budget]
    if not able:
        return None
    best = min(able, key=lambda point: point["KID"]["value"])
    bound = best["KID"]["value"] + best["KID"]["error"]
    good = [point for point in able if point["KID"]["value"] <= bound]
    return min(good, key=lambda point: (point["evaluations"], point["KID"]["value"])), best


def difference(point: Record, other: Record) -> Estimate:
    """The KID of one less that of the other; the error as if they were independent."""
    ours, theirs = (Estimate(**p["KID"]) for p in (point, other))
    return Estimate(ours.value - theirs.value, math.hypot(ours.error, theirs.error))
