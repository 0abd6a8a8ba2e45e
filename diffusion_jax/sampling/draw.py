"""Sampling: run any tableau on a model, on all devices, in batches, with one compilation."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from diffusion_jax import parallel, samplers
from diffusion_jax.diffusion import guidance as guiding
from diffusion_jax.diffusion.guidance import Guidance, Mask, Model
from diffusion_jax.diffusion.predictions import Parameterization
from diffusion_jax.networks import Network
from diffusion_jax.networks.precisions import computing_in, products_in
from diffusion_jax.samplers import Tableau
from diffusion_jax.tableau import for_cfg_pp, pad, to_float32
from diffusion_jax.tableau.solve import INITIAL
from diffusion_jax.typing import Context, Images, Scalar, Variables, check_seed, require

ROWS = 8192  # tableaus are padded to a multiple of this: 1000 steps of any sampler fit
REGISTERS = 3  # and to this many registers: no sampler in SAMPLERS uses more
PIXELS = 1024 * 16 * 16  # height * width of the images drawn at once, by default


class Samples(NamedTuple):
    """Images (n, height, width, channel), nominally in [-1, 1], and states on the way to them."""

    images: Float[np.ndarray, "n height width channel"]
    frames: Float[np.ndarray, "F n height width channel"] | None

    def take(self, at: np.ndarray | slice) -> "Samples":
        """Return the samples at these indices."""
        return Samples(self.images[at], None if self.frames is None else self.frames[:, at])


class Start(NamedTuple):
    """The state before the first row: signal * images + noise * xi, with standard normal xi."""

    images: Float[np.ndarray, "n height width channel"]
    signal: float = 1.0
    noise: float = 0.0


def sample(
    model: Model,
    tableau: Tableau,
    n: int,
    *,
    context: Float[np.ndarray, "n feature"] | None = None,
    guidance: Guidance | Scalar | None = None,
    guide_model: Model | None = None,
    threshold: str = "none",
    start: Start | None = None,
    mask: Float[np.ndarray, "n height width 1"] | None = None,
    seed: Scalar = 0,
    frames: Sequence[int] | None = None,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    rows: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int], object] | None = None,
    keep: Callable[[Samples], Samples] | None = None,
) -> Samples:
    """Draw n images. Image i depends only on (model, tableau, seed, i, context[i]).

    context: a vector for each image; None stands for zeros, which means no context.
    guidance: classifier-free guidance, or its scale as a number; it costs a second pass.
    guide_model: a model to guide away from, instead of the same model without context.
    threshold: a spec from guidance.THRESHOLDS, which keeps predicted images within [-1, 1].
    start: the state to start from; None is noise with the standard deviation of the first level.
    mask: 1 where a pixel of start.images is known; it then replaces the predicted pixel.
    frames: the rows whose states are kept, as frame_rows returns them; None keeps none.
    batch_size: the images drawn at once on all devices; by default they have at most PIXELS pixels.
    rows: the number of rows to run, by default all; 0 only compiles.
    progress: called after each batch with its number of images.
    keep: maps each batch, in order, to the part to return, so that memory need not grow with n.
    dtype: a name in precisions.PRECISIONS: the network computes in it, all else in float32.
    Raise InputError, before anything is compiled, if an argument does not fit the model.
    """
    seed = check_seed(seed)
    require(n >= 1, f"n={n}: it must be at least 1")
    context = np.asarray(np.zeros((n, model.n_cfeat)) if context is None else context, np.float32)
    guide = _check_guidance(model, guidance, guide_model)
    tableau = for_cfg_pp(tableau) if guide and guide.renoise_bad else tableau
    _check_arrays(model, n, context, start, mask)
    devices = tuple(devices or parallel.first_devices(jax.device_count()))
    if start is None:
        zeros = np.broadcast_to(np.float32(0), (n, *model.network.image_shape))
        start = Start(zeros, 0.0, tableau.noise_scale)
    models = (model,) if guide_model is None else (model, guide_model)
    networks = tuple(computing_in(each.network, dtype) for each in models)
    run = _compiled(networks, model.prediction, model.schedule.steps, threshold, devices, dtype)
    numbers = _numbers(tableau, start, tableau.rows if rows is None else rows, frames)
    shared = (tuple(each.variables for each in models), *numbers, np.uint32(seed), guide)
    each = (np.arange(n, dtype=np.uint32), context, start.images, mask)
    size, parts = images_at_once(n, model, batch_size), []
    for batch in _in_batches(run, shared, each, size, devices):
        parts.append(batch if keep is None else keep(batch))
        if progress is not None:
            progress(len(batch.images))
    images, kept = zip(*parts, strict=True)
    states = None if kept[0] is None else np.concatenate(kept, axis=1)
    return Samples(np.concatenate(images), states)


def _numbers(tableau: Tableau, start: Start, rows: int, frames: Sequence[int] | None) -> tuple:
    """Return the tableau and the other arguments of the loop, in the types of the program."""
    registers = max(REGISTERS, tableau.registers)
    return (
        to_float32(pad(tableau, tableau.rows + -tableau.rows % ROWS, registers)),
        np.array([start.signal, start.noise], np.float32),
        np.int32(rows),
        None if frames is None else np.asarray(frames, np.int32),
    )


def images_at_once(n: int, model: Model, batch_size: int | None = None) -> int:
    """Return batch_size if it is given; else share n evenly among as few batches as possible.

    By default a batch has at most PIXELS pixels. Raise InputError if batch_size is below 1.
    """
    if batch_size is not None:
        require(batch_size >= 1, f"batch_size={batch_size}: it must be at least 1")
        return min(n, batch_size)
    height, width, _ = model.network.image_shape
    most = max(1, PIXELS // (height * width))
    return math.ceil(n / math.ceil(n / most))


def _in_batches(
    run: Any, shared: tuple, each: tuple, batch_size: int, devices: Sequence[jax.Device]
) -> Iterator[Samples]:
    """Run a program on all images in batches. each: arrays with one element per image."""
    n, count = len(each[0]), len(devices)
    batch_size += -batch_size % count
    shared = parallel.replicate(shared, devices)
    for first in range(0, n, batch_size):
        at = np.minimum(np.arange(first, first + batch_size), n - 1)  # padded; cut below
        batch = jax.tree.map(itemgetter(at), each)
        parts = parallel.scatter(parallel.split(batch, count), devices)
        images, frames = parallel.gather(run(*shared, *parts))
        images = parallel.merge(images)
        *_, known_images, mask = batch
        if mask is not None:
            images = np.where(mask == 1, known_images, images)
        if frames is not None:  # (device, F, images of the device, ...)
            frames = np.concatenate([*frames], axis=1)
        yield Samples(images, frames).take(slice(n - first))


@lru_cache
def _compiled(
    networks: tuple[Network, ...],
    prediction: Parameterization,
    timesteps: int,
    threshold: str,
    devices: tuple[jax.Device, ...],
    dtype: str,
) -> Any:
    """Return the program that runs all tableaus on a network, and on a guide model if given."""
    change = guiding.threshold(threshold)

    @products_in(dtype)
    def on_one_device(
        variables: tuple[Variables, ...],
        tableau: Tableau,
        scales: Float[Array, "2"],
        rows: Int[Array, ""],
        frames: Int[Array, "F"] | None,
        seed: UInt32[Array, ""],
        guidance: Guidance | None,
        ids: UInt32[Array, "batch"],
        context: Context,
        images: Images,
        mask: Mask | None,
    ) -> tuple[Images, Any]:
        keys, noise = keys_and_noise(seed, ids, images.shape[1:])
        x = scales[0] * images + scales[1] * noise
        applies = []
        for network, weights in zip(networks, variables, strict=True):
            folded, weights = network.for_sampling(weights)  # once, before the loop
            applies.append(partial(folded.apply, weights))
        apply, *guide = applies
        denoise = guiding.network_denoiser(apply, prediction, timesteps, context, guidance, *guide)
        if threshold != "none":
            denoise = guiding.changed(denoise, change)
        if mask is not None:
            denoise = guiding.changed(denoise, guiding.known(images, mask))
        return samplers.solve(denoise, tableau, x, keys, rows=rows, frames=frames)

    in_axes = (*(None,) * 7, *(0,) * 4)
    return parallel.data_parallel(on_one_device, in_axes, (0, 0), devices=devices)


def initial_noise(
    model: Model, n: int, seed: Scalar = 0
) -> Float[np.ndarray, "n height width channel"]:
    """Return the standard normal noise with which sample starts images 0 .. n - 1.

    sample multiplies it by the tableau's noise_scale. Raise InputError if the seed is invalid.
    """
    ids = jnp.arange(n, dtype=jnp.uint32)
    return np.asarray(keys_and_noise(check_seed(seed), ids, model.network.image_shape)[1])


def keys_and_noise(
    seed: UInt32[Array, ""] | int, ids: UInt32[Array, "batch"], shape: tuple[int, ...]
) -> tuple[Key[Array, "batch"], Images]:
    """Return each image's key, which determines all its noise, and its initial noise."""
    keys = samplers.sample_keys(jax.random.key(seed), ids)
    return keys, samplers.row_noise(keys, jnp.asarray(INITIAL), shape)


