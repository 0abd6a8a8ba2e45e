"""Folders sealed with their checksums."""

import hashlib
import json
import os
from pathlib import Path

from diffusion_jax.files import open_file, read_json, write_atomically
from diffusion_jax.typing import InputError

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write a folder's manifest: the size and the SHA-256 of each file in it. Raises OSError."""
    for name in (names := sorted(_files(folder))):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())  # what the manifest vouches for survives a loss of power
    content = {name: _digest(folder / name) for name in names}
    write_atomically(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest; fault says whether it is true."""
    return os.path.lexists(folder / MANIFEST)


def fault(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder, or None if it is sound.

    Raises InputError if the system does not let it be read: it may be sound.
    """
    try:
        content = read_json(folder / MANIFEST)
        if not isinstance(content, dict):
            return f"{MANIFEST} is damaged"
        names = _files(folder)
        for name, digest in content.items():
            if name not in names:
                return f"{name} is missing"
            if digest != _digest(folder / name):
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished, or is being written"
    except NotADirectoryError:
        return "it is not a folder"
    except InputError as error:
        return f"{MANIFEST} is damaged: {error}"
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read: {error.filename}: {error.strerror}. Nothing was changed: "
            f"make it readable, or move it away"
        ) from None
    if surplus := names - content.keys():
        return f"{min(surplus)} does not belong to it"
    return None


def _files(folder: Path) -> set[str]:
    """The names of all that is not a folder. Raises OSError where a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    return {
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
    } - {MANIFEST}


def _digest(path: Path) -> list[int | str]:
    with open_file(path) as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
