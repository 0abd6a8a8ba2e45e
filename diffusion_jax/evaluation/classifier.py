"""A small classifier of a data set. Its second-to-last layer gives the features of images."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from diffusion_jax import data
from diffusion_jax.data import Dataset
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.files import open_file, write_atomically
from diffusion_jax.networks.layers import Conv, Dense, GroupNorm, gelu, max_pool
from diffusion_jax.parallel import AXIS, data_parallel, replicate

FEATURES, CHANNELS = 64, (32, 64)
STEPS, BATCH, RATE, SEED = 500, 128, 3e-3, 0


class Classifier(nn.Module):
    """Two convolutions with pooling, a layer of features, and a layer of classes."""

    image_shape: tuple[int, int, int]
    classes: int
    channels: tuple[int, int] = CHANNELS

    def setup(self) -> None:
        """Make the layers."""
        first, second = self.channels
        self.conv1 = Conv(first)
        self.norm1 = GroupNorm()
        self.conv2 = Conv(second)
        self.norm2 = GroupNorm()
        self.hidden = Dense(FEATURES)
        self.out = Dense(self.classes)

    def layers(self, pixels: Array) -> tuple[Float[Array, "batch _"], Float[Array, "batch _"]]:
        """Return the output of the convolutions, and the input of the last layer."""
        x = pixels.astype(jnp.float32) / 127.5 - 1
        x = max_pool(gelu(self.norm1(self.conv1(x))))
        x = max_pool(gelu(self.norm2(self.conv2(x))))
        maps = x.reshape(len(x), -1)
        return maps, gelu(self.hidden(maps))

    def features(self, pixels: UInt8[Array, "batch h w c"]) -> Float[Array, "batch feature"]:
        """Return the input of the last layer."""
        return self.layers(pixels)[1]

    def __call__(self, pixels: UInt8[Array, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Return the logits of the classes."""
        return self.out(self.features(pixels))


def network(dataset: Dataset) -> Classifier:
    """Return the classifier of a data set."""
    return Classifier(dataset.images.shape[1:], dataset.labels.shape[1])


def init(net: Classifier, seed: int = SEED) -> Any:
    """Return random weights."""
    pixels = jnp.zeros((1, *net.image_shape), jnp.uint8)
    return jax.jit(net.init)(jax.random.key(seed), pixels)["params"]


def has_classes(dataset: Dataset) -> bool:
    """Return whether every label is exactly one of several classes, as a classifier needs."""
    labels = dataset.labels
    one_hot = np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(1) == 1)
    return bool(one_hot and np.count_nonzero(labels.any(0)) > 1)


def fingerprint(dataset: Dataset) -> str:
    """Return a hash of a data set and of the recipe by which its classifier is trained."""
    recipe = (FEATURES, CHANNELS, STEPS, BATCH, RATE, SEED, dataset.images.shape)
    parts = (recipe, dataset.class_names, data.fingerprint(dataset))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load(path: Path, dataset: Dataset) -> Any | None:
    """Return the stored weights, or None if there are none for this data set and recipe."""
    try:
        with open_file(path) as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["fingerprint"]) != fingerprint(dataset):
                return None
            params = unflatten_dict({k: file[k] for k in file if k != "fingerprint"}, sep="/")
        shapes = jax.eval_shape(lambda: init(network(dataset)))
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, params)
        return params if jax.tree.all(same) else None
    except Exception:  # a damaged archive can raise anything
        return None


def save(path: Path, dataset: Dataset, params: Any) -> None:
    """Store the weights with the fingerprint of their data and recipe."""
    leaves = {k: np.asarray(v) for k, v in flatten_dict(params, sep="/").items()}
    arrays: dict[str, Any] = {"fingerprint": np.array(fingerprint(dataset)), **leaves}
    np.savez(buffer := io.BytesIO(), **arrays)
    write_atomically(path, buffer.getbuffer())


def obtain(
    path: Path, dataset: Dataset, devices: Sequence[jax.Device], report: Callable[[str], object]
) -> Any | None:
    """Return the stored weights, or train and store them; return None for data without classes.

    report: called with messages about the progress.
    """
    if not has_classes(dataset):
        report("the data have no classes: features of a network with random weights instead")
        return None
    params = load(path, dataset)
    if params is None:
        other = " (the stored one is damaged, or of different data)" if path.exists() else ""
        begin = time.perf_counter()
        params = train(dataset, devices)
        save(path, dataset, params)
        report(f"classifier trained in {time.perf_counter() - begin:.1f} s{other}: {path}")
    return params


def recognise(
    params: Any, dataset: Dataset, devices: Sequence[jax.Device]
) -> Bool[np.ndarray, " n"]:
    """Return which images of a data set a classifier assigns to their class."""
    run = apply(network(dataset), "__call__", tuple(devices))
    logits = map_rows(run, params, np.asarray(dataset.images), devices)
    return logits.argmax(1) == dataset.labels.argmax(1)


def train(
    dataset: Dataset,
    devices: Sequence[jax.Device],
    net: Classifier | None = None,
    seed: int = SEED,
) -> Any:
    """Return the weights of a classifier, trained on data with classes.

    net: by default that of `network`.
    """
    count = max(n for n in range(1, len(devices) + 1) if BATCH % n == 0)
    net, devices = net or network(dataset), tuple(devices[:count])
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss_of(params: Any, images: Array, classes: Array) -> Array:
        logits = net.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

    def steps(params: Any, images: Array, classes: Array, order: Array) -> Any:
        def step(state: tuple, chosen: Array) -> tuple:
            params, opt_state = state
            gradient = jax.grad(loss_of)(params, images[chosen], classes[chosen])
            updates, opt_state = optimizer.update(lax.pmean(gradient, AXIS), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return lax.scan(step, (params, optimizer.init(params)), order)[0][0]

    shape = (STEPS, count, BATCH // count)
    classes = dataset.labels.argmax(1).astype(np.int32)
    order = np.random.default_rng(seed).integers(0, len(classes), shape, np.int32)
    run = data_parallel(steps, (None, None, None, 0), None, devices=devices)
    inputs = replicate((init(net, seed), np.asarray(dataset.images), classes), devices)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        return jax.tree.map(np.asarray, run(*inputs, order.swapaxes(0, 1)))


@lru_cache
def apply(net: Classifier, method: str, devices: tuple[jax.Device, ...]) -> Any:
    """Return the compiled function (params, pixels) -> features or logits, for map_rows."""
    run = partial(net.apply, method=method)
    return data_parallel(
        lambda params, x: run({"params": params}, x), (None, 0), 0, devices=devices
    )
