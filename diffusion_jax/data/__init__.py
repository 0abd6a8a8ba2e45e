"""Data sets: drawn sprites, the course's .npy files, image folders; and the batches of a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.dataset import Dataset
from diffusion_jax.data.files import default_class_names, image_folder, npy_pair
from diffusion_jax.data.sprites import CLASS_NAMES, sprites

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
    """The data set of a DataConfig: the drawn sprites, or what lies at config.images."""
    if not config.images:
        dataset = DATASETS["sprites"](config)
    else:
        dataset = DATASETS["folder" if Path(config.images).is_dir() else "npy"](config)
    if config.null_context:
        dataset = dataset._replace(labels=np.zeros_like(dataset.labels))
    return dataset
