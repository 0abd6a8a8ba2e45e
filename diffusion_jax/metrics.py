"""Metrics of a run: one JSON object a line, appended as training goes."""

import json
import os
from pathlib import Path
from typing import Any

from diffusion_jax.typing import InputError


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics file."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, none if there is no file. A line cut short is left out.

    Raises InputError naming the line that is no record of a step and its loss.
    """
    if not os.path.lexists(path):
        return []
    if not os.path.isfile(path):  # reading a pipe or a device would not end
        raise InputError(f"{path} is no file: move it away")
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not (isinstance(record, dict) and {"step", "loss"} <= record.keys()):
        raise InputError(f"{where} is no record of a step and its loss: take the line out")
    step, loss = record["step"], record["loss"]
    known = loss is None or (type(loss) in (int, float) and abs(loss) < 1e300)  # nor NaN
    if not (type(step) is int and 0 < step < 2**31 and known):
        raise InputError(f"{where}: step={step!r}, loss={loss!r}: take the line out")
    return record


def truncate(path: Path, last_step: int) -> None:
    """Drop the records after last_step, which a run that resumes there will write again."""
    if path.exists():
        kept = [record for record in read(path) if record["step"] <= last_step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