def _check_arrays(
    model: Model, n: int, context: np.ndarray, start: Start | None, mask: np.ndarray | None
) -> None:
    """Raise InputError if an array has an invalid shape or value."""
    size, shape = (n, model.n_cfeat), (n, *model.network.image_shape)
    fits = context.shape == size and np.all(np.isfinite(context))
    require(fits, f"context of shape {context.shape}: it must be {size}, finite numbers")
    if start is not None:
        fits = start.images.shape == shape and np.all(np.isfinite(start.images))
        require(fits, f"start images of shape {start.images.shape}: they must be {shape}, finite")
    if mask is not None:
        require(start is not None, "a mask without start images: there is nothing to know")
        fits = mask.shape == (*shape[:3], 1) and np.all((mask == 0) | (mask == 1))
        require(fits, f"mask of shape {mask.shape}: it must be {(*shape[:3], 1)}, of 0 and 1")


def _check_guidance(
    model: Model, guidance: Guidance | Scalar | None, guide_model: Model | None
) -> Guidance | None:
    """Return the guidance in the types of the program.

    Raise InputError if it is invalid, or if it does not fit the model.
    """
    if guidance is None:
        require(guide_model is None, "a guide_model without guidance: give a scale")
        return None
    guide = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    guiding.check_guidance(guide)
    if guide_model is not None:
        for name in ("image_shape", "n_cfeat"):
            ours, theirs = getattr(model.network, name), getattr(guide_model.network, name)
            require(ours == theirs, f"the guide model has {name}={theirs}: it must be {ours}")
        same = model.prediction == guide_model.prediction and all(
            map(np.array_equal, model.schedule[:2], guide_model.schedule[:2])
        )
        require(same, "the guide model was trained with a different schedule or prediction")
    return Guidance(*map(np.float32, guide))


def frame_rows(tableau: Tableau, timesteps: int, rule: str = "course") -> list[int]:
    """Return the rows after which a denoising animation shows the state.

    rule: "all" shows every step. "course" is the course's choice: every step if there are at most
    50; otherwise those where t % 20 == 0, t == T or t < 8. Raise InputError if it is unknown.
    """
    rows = np.flatnonzero(tableau.ends_step)
    require(rule in ("all", "course"), f"frames={rule!r} is unknown: choose from all, course")
    t = tableau.t[rows]
    chosen = (t % 20 == 0) | (t == timesteps) | (t < 8) | (len(rows) <= 50) | (rule == "all")
    return rows[chosen].tolist()
