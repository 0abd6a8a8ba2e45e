"""Spaces in which images are compared: a classifier's features, random features, pixels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion_jax.data import Dataset
from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.parallel import data_parallel

SIDE = 8  # images are averaged down to at most this size before pixels are compared
COMPONENTS = 64  # principal components of the pixels
FITTED = 5000  # images that determine a space's centre, scale and components

Spaces = dict[str, Callable[[UInt8[np.ndarray, "n h w c"]], Float[np.ndarray, "n feature"]]]


def spaces(teaching: Dataset, params: Any | None, devices: Sequence[jax.Device]) -> Spaces:
    """Return functions of images (n, h, w, c) uint8 to rows (n, feature) float32, by name.

    The main one is first. Over the images of teaching, the features have mean 0 and, on average,
    variance 1. params: a classifier's weights, or None.
    """
    net = classifier.network(teaching)
    images = np.asarray(teaching.images[:FITTED])
    features = classifier.apply(net, "features", tuple(devices))
    pixels = data_parallel(_pixels, (None, 0), 0, devices=devices)
    found = {} if params is None else {"classifier": (features, params)}
    found |= {"random": (features, classifier.init(net))}
    found |= {"pixels": (pixels, principal_components(images))}
    return {name: _fit(*parts, images, devices) for name, parts in found.items()}


def _fit(apply: Any, shared: Any, images: np.ndarray, devices: Sequence[jax.Device]) -> Callable:
    features = partial(map_rows, apply, shared, devices=devices)
    rows = np.asarray(features(images), np.float64)
    centre, scale = rows.mean(0), float(np.sqrt(rows.var(0).mean())) or 1.0
    return lambda images: ((features(np.asarray(images)) - centre) / scale).astype(np.float32)


def principal_components(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "d _"]:
    """Return at most COMPONENTS directions of largest variance of shrunk images."""
    rows = np.asarray(shrink(images.astype(np.float32)), np.float64).reshape(len(images), -1)
    _, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    return vectors[:, ::-1][:, :COMPONENTS].astype(np.float32)


def shrink(images: Any) -> Any:
    """Average images (n, h, w, c) over equal windows, at most SIDE down and SIDE across."""
    n, *sides, channels = images.shape
    down, across = (max(n for n in range(1, SIDE + 1) if side % n == 0) for side in sides)
    windows = (n, down, sides[0] // down, across, sides[1] // across, channels)
    return images.reshape(windows).mean((2, 4))


def _pixels(components: Array, pixels: Array) -> Array:
    rows = shrink(pixels.astype(jnp.float32)).reshape(len(pixels), -1)
    return jnp.matmul(rows, components, precision=jax.lax.Precision.HIGHEST)
