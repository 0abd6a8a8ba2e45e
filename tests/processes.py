"""Run apps in processes that are forked from one that has imported what they need."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HANGS = 1800  # seconds after which a process counts as hanging: a slow machine needs many
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["experiments.flags", "experiments.quality"])


class Done(NamedTuple):
    """An app that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run_app(module: str, *args: str) -> Done:
    """Run python -m MODULE to its end, with no import to wait for."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process = SERVER.Process(target=_run, args=(module, args, *files))
        process.start()
        process.join(HANGS)
        assert process.exitcode is not None, f"{module} hangs"
        return Done(process.exitcode, *(file.read_text() for file in files))


def _run(module: str, args: tuple[str, ...], *files: Path) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
