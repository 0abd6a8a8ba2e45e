"""Samples to measure: they are drawn with real labels, or read from a file."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.evaluation.real import LEAST
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling import sample
from diffusion_jax.typing import InputError, RunWarning, require

OUTSIDE = 0.1  # warn if at least this fraction of the values is outside [-1, 1]

Pixels = UInt8[np.ndarray, "n height width channel"]


def draw_like(
    model: Model,
    tableau: Tableau,
    labels: Float[np.ndarray, "real feature"],
    n: int,
    devices: Sequence[jax.Device],
    *,
    batch_size: int = 500,
    **options: Any,
) -> tuple[Pixels, Float[np.ndarray, "n feature"] | None]:
    """Return n images and their contexts, which are the labels of real images in turn.

    A model that was trained without context gets none. options: arguments of sample.
    Raise InputError if the images are not finite.
    """
    contexts = labels[np.arange(n) % len(labels)] if model.class_names else None
    size = min(batch_size, n)
    with tqdm(total=n, unit="image", desc="sampling") as bar:
        options |= {"batch_size": size, "devices": devices, "progress": bar.update}
        images = sample(model, tableau, n, context=contexts, **options).images
    require(np.all(np.isfinite(images)), "the samples are not finite numbers")
    return to_pixels(images), contexts


def check_samples(images: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    """Raise InputError unless images are (n, *shape), n >= LEAST, uint8 or floats in [-1, 1].

    Floats without a negative value, and uint8 with only 0 and 1, are refused as a different range.
    A RunWarning reports how many floats are outside [-1, 1].
    """
    want = ", ".join(map(str, shape))
    fits = images.ndim == 4 and images.shape[1:] == shape
    require(fits, f"{name}: images of shape {images.shape}: they must be (n, {want})")
    right = "float32 in [-1, 1], or uint8"
    known = images.dtype in (np.uint8, np.float32, np.float64)
    require(known, f"{name}: images of type {images.dtype}: {right}")
    require(len(images) >= LEAST, f"{name}: n={len(images)}: it must be at least {LEAST}")
    finite = np.all(np.isfinite(images))
    require(finite, f"{name}: the images must be finite numbers, some are NaN or infinite")
    low, high = images.min(), images.max()
    if (high == 1) if images.dtype == np.uint8 else low >= 0:
        scale = "[0, 1]" if high <= 1 else "[0, 255]"
        raise InputError(f"{name}: the images look like {scale}: give {right} in 0..255")
    if images.dtype != np.uint8 and (outside := np.mean(np.abs(images) > 1.01)) > OUTSIDE:
        words = f"{outside:.0%} of the values are outside of [-1, 1], and are clipped"
        warnings.warn(f"{name}: {words}", RunWarning, stacklevel=2)


def to_pixels(images: np.ndarray) -> Pixels:
    """Return images as pixels: clipped to [-1, 1] and rounded to 0..255."""
    if images.dtype == np.uint8:
        return images
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
