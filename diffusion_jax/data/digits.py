"""The handwritten digits that scikit-learn brings: 1797 grey images of 8x8."""

import numpy as np

from diffusion_jax.data.dataset import Dataset, Source, check, hold_out
from diffusion_jax.data.frames import Fit, frame
from diffusion_jax.typing import import_extra


def digits(size: tuple[int, ...] = (0,), fit: Fit = "stretch", held_out: float = 0.0) -> Source:
    """Read scikit-learn's 1797 handwritten digits, 8x8 and grey. Needs the extra digits.

    size, fit: as in frames.frame, on black. held_out: as for npy.
    """
    shape = frame(size, fit, "black")
    stored = import_extra("sklearn.datasets", "digits").load_digits()
    images = np.rint(stored.images * (255 / 16)).astype(np.uint8)
    labels = np.eye(10, dtype=np.float32)[stored.target]
    return hold_out(check(Dataset(images, labels, tuple("0123456789")), "digits"), held_out, shape)
