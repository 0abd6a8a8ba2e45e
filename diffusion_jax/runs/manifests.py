"""Folders that are sealed with the checksums of their files."""

import hashlib
import json
import os
from pathlib import Path

from diffusion_jax.files import open_file, read_json, write_atomically
from diffusion_jax.typing import InputError

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write a folder's manifest: the size and SHA-256 of each file in it. Raise OSError."""
    content = {name: _digest(folder / name, sync=True) for name in sorted(_files(folder))}
    write_atomically(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has a manifest, without reading it."""
    return os.path.lexists(folder / MANIFEST)


def fault(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder, or None if it is sound.

    Raise InputError if the system refuses to read it, because it may be sound.
    """
    try:
        return _compare(folder)
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


def _compare(folder: Path) -> str | None:
    content, names = read_json(folder / MANIFEST), _files(folder)
    if not isinstance(content, dict):
        return f"{MANIFEST} is damaged"
    for name, digest in content.items():
        if name not in names:
            return f"{name} is missing"
        if digest != _digest(folder / name):
            return f"{name} is damaged"
    surplus = names - content.keys()
    return f"{min(surplus)} does not belong to it" if surplus else None


def _files(folder: Path) -> set[str]:
    """Return the paths of all files in a folder. Raise OSError if a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    return {
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
    } - {MANIFEST}


def _digest(path: Path, sync: bool = False) -> list[int | str]:
    """Return a file's size and SHA-256; sync: first let it survive a loss of power."""
    with open_file(path) as file:
        if sync:
            os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
