"""Data from a .npz file, in which arrays have names."""

import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from diffusion_jax.data.dataset import Dataset, Source, check, hold_out
from diffusion_jax.data.frames import Fit, frame
from diffusion_jax.data.labels import context_vectors
from diffusion_jax.files import HEAD, explain, open_file
from diffusion_jax.typing import InputError, require

BOMB = 2**26, 200  # bytes of an array that are suspicious, if it is that much larger than the file
NEED = "give arrays, as np.savez writes them; for a single array, give npy:images=FILE.npy"


def npz(
    path: Path | None = None,
    images: str = "images",
    labels: str | None = "labels",
    class_names: tuple[str, ...] = (),
    size: tuple[int, ...] = (0,),
    fit: Fit = "stretch",
    background: str = "white",
    held_out: float = 0.0,
) -> Source:
    """Read the arrays `images` and `labels` of a .npz file.

    labels: none if there are none. The other options are those of npy.
    """
    require(path, "data=npz: give path=FILE.npz")
    shape = frame(size, fit, background)
    pixels, *rest = load_npz(str(path), [name for name in (images, labels) if name])
    count, stored = len(pixels) if pixels.ndim else 0, rest[0] if rest else None
    found = context_vectors(stored, f"{path}: {labels}", count, class_names)
    return hold_out(check(Dataset(pixels, *found), f"{path}: {images}"), held_out, shape)


def load_npz(path: str, names: Sequence[str]) -> list[ndarray]:
    """Read arrays of a .npz file into memory. Raise InputError naming the file and the fault."""
    try:
        with open_file(path) as file, warnings.catch_warnings(action="ignore"):
            head = file.peek()[:HEAD]
            require(head[:2] == b"PK", f"{path} is not a .npz file: {explain(head, NEED)}")
            with zipfile.ZipFile(file) as archive:
                return [_array(archive, name, path) for name in names]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"{path} is not a .npz file of numbers: {error}") from None


def _array(archive: zipfile.ZipFile, name: str, path: str) -> ndarray:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    held = ", ".join(list(members)[:20])
    words = f"choose from {held} with images=NAME:labels=NAME, or labels=none"
    require(name in members, f"{path} holds no array {name}: {words}")
    size, whole = members[name].file_size, os.stat(path).st_size
    fits = size <= max(BOMB[0], BOMB[1] * whole)
    require(fits, f"{path} has {whole} bytes, but {name} claims {size}: save it as a .npy file")
    with archive.open(members[name]) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
