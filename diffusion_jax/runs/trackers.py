"""Trackers: where a run's scalars and pictures go, in addition to metrics.jsonl.

A tracker is one class, and one line in TRACKERS. It is built from the run folder and its options,
when training starts or continues.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtyping import UInt8
from numpy import ndarray

from diffusion_jax import pictures, spec
from diffusion_jax.files import append, write_atomically
from diffusion_jax.runs import metrics
from diffusion_jax.typing import import_extra, require

Picture = UInt8[ndarray, "height width 3"]


class Tracker:
    """The methods of a tracker, which do nothing here.

    Steps that were tracked before a restart may be sent again. needs: the module of the extra
    `trackers` that the tracker imports, or "".
    """

    needs = ""

    def scalars(self, records: Sequence[dict[str, Any]]) -> None:
        """Take the record of each step: "step", "epoch", "loss" and others; None if not finite."""

    def picture(self, name: str, picture: Picture, step: int) -> None:
        """Take a picture of the state after a step."""

    def close(self) -> None:
        """Write what is still in memory."""


class Csv(Tracker):
    """A table, metrics.csv, and a PNG file for each picture, all in the run folder."""

    def __init__(self, folder: Path) -> None:
        """Begin the table with the steps that metrics.jsonl has."""
        self.folder = folder
        self.columns: list[str] = []
        write_atomically(folder / "metrics.csv", b"")
        self.scalars(metrics.read(folder / metrics.METRICS))

    def scalars(self, records: Sequence[dict[str, Any]]) -> None:
        """Append a row for each record, and the header before the first one."""
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        if records and not self.columns:
            self.columns = list(records[0])
            rows.writerow(self.columns)
        rows.writerows([record[name] for name in self.columns] for record in records)
        append(self.folder / "metrics.csv", table.getvalue())

    def picture(self, name: str, picture: Picture, step: int) -> None:
        """Write NAME-STEP.png."""
        pictures.save_png(self.folder / f"{name}-{step}.png", picture)


class TensorBoard(Tracker):
    """Event files for TensorBoard, in the folder tensorboard of the run."""

    needs = "tensorboardX"

    def __init__(self, folder: Path) -> None:
        """Open an event file that replaces the steps after those in metrics.jsonl."""
        last = max((record["step"] for record in metrics.read(folder / metrics.METRICS)), default=0)
        place = _own_folder(folder, "tensorboard")
        library = import_extra(self.needs, "trackers")
        self.writer = library.SummaryWriter(str(place), purge_step=last + 1)

    def scalars(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the scalars of each record that are finite."""
        for record in records:
            for name, value in _values(record).items():
                self.writer.add_scalar(name, value, record["step"])

    def picture(self, name: str, picture: Picture, step: int) -> None:
        """Add an image."""
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write the rest of the event file."""
        self.writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases, which a continued training continues.

    project: its project. mode: "online", or "offline" to write only into the folder wandb of the
    run, from where `wandb sync` uploads it.
    """

    needs = "wandb"

    def __init__(
        self,
        folder: Path,
        project: str = "diffusion_jax",
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        """Start or continue the run."""
        _own_folder(folder, "wandb").mkdir(exist_ok=True)
        self.library = import_extra(self.needs, "trackers")
        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        about = {"project": project, "name": folder.name, "id": number, "resume": "allow"}
        self.run = self.library.init(dir=str(folder), mode=mode, **about)

    def scalars(self, records: Sequence[dict[str, Any]]) -> None:
        """Log the scalars of each record that are finite."""
        for record in records:
            self.run.log(_values(record), step=record["step"])

    def picture(self, name: str, picture: Picture, step: int) -> None:
        """Log an image."""
        self.run.log({name: self.library.Image(picture)}, step=step)

    def close(self) -> None:
        """Finish the run, which uploads the rest."""
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "csv": Csv,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}


def check(text: str) -> None:
    """Raise InputError if a spec is invalid, or the library that it needs is not installed."""
    name = spec.parse(text, TRACKERS, "tracker", ("folder",)).name
    if needs := TRACKERS[name].needs:
        import_extra(needs, "trackers")


def build(text: str, folder: Path) -> Tracker:
    """Return the tracker that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, TRACKERS, "tracker", folder=folder)


def _own_folder(folder: Path, name: str) -> Path:
    place = folder / name
    require(not place.is_symlink(), f"{place} is a link: a run's own folders must be in it")
    return place


def _values(record: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of a record that are finite, without its step."""
    return {k: v for k, v in record.items() if k != "step" and v is not None}
