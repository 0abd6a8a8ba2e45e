"""One writer to a folder: a lock file that names its holder, and that dies with it."""

import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_jax.typing import InputError, require

LOCK = "lock"
OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


def check_writable(folder: Path, name: str) -> None:
    """Raise InputError unless files can be made in a folder, or in its nearest existing parent.

    Make a file to find out, because permissions do not show what a mount or a server allows.
    """
    place = folder.absolute()
    try:
        while not _is_there(place):
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"{place}: {error.strerror}"
        raise InputError(f"{name}={str(folder)!r} cannot be written: {reason}") from None


def _is_there(path: Path) -> bool:
    """Return whether a path exists. Raise OSError if the system does not accept or show it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock for the body. Raise InputError naming the process that holds it.

    The kernel releases the lock of a process that dies. Where the file system has no locks, the
    lock file names its holder, and a process of this machine that is dead holds nothing.
    """
    path = folder / LOCK
    try:
        file = os.open(path, OPEN, 0o666)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        regular = stat.S_ISREG(os.fstat(file).st_mode)
        require(regular, f"{path} is not the lock of a run: move it away")
        holder = os.pread(file, 1000, 0).decode(errors="replace").split()
        if _is_held(file, holder):
            known = len(holder) == 2
            who = f"process {holder[1]} on {holder[0]}" if known else "some other process"
            raise InputError(
                f"run={str(folder)!r} is being written by {who}: wait for its end or stop it "
                f"(or remove {path} if it is dead)"
            )
        links = os.fstat(file).st_nlink
        require(links < 2, f"{path} is not the lock of a run: move it away")
        require(links, f"{path} was removed by a process that ended just now: start again")
        os.ftruncate(file, 0)
        os.pwrite(file, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still held: no other process can be writing into it
    finally:
        os.close(file)


def _is_held(file: int, holder: list[str]) -> bool:
    """Take the lock, and return whether some other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # this file system has no locks
        return len(holder) == 2 and not (holder[0] == socket.gethostname() and _is_dead(holder[1]))
    return False


def _is_dead(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):
        pass
    return False
