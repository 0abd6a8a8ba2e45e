"""Metrics of a run: one JSON object a line, appended as training goes."""

import json
from pathlib import Path
from typing import Any


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a metrics file."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, none if there is no file. A line cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(path: Path, last_step: int) -> None:
    """Drop the records after last_step, which a run that resumes there will write again."""
    if path.exists():
        kept = [record for record in read(path) if record["step"] <= last_step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
