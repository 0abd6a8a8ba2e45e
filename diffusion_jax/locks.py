"""One writer to a folder: a lock file that names its holder, and that dies with it."""

import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_jax.typing import InputError

LOCK = "lock"


def check_writable(folder: Path, name: str) -> None:
    """Raise InputError unless files can be made in a folder, or in the one to make it in.

    It is tried, and nothing left: permissions do not tell what a mount or a server allows.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"{name}={str(folder)!r} cannot be written: {place}: {error.strerror}"
        ) from None


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock for the body. Raises InputError naming the process that holds it.

    The kernel gives up the lock of a process that dies. Where the file system has no locks, the
    lock file alone says who holds it, and a dead process of this machine is told by its number.
    """
    path = folder / LOCK
    file = _hold(path)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # still held: nobody can be writing into it
        os.close(file)


def _hold(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise InputError(f"{path} is not the lock of a run: move it away")
            _lock(file, path)
            if _is(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder has removed it meanwhile


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(_holder(file), path) from None
    except OSError:  # no locks on this file system
        host, process = _holder(file)
        if host and not (host == socket.gethostname() and _is_dead(process)):
            raise _held((host, process), path) from None


def _holder(file: int) -> tuple[str, str]:
    words = os.pread(file, 1000, 0).decode(errors="replace").split()
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def _held(holder: tuple[str, str], path: Path) -> InputError:
    host, process = holder
    who = f"process {process} on {host}" if host else "another process"
    return InputError(
        f"run={str(path.parent)!r} is being written by {who}: wait for its end or stop it "
        f"(or remove {path} if it is dead)"
    )


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _is_dead(process: str) -> bool:
    with suppress(PermissionError, ValueError):
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
    return False
