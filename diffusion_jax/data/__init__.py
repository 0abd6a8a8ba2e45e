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

__all__ = ["CLASS_NAMES", "DATASETS", "Dataset", "default_class_names", "load", "sprites"]


def _sprites(config: Any) -> Dataset:
    images, labels = sprites(config.n_images, config.data_seed, config.class_frequencies)
    return Dataset(images, labels, CLASS_NAMES)


DATASETS: dict[str, Callable[[Any], Dataset]] = {
    "sprites": _sprites,
    "npy": lambda config: npy_pair(config.images, config.labels, config.class_names),
    "folder": lambda config: image_folder(config.images, config.image_size),
}


def load(config: Any) -> Dataset:
    """The data set of a DataConfig: the drawn sprites, or what lies at config.images.

    Raises InputError for options that belong to another kind of data.
    """
    kind = "sprites"
    if config.images:
        kind = "folder" if os.path.isdir(config.images) else "npy"
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
