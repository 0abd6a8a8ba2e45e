"""Files that are whole or not there: atomic writes, and folders sealed with their checksums."""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside its place, then moved there.

    Raises OSError naming the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def seal(folder: Path) -> None:
    """Write a folder's manifest: the size and the SHA-256 of each file in it. Raises OSError."""
    for name in (names := sorted(_files(folder))):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())  # what the manifest vouches for survives a loss of power
    content = {name: _digest(folder / name) for name in names}
    write(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest; fault says whether it is true."""
    return (folder / MANIFEST).is_file()


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the first file that is not as it was; None if sound."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(content, dict):
            return f"{MANIFEST} is damaged"
        names = _files(folder)
        for name, digest in content.items():
            if name not in names:
                return f"{name} is missing"
            if digest != _digest(folder / name):
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except NotADirectoryError:
        return "it is not a folder"
    except ValueError:
        return f"{MANIFEST} is damaged"
    except OSError as error:
        return f"it cannot be read: {error}"
    if surplus := names - content.keys():
        return f"{min(surplus)} does not belong to it"
    return None


def _files(folder: Path) -> set[str]:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return files - {MANIFEST}


def _digest(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
