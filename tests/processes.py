"""Run apps in separate processes: a fork of one that has imported, or the processes of a job."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
HANGS = 1800  # seconds after which a process counts as hanging; slow machines need many
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["experiments.app", "diffusion_jax.runs.overview", "experiments.tables", "tests.models"]
)


class Done(NamedTuple):
    """The result of an app that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """An app in a process forked from one that has imported the library.

    It is used like a Popen whose stdout and stderr are pipes.
    """

    def __init__(self, module: str, *args: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._files:
            file.touch()
        self.process = SERVER.Process(target=_run, args=(module, args, *self._files))
        self.process.start()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._folder.cleanup()

    def poll(self) -> int | None:
        """Return the exit code, or None while the app runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def end(self) -> Done:
        """Wait for the end, and return the exit code and the outputs."""
        self.process.join(HANGS)
        assert self.process.exitcode is not None, "the app hangs"
        return Done(self.process.exitcode, *(file.read_text() for file in self._files))


def run_app(module: str, *args: str) -> Done:
    """Run python -m MODULE to its end, without waiting for imports."""
    with Forked(module, *args) as app:
        return app.end()


def _run(module: str, args: tuple[str, ...], *files: Path) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(
    app: str,
    *args: str,
    processes: int = 1,
    devices: int = 4,
    own: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen]:
    """Start an app in the processes of one job, which share a number of CPU devices.

    own: further flags of each process.
    """
    job = [[f"--cpu_devices={devices // processes}"] for _ in range(processes)]
    for flags_of_one, more in zip(job, own or [()] * processes, strict=True):
        flags_of_one += more
    if processes > 1:
        where = f"--processes=127.0.0.1:{free_port()},{processes}"
        for number, flags_of_one in enumerate(job):
            flags_of_one.append(f"{where},{number}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"experiments.{app}", *args, *flags_of_one],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags_of_one in job
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = HANGS) -> list[tuple[int, str]]:
    """Return the exit code and the output of each process, and kill processes that remain."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    codes = [process.returncode for process in processes]
    return list(zip(codes, outputs, strict=True))


def free_port() -> int:
    """Return a port of the loopback on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
