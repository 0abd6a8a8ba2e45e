"""Data of the library datasets of Hugging Face."""

from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.dataset import Dataset, Source, check, hold_out
from diffusion_jax.data.frames import Channels, Fit, frame, read_picture, stack
from diffusion_jax.data.labels import context_vectors
from diffusion_jax.typing import InputError, import_extra, require


def hf(
    name: str = "",
    split: str = "train",
    image: str = "image",
    label: str | None = "label",
    subset: str | None = None,
    size: tuple[int, ...] = (0,),
    fit: Fit = "stretch",
    background: str = "white",
    channels: Channels = 3,
    held_out: float = 0.0,
) -> Source:
    """Read a Hugging Face data set by its name, or from a folder. Needs the extra hf.

    image, label: names of columns; label=none if there is none. subset: a configuration of the data
    set. The other options are those of folder.
    """
    require(name, "data=hf: give name=OWNER/NAME, or a folder")
    shape = frame(size, fit, background, channels)
    library, where = import_extra("datasets", "hf"), f"data=hf:name={name}:split={split}"
    try:
        found = _open(library, name, subset, split)
        for column in filter(None, (image, label)):
            known = f"choose from {', '.join(found.column_names)} with image=NAME:label=NAME"
            require(column in found.column_names, f"{where} has no column {column}: {known}")
        fits = isinstance(found.features[image], library.Image)
        require(fits, f"{where}: there are no images in column {image}: give image=NAME")
        require(len(found), f"{where}: there are no images in it")
        encoded = found.cast_column(image, library.Image(decode=False))[image]
        paths = (Path(name, each["path"] or f"image {at}") for at, each in enumerate(encoded))
        pairs = zip(paths, encoded, strict=True)
        images = stack((path, read_picture(path, shape, each["bytes"])) for path, each in pairs)
        stored = np.array(found[label][:]) if label else None
    except InputError:
        raise
    except Exception as error:  # of the network, of names, of damaged files
        words = " ".join(str(error).split())[:300]
        raise InputError(f"{where} cannot be read: {words}") from None
    names = getattr(found.features[label], "names", None) if label else None
    vectors = context_vectors(stored, f"{where}: {label}", len(images), names or ())
    return hold_out(check(Dataset(images, *vectors), where), held_out)


def _open(library: Any, name: str, subset: str | None, split: str) -> Any:
    """Return the split of a data set from a folder of save_to_disk, or by its name."""
    if any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
        stored = library.load_from_disk(name)
        if isinstance(stored, library.DatasetDict):
            require(
                split in stored, f"{name} has no split {split}: choose from {', '.join(stored)}"
            )
            return stored[split]
        return stored
    return library.load_dataset(name, subset, split=split)
