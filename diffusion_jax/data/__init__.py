"""Data sets: drawn sprites, the course's .npy files, image folders; and the batches of a step."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.files import default_class_names, image_folder, npy_pair
from diffusion_jax.data.files import load_npy as load_npy
from diffusion_jax.data.sprites import CLASS_NAMES, sprites
from diffusion_jax.typing import InputError

__all__ = [
    "CLASS_NAMES",
    "DATASETS",
    "Dataset",
    "default_class_names",
    "load",
    "load_held_out",
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

    Raises InputError for options that belong to another kind of data.
    """
    return split(everything(config), config.held_out)[0] if config.held_out else everything(config)


def load_held_out(config: Any) -> Dataset:
    """The images at config.images that training does not see. Raises InputError as load does."""
    return split(everything(config), config.held_out)[1]


def split(dataset: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
    """A data set without some of its images, chosen at random but always alike, and those images.

    Raises InputError if either would be empty.
    """
    total = len(dataset.images)
    count = round(held_out * total)
    if not 0 < count < total:
        raise InputError(
            f"held_out={held_out}: that is {count} of {total} images: neither 0 nor all"
        )
    order = np.random.default_rng(0).permutation(total)

    def part(chosen: np.ndarray) -> Dataset:
        chosen = np.sort(chosen)
        return dataset._replace(images=dataset.images[chosen], labels=dataset.labels[chosen])

    return part(order[count:]), part(order[:count])


def everything(config: Any) -> Dataset:
    """All images of a DataConfig. Raises InputError as load does."""
    kind = "sprites"
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
    if config.null_context:
        dataset = dataset._replace(labels=np.zeros_like(dataset.labels))
    return dataset
