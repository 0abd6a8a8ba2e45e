"""Metrics of a run: one JSON object a line, appended as training goes."""

import json
import os
from pathlib import Path
from typing import Any

from diffusion_jax.files import open_file, write_atomically
from diffusion_jax.typing import InputError


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics file, never through a link.

    Raises OSError naming it; the last line may be cut then.
    """
    try:
        with open(path, "a", opener=_open_here) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _open_here(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, none if there is no file. A line cut short is left out.

    Raises InputError naming the line that is no record of a step and its loss.
    """
    try:
        with open_file(path) as file:
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
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
    if copy is None:
        path.unlink(missing_ok=True)
        return
    with open_file(copy) as file:
        write_atomically(path, file.read())
