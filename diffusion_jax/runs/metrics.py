"""The metrics of a run: one JSON object in each line, appended as training goes on."""

import json
from pathlib import Path
from typing import Any

from diffusion_jax import files
from diffusion_jax.files import open_file, write_atomically
from diffusion_jax.typing import InputError, require

METRICS = "metrics.jsonl"


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics file. Raise OSError as files.append does."""
    files.append(path, "".join(json.dumps(record) + "\n" for record in records))


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without a last line that is cut short.

    Return an empty list if there is no file. Raise InputError naming a line that is not a record of
    a step and its loss.
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
        step, loss = record["step"], record["loss"]
    except (ValueError, RecursionError, TypeError, KeyError):
        message = f"{where} is not a record of a step and its loss: take the line out"
        raise InputError(message) from None
    known = loss is None or (type(loss) in (int, float) and abs(loss) < 1e300)  # nor NaN
    fits = type(step) is int and 0 < step < 2**31 and known
    require(fits, f"{where}: step={step!r}, loss={loss!r}: take the line out")
    return record


def restore(path: Path, copy: Path | None) -> None:
    """Replace a metrics file by a checkpoint's copy of it, or remove it if there is no copy."""
    if copy is None:
        path.unlink(missing_ok=True)
        return
    with open_file(copy) as file:
        write_atomically(path, file.read())
