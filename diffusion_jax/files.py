"""Safe file access: only regular files are read, and files are written completely or not at all."""

import codecs
import errno
import io
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.typing import InputError, require

FilePath = str | os.PathLike[str]
MAX_JSON_BYTES = 2**20  # bytes
HEAD = 512  # the number of first bytes that show the kind of a file
UNKNOWN = "of an unknown kind"
ADVICE = {  # what to do about some kinds of files, in every context
    "an HTML page": "it is what a server sent in place of the file: download the file itself",
    "a Git LFS pointer": "fetch the file itself with git lfs pull",
}
MAGIC = {
    b"\x93NUMPY": "a .npy array",
    b"PK": "a ZIP archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a WebP image, or a RIFF file of some other kind",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"\x80": "a pickle, which is never run",
    b"version https://git-lfs": "a Git LFS pointer",
}
PARTIAL = ".partial"  # the suffix of files that are being written


def open_file(path: FilePath) -> io.BufferedReader:
    """Open a regular file for reading. Refuse pipes and devices, which might never end.

    Raise InputError if the path is a pipe, a device or a folder, and OSError if the system cannot
    open it.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(number).st_mode):
        return os.fdopen(number, "rb")
    os.close(number)
    raise InputError(f"{path} is not a file")


def read_json(path: FilePath, most: int = MAX_JSON_BYTES) -> Any:
    """Return the contents of a JSON file.

    Raise InputError if it is not JSON or is larger than `most` bytes, and the errors of open_file.
    """
    with open_file(path) as file:
        text = file.read(most + 1)
    require(len(text) <= most, f"{path} is too large: it must have at most {most} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def write_atomically(path: FilePath, data: bytes | memoryview) -> None:
    """Write a file completely or not at all, as open_atomically does."""
    with open_atomically(path) as file:
        file.write(data)


@contextmanager
def open_atomically(path: FilePath) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name only if the with block succeeds.

    Make its folder if it is missing, and replace an existing file or link of that name. The file
    has an unpredictable name until it is complete, so that nobody can put a link in its way. An
    OSError names the final path.
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


def append(path: FilePath, text: str) -> None:
    """Append text to a file, but never through a link.

    Raise OSError naming the file; its last line may then be cut short.
    """
    try:
        with open(path, "a", opener=_open_no_link) as file:
            file.write(text)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def remove_partial(folder: Path) -> None:
    """Remove the half-written files and folders that killed processes left in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()


def save_npy(path: FilePath, array: ArrayLike) -> None:
    """Write an array as a .npy file, atomically."""
    buffer = io.BytesIO()  # np.save to a file does not report why it failed
    np.save(buffer, np.asarray(array), allow_pickle=False)
    write_atomically(path, buffer.getbuffer())


def load_npy(path: str) -> np.ndarray:
    """Read the array of a .npy file into memory. Raise InputError naming the file."""
    require(os.path.lexists(path), f"{path}: there is no such file")
    require(os.path.isfile(path), f"{path} is not a .npy file of numbers: it is not a file")
    reason = ""
    try:
        with open_file(path) as file, warnings.catch_warnings(action="ignore"):  # about Python 2
            if file.peek().startswith(b"\x93NUMPY"):
                return np.lib.format.read_array(file, allow_pickle=False)
            reason = explain(file.read(HEAD), "give one array, as np.save writes it")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged header can raise anything
        reason = str(error)
        if "allow_pickle" in reason:
            reason = "it holds Python objects: make one array of numbers of them, and save that"
    raise InputError(f"{path} is not a .npy file of numbers: {reason}")


def sniff(data: bytes) -> str:
    """Return the kind of a file from its first bytes, such as "an HTML page"."""
    for magic, kind in MAGIC.items():
        if data.startswith(magic):
            return kind
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:HEAD]).strip("\ufeff\n\r\t ")
    except UnicodeDecodeError:
        return UNKNOWN
    if text.lower().startswith(("<!doctype html", "<html")):
        return "an HTML page"
    if any(ord(c) < 32 for c in text if c not in "\n\r\t"):
        return UNKNOWN
    return "a text file" if text else "empty"


def explain(data: bytes, need: str) -> str:
    """Return a phrase that names the kind of a file, from its first bytes, and what to do about it.

    need: the advice for kinds that are not in ADVICE.
    """
    kind = sniff(data)
    return f"it is {kind}: {ADVICE.get(kind, need)}"
