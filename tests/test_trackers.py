"""Trackers get every step once, pictures, and go on where a stopped run continues."""

import csv
import sys
from typing import ClassVar

import jax
import numpy as np
import pytest

from diffusion_jax.data import Dataset
from diffusion_jax.runs import metrics, trackers
from diffusion_jax.runs.trackers import Tracker
from diffusion_jax.runs.trainer import Keeping, train_run
from diffusion_jax.typing import InputError
from tests.models import TINY

SMALL = TINY.override(class_names=("a", "b"), batch_size=4, epochs=2)
LABELS = np.eye(2, dtype=np.float32)[np.arange(8) % 2]
DATA = Dataset(np.arange(8 * 192).reshape(8, 8, 8, 3).astype(np.uint8), LABELS, ("a", "b"))
RECORDS = [{"step": step, "epoch": 0, "loss": loss} for step, loss in ((1, 0.5), (2, None))]
PICTURE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def test_a_new_tracker_gets_each_step_and_a_picture_at_each_checkpoint(
    tmp_path, monkeypatch
) -> None:
    class Tiny(Tracker):
        events: ClassVar[list[tuple]] = []

        def __init__(self, folder, mark: str = "x") -> None:
            self.mark = mark

        def scalars(self, records) -> None:
            self.events += [(self.mark, *record.values()) for record in records]

        def picture(self, name, picture, step) -> None:
            self.events.append((name, picture.dtype, picture.ndim, step))

        def close(self) -> None:
            self.events.append(("closed",))

    monkeypatch.setitem(trackers.TRACKERS, "tiny", Tiny)
    keeping = Keeping(save_every=1, trackers=("tiny:mark=y", "csv"))
    run, config = tmp_path / "run", SMALL.fill_in(DATA)
    train_run(run, config, DATA, jax.devices()[:1], keeping, lambda text: None)
    records = metrics.read(run / metrics.METRICS)
    steps = [("y", *record.values()) for record in records]
    assert [event for event in Tiny.events if event[0] == "y"] == steps
    pictures = [event for event in Tiny.events if event[0] == "samples"]
    assert pictures == [("samples", np.uint8, 3, step) for step in (2, 4)]
    assert Tiny.events[-1] == ("closed",)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == [record["loss"] for record in records]
    assert {path.name for path in run.glob("samples*.png")} == {"samples-2.png", "samples-4.png"}


def test_a_continued_table_has_each_step_once(tmp_path) -> None:
    metrics.append(tmp_path / metrics.METRICS, RECORDS)
    first = trackers.build("csv", tmp_path)
    first.scalars([{"step": 3, "epoch": 1, "loss": 0.25}])  # its checkpoint was not written
    trackers.build("csv", tmp_path).scalars([{"step": 3, "epoch": 1, "loss": 0.125}])
    table = (tmp_path / "metrics.csv").read_text()
    assert table == "step,epoch,loss\n1,0,0.5\n2,0,\n3,1,0.125\n"


def test_tensorboard_gets_finite_scalars_and_pictures(tmp_path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    tracker = trackers.build("tensorboard", tmp_path)
    tracker.scalars(RECORDS)
    tracker.picture("samples", PICTURE, 2)
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events, data = [], file.read_bytes()
    while data:  # a record: length, checksum, event, checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    scalars = [(step, v.tag, v.simple_value) for step, v in values if not v.HasField("image")]
    assert scalars == [(1, "epoch", 0), (1, "loss", 0.5), (2, "epoch", 0)]
    (image,) = [(step, v.tag, v.image.width) for step, v in values if v.HasField("image")]
    assert image == (2, "samples", 2)


def test_wandb_logs_offline(tmp_path) -> None:
    pytest.importorskip("wandb")
    tracker = trackers.build("wandb:mode=offline", tmp_path)
    tracker.scalars(RECORDS)
    tracker.picture("samples", PICTURE, 2)
    assert tracker.run.summary["loss"] == 0.5
    tracker.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(folder.glob("*.wandb")).stat().st_size > 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_trackers_that_cannot_work_are_named(tmp_path, monkeypatch, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"{name} is a link"):
        trackers.build(name, tmp_path)
    library = trackers.TRACKERS[name].needs
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library} is not installed: .*\[trackers\]"):
        trackers.check(name)
    with pytest.raises(InputError, match="tracker='tensorbord' is unknown: did you mean tensorb"):
        trackers.check("tensorbord")
