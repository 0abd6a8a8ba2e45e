"""Metrics of a run: one JSON object a line, appended as training goes."""

import json
from pathlib import Path
from typing import Any

from diffusion_jax.manifests import write


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics file. Raises OSError naming it; the last line may be cut then."""
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, none if there is no file. A line cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def restore(path: Path, copy: Path | None) -> None:
    """Make a metrics file what a copy of it is, or nothing: a run that resumes goes on from it."""
    if copy is not None and copy.exists():
        write(path, copy.read_bytes())
    else:
        path.unlink(missing_ok=True)
