"""Metrics of a run: one JSON object a line, appended as training goes."""

import json
import os
from pathlib import Path
from typing import Any

from diffusion_jax.manifests import write
from diffusion_jax.typing import InputError


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics file. Raises OSError naming it; the last line may be cut then."""
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


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


def restore(path: Path, copy: Path | None) -> None:
    """Make a metrics file what a copy of it is, or nothing: a run that resumes goes on from it."""
    if copy is not None and copy.exists():
        write(path, copy.read_bytes())
    else:
        path.unlink(missing_ok=True)
