"""Spaces in which images are compared: a classifier's features, random features, pixels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion_jax.data import Dataset
from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.parallel import data_parallel

SIDE = 8  # larger images are averaged down to at most this before their pixels are compared
COMPONENTS = 64  # principal components of the pixels
FITTED = 5000  # images that decide a space's centre, scale and components


class Space(NamedTuple):
    """Features (shared, pixels) -> rows, centred and divided by one number.

    In these units the images of `fit` have features of mean 0 and, on average, of variance 1.
    """

    apply: Any
    shared: Any
    centre: Float[np.ndarray, " feature"]
    scale: float

    def rows(
        self, images: UInt8[np.ndarray, "n h w c"], devices: Sequence[jax.Device]
    ) -> Float[np.ndarray, "n feature"]:
        """The features of images, in float32."""
        rows = map_rows(self.apply, self.shared, np.asarray(images), devices)
        return ((rows - self.centre) / self.scale).astype(np.float32)


def spaces(
    teaching: Dataset, params: Any | None, devices: Sequence[jax.Device]
) -> dict[str, Space]:
    """The spaces by name, the one that counts first. params: a classifier's, or None without."""
    net = classifier.network(teaching)
    images = np.asarray(teaching.images[:FITTED])
    features = classifier.apply(net, "features", tuple(devices))
    found = {} if params is None else {"classifier": _fit(features, params, images, devices)}
    found["random"] = _fit(features, classifier.init(net), images, devices)
    pixels = data_parallel(_pixels, (None, 0), 0, devices=devices)
    found["pixels"] = _fit(pixels, principal_components(images), images, devices)
    return found


def first_space(teaching: Dataset, params: Any | None, devices: Sequence[jax.Device]) -> Space:
    """The one of the spaces that counts first."""
    net = classifier.network(teaching)
    features = classifier.apply(net, "features", tuple(devices))
    shared = classifier.init(net) if params is None else params
    return _fit(features, shared, np.asarray(teaching.images[:FITTED]), devices)


def _fit(apply: Any, shared: Any, images: np.ndarray, devices: Sequence[jax.Device]) -> Space:
    rows = np.asarray(map_rows(apply, shared, images, devices), np.float64)
    scale = float(np.sqrt(rows.var(0).mean()))
    return Space(apply, shared, rows.mean(0), scale or 1.0)


def principal_components(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "d _"]:
    """The directions of largest variance of shrunk images, at most COMPONENTS."""
    rows = np.asarray(shrink(images.astype(np.float32)), np.float64).reshape(len(images), -1)
    _, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    return vectors[:, ::-1][:, :COMPONENTS].astype(np.float32)


def shrink(images: Any) -> Any:
    """Average images (n, h, w, c) over equal windows, to at most SIDE windows down and across."""
    n, *sides, channels = images.shape
    down, across = (max(n for n in range(1, SIDE + 1) if side % n == 0) for side in sides)
    windows = (n, down, sides[0] // down, across, sides[1] // across, channels)
    return images.reshape(windows).mean((2, 4))


def _pixels(components: Array, pixels: Array) -> Array:
    rows = shrink(pixels.astype(jnp.float32)).reshape(len(pixels), -1)
    return jnp.matmul(rows, components, precision=jax.lax.Precision.HIGHEST)
