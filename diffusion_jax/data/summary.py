"""What a data set holds, in words."""

import numpy as np

from diffusion_jax.data.dataset import Dataset

CLASSES = 16  # the most that are shown


def class_counts(dataset: Dataset) -> dict[str, int]:
    """Return the number of images of each class; nothing if contexts are not classes."""
    labels = dataset.labels
    if not (np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(1) == 1)):
        return {}
    counts = labels.sum(0, dtype=np.float64).astype(int).tolist()
    return dict(zip(dataset.class_names, counts, strict=True))


def describe(dataset: Dataset) -> str:
    """Return a line such as "40 images of 16x16, RGB; 2 classes: cat 30, dog 10"."""
    count, height, width, channels = dataset.images.shape
    what = f"{count:,} images of {height}x{width}, {'grey' if channels == 1 else 'RGB'}"
    if not dataset.labels.any():
        return f"{what}; no classes"
    counts, names = class_counts(dataset), dataset.class_names
    if not counts:
        return f"{what}; contexts of {len(names)} numbers"
    words = [f"{name} {number:,}" for name, number in counts.items()][:CLASSES]
    more = ", ..." if len(names) > CLASSES else ""
    return f"{what}; {len(names)} classes: {', '.join(words)}{more}"
