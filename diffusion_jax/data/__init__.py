"""Data sets: drawn sprites, the course's .npy files, image folders; and the batches of a step."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_jax.data.dataset import UNKNOWN as UNKNOWN
from diffusion_jax.data.dataset import Dataset, changes, digests, fingerprint
from diffusion_jax.data.dataset import check_class_names as check_class_names
from diffusion_jax.data.files import default_class_names, image_folder, npy_pair
from diffusion_jax.data.files import load_npy as load_npy
from diffusion_jax.data.sprites import CLASS_NAMES, sprites
from diffusion_jax.typing import InputError

__all__ = [
    "CLASS_NAMES",
    "DATASETS",
    "Dataset",
    "default_class_names",
    "everything",
    "load",
    "split",
    "sprites",
]


def _sprites(config: Any) -> Dataset:
    images, labels = sprites(config.n_images, config.data_seed, config.class_frequencies)
    return Dataset(images, labels, CLASS_NAMES)


DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "sprites": _sprites,
    "npy": lambda config: npy_pair(config.images, config.labels, config.class_names),
    "folder": lambda config: image_folder(config.images, config.image_size),
}


def load(config: Any) -> Dataset:
    """What a DataConfig trains on: drawn sprites, or what lies at config.images, less held_out.

    Raises InputError for options that belong to another kind of data, and for data that is not
    what config.fingerprint says.
    """
    return split(everything(config), config.held_out)[0] if config.held_out else everything(config)


def split(dataset: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
    """A data set without some of its images, chosen at random but always alike, and those images.

    Equal images stay together. Raises InputError if either would be empty.
    """
    total = len(dataset.images)
    order = np.random.default_rng(0).permutation(total)
    copies, first = digests(dataset.images), dict[bytes, int]()
    rank = np.array([first.setdefault(copies[image], at) for at, image in enumerate(order)])
    order = order[np.argsort(rank, kind="stable")]
    cuts = np.flatnonzero(np.diff(np.sort(rank))) + 1  # numbers of images that part no copies
    count = round(held_out * total)
    if not 0 < count < total or not len(cuts):
        raise InputError(
            f"held_out={held_out}: that is {count} of {total} images: neither 0 nor all, and "
            f"copies stay together: {len(first)} of them differ"
        )
    count = cuts[np.argmin(np.abs(cuts - count))]

    def part(chosen: np.ndarray) -> Dataset:
        chosen = np.sort(chosen)
        return dataset._replace(images=dataset.images[chosen], labels=dataset.labels[chosen])

    return part(order[count:]), part(order[:count])


def everything(config: Any) -> Dataset:
    """All images of a DataConfig. Raises InputError as load does."""
    kind = "sprites"
    if config.fingerprint == UNKNOWN and not config.images:
        raise InputError("images: these weights were trained elsewhere, on images not recorded")
    if config.images:
        kind = "folder" if os.path.isdir(config.images) else "npy"
    if kind == "sprites" and config.held_out:
        raise InputError(
            f"held_out={config.held_out}: it is for --images; drawn sprites are measured against "
            "others anyway"
        )
    if kind == "folder" and config.labels:
        raise InputError(f"labels={config.labels}: the labels are the subfolders of a folder")
    if kind != "folder" and config.image_size:
        raise InputError(f"image_size={config.image_size}: only a folder of images can be scaled")
    dataset = DATASETS[kind](config)
    if config.class_names and config.class_names != dataset.class_names:
        raise InputError(
            f"class_names={','.join(config.class_names)}: the classes are already called "
            f"{', '.join(dataset.class_names)}; names can be given for a .npy file"
        )
    dataset = dataset._replace(fingerprint=fingerprint(dataset))
    if changed := changes(config.fingerprint, dataset.fingerprint):
        raise InputError(
            f"images={config.images!r}: {changed}: this is not the data of the run any more"
        )
    if config.null_context:
        dataset = dataset._replace(labels=np.zeros_like(dataset.labels))
    return dataset
