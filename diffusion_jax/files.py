"""Files that are read only where they are files, and written whole or not at all."""

import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.typing import InputError

FilePath = str | os.PathLike[str]
LARGEST = 2**20  # bytes of a JSON file
PARTIAL = ".partial"  # the end of the names of files that are being written


def open_file(path: FilePath) -> io.BufferedReader:
    """Open a file to read. Opening a pipe, or reading a device, would not end.

    Raises InputError if it is a pipe, a device or a folder; OSError if the system refuses it.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(number).st_mode):
        return os.fdopen(number, "rb")
    os.close(number)
    raise InputError(f"{path} is not a file")


def read_json(path: FilePath, most: int = LARGEST) -> Any:
    """Return what a JSON file holds.

    Raises InputError if it is not JSON, or larger than most bytes; errors of open_file.
    """
    with open_file(path) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise InputError(f"{path} is too large: it must have at most {most} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def write_atomically(path: FilePath, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, as open_atomically does."""
    with open_atomically(path) as file:
        file.write(data)


@contextmanager
def open_atomically(path: FilePath) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when the body ends well, in a folder that is made if missing.

    It replaces what stands there, even a link. Nobody can have put a link in the way of the new
    file, which has an unpredictable name until it is complete. Raises OSError naming the file.
    """
    path = Path(path)
    partial = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            message = error.strerror or os.strerror(error.errno or errno.EIO)
            raise OSError(error.errno or errno.EIO, message, str(path)) from error
        raise


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing into a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            path.unlink()


def save_npy(path: FilePath, array: ArrayLike) -> None:
    """Write an array as a .npy file, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=False)
    write_atomically(path, buffer.getbuffer())
