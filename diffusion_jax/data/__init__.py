"""Data sets: drawn sprites, files and folders of images; and the batches of a step."""

from collections.abc import Callable, Sequence

from diffusion_jax import spec
from diffusion_jax.data.dataset import (
    Dataset,
    Source,
    changes,
    check_class_names,
    digests,
    fingerprint,
    split,
)
from diffusion_jax.data.digits import digits
from diffusion_jax.data.hugging_face import hf
from diffusion_jax.data.image_folders import folder
from diffusion_jax.data.labels import default_class_names
from diffusion_jax.data.npy_files import npy
from diffusion_jax.data.npz_files import npz
from diffusion_jax.data.sheets import sheet
from diffusion_jax.data.sprites import CLASS_NAMES, drawn, sprites
from diffusion_jax.data.summary import describe
from diffusion_jax.typing import InputError, require


def unknown() -> Source:
    """Use no recorded images, because the weights were trained elsewhere."""
    return Source(None, fresh=drawn(n=1).fresh)


DATA: dict[str, Callable[..., Source]] = {
    "sprites": drawn,
    "folder": folder,
    "sheet": sheet,
    "npy": npy,
    "npz": npz,
    "digits": digits,
    "hf": hf,
    "unknown": unknown,
}


def source(text: str, known: Sequence[str] = ()) -> Source:
    """Return the data that a spec describes, with its fingerprint.

    known: the fingerprint of a run's data. Raise InputError as spec.parse does, and if the data
    are not the run's.
    """
    found = spec.build(text, DATA, "data")
    if found.dataset is None:
        return found
    dataset = found.dataset._replace(fingerprint=fingerprint(found.dataset))
    changed = changes(known, dataset.fingerprint)
    require(not changed, f"data={text}: {changed}: this is not the data of the run any more")
    return found._replace(dataset=dataset)


def load(text: str, known: Sequence[str] = ()) -> Dataset:
    """Return the images of a data spec that training sees. Raise InputError as source does."""
    found = source(text, known)
    if found.dataset is None:
        raise InputError(f"data={text}: these images are not recorded: name others with --data")
    return split(found.dataset, found.held_out)[0] if found.held_out else found.dataset
