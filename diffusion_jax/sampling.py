"""Sampling: any tableau on a model, on all devices, in batches, with one compilation."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from diffusion_jax import samplers
from diffusion_jax.denoisers import (
    THRESHOLDS,
    Apply,
    Guidance,
    Mask,
    changed,
    check_guidance,
    known,
    network_denoiser,
)
from diffusion_jax.networks import Network
from diffusion_jax.parallel import (
    data_parallel,
    first_devices,
    gather,
    merge,
    replicate,
    scatter,
    split,
)
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import Model
from diffusion_jax.samplers import Tableau
from diffusion_jax.samplers.solve import INITIAL
from diffusion_jax.samplers.tableau import is_ddim, pad, to_float32
from diffusion_jax.typing import (
    Context,
    Images,
    InputError,
    Scalar,
    Variables,
    check_seed,
    choose,
    require,
)

ROWS = 8192  # tables are padded to a multiple of so many rows: 1000 steps of any sampler
PIXELS = 1024 * 16 * 16  # height * width of the images drawn at once, by default
REGISTERS = 3  # and to so many registers: the most that a sampler in SAMPLERS uses


class Samples(NamedTuple):
    """Images (n, height, width, channel), nominally in [-1, 1], and their states on the way."""

    images: Float[np.ndarray, "n height width channel"]
    frames: Float[np.ndarray, "F n height width channel"] | None

    def take(self, at: np.ndarray) -> "Samples":
        """The samples with the numbers in at."""
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
    worse: Model | None = None,
    threshold: str = "none",
    start: Start | None = None,
    mask: Float[np.ndarray, "n height width 1"] | None = None,
    seed: Scalar = 0,
    frames: Sequence[int] | None = None,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    rows: int | None = None,
    how: str | None = None,
    dtype: str = "float32",
    progress: Callable[[int], object] | None = None,
    keep: Callable[[Samples], Samples] | None = None,
) -> Samples:
    """Draw n images. Image i is a function of (model, tableau, seed, i, context[i]) alone.

    context: a vector for each image; None is a vector of zeros, no context.
    guidance: classifier-free guidance, or only its scale; it costs a second pass.
    worse: a model to guide away from, instead of from the same one without context.
    threshold: how predicted images are kept within [-1, 1], from denoisers.THRESHOLDS.
    start: where to start; None is noise, of the standard deviation of the first level.
    mask: 1 where the pixels of start.images are known, and predictions are replaced by them.
    frames: numbers of rows whose states are kept, such as frame_rows gives; None keeps none.
    batch_size: how many images at once, on all devices; by default batches of at most PIXELS.
    rows: run only so many rows; 0 does no more than compile.
    progress: called after each batch with its number of images.
    keep: maps each batch, in order, to what is returned of it; by default all of it. It can write
        a batch to a file and keep little, so that memory does not grow with n.
    dtype: what the network computes in, a name in precisions.PRECISIONS; all else is in float32.
    Raises InputError for what does not fit the model, before anything is compiled.
    """
    context = _check_context(model, n, context)
    if guidance is not None and not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    seed = check_seed(seed)
    _check(model, n, guidance, worse, threshold, start, mask)
    require(
        guidance is None or not guidance.renoise_bad or is_ddim(tableau),
        "CFG++ with this sampler: it is defined for ddim with eta=0 and for euler",
    )
    devices = list(devices or first_devices(jax.device_count()))
    if start is None:
        images = np.broadcast_to(np.float32(0), (n, *model.network.image_shape))
        start = Start(images, 0.0, tableau.noise_scale)
    models = (model,) if worse is None else (model, worse)
    run = _compiled(
        tuple(computing_in(each.network, dtype) for each in models),
        model.config.diffusion.parameterization,
        model.schedule.steps,
        threshold,
        tuple(devices),
        how,
        dtype,
    )
    shared = (
        tuple(each.variables for each in models),
        to_float32(pad(tableau, tableau.rows + -tableau.rows % ROWS, REGISTERS)),
        np.array([start.signal, start.noise], np.float32),
        np.int32(tableau.rows if rows is None else rows),
        None if frames is None else np.asarray(frames, np.int32),
        np.uint32(seed),
        None if guidance is None else Guidance(*map(np.float32, guidance)),
    )
    each = (np.arange(n, dtype=np.uint32), context, start.images, mask)
    size, parts = images_at_once(n, model, batch_size), []
    for batch in _in_batches(run, shared, each, size, devices):
        parts.append(batch if keep is None else keep(batch))
        if progress is not None:
            progress(len(batch.images))
    images = np.concatenate([part.images for part in parts])
    if frames is None:
        return Samples(images, None)
    return Samples(images, np.concatenate([part.frames for part in parts], axis=1))


def images_at_once(n: int, model: Model, batch_size: int | None = None) -> int:
    """The images of a batch: as given, or n shared evenly among the fewest batches of PIXELS.

    Raises InputError for a batch_size below 1.
    """
    if batch_size is not None:
        require(batch_size >= 1, f"batch_size={batch_size}: it must be at least 1")
        return min(n, batch_size)
    height, width, _ = model.config.network.image_shape
    most = max(1, PIXELS // (height * width))
    return math.ceil(n / math.ceil(n / most))


def _in_batches(
    run: Any,
    shared: tuple,
    each: tuple,
    batch_size: int,
    devices: Sequence[jax.Device],
) -> Iterator[Samples]:
    """Run a program on all images, batch by batch; each: arrays with one element an image."""
    n = len(each[0])
    batch_size += -batch_size % len(devices)
    shared = replicate(shared, devices)
    for first in range(0, n, batch_size):
        at = np.minimum(np.arange(first, first + batch_size), n - 1)  # filled up, and cut below
        batch = jax.tree.map(itemgetter(at), each)
        images, kept = gather(run(*shared, *scatter(split(batch, len(devices)), devices)))
        images, count = merge(images), min(batch_size, n - first)
        *_, known_images, mask = batch
        if mask is not None:
            images = np.where(mask == 1, known_images, images)
        yield Samples(images[:count], None if kept is None else _merge_frames(kept)[:, :count])


@lru_cache
def _compiled(
    networks: tuple[Network, ...],
    parameterization: str,
    timesteps: int,
    threshold: str,
    devices: tuple[jax.Device, ...],
    how: str | None,
    dtype: str,
) -> Any:
    """The program of a network, and perhaps of a worse one, for all tables."""
    decode = PARAMETERIZATIONS[parameterization]

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
        apply, *worse = map(_apply, networks, variables)
        denoise = network_denoiser(apply, decode, timesteps, context, guidance, *worse)
        if threshold != "none":
            denoise = changed(denoise, THRESHOLDS[threshold])
        if mask is not None:
            denoise = changed(denoise, known(images, mask))
        return samplers.solve(denoise, tableau, x, keys, rows=rows, frames=frames)

    in_axes = (None, None, None, None, None, None, None, 0, 0, 0, 0)
    return data_parallel(on_one_device, in_axes, (0, 0), devices=devices, how=how)


def _apply(network: Network, variables: Variables) -> Apply:
    """Bind a network to its weights, in its form for sampling: once, before the loop."""
    ready, variables = network.for_sampling(variables)
    return partial(ready.apply, variables)


def initial_noise(
    model: Model, n: int, seed: Scalar = 0
) -> Float[np.ndarray, "n height width channel"]:
    """The standard normal noise from which sample starts image 0 .. n - 1 with a seed.

    sample multiplies it by the tableau's noise_scale. Raises InputError for an invalid seed.
    """
    ids = jnp.arange(n, dtype=jnp.uint32)
    return np.asarray(keys_and_noise(check_seed(seed), ids, model.network.image_shape)[1])


def keys_and_noise(
    seed: UInt32[Array, ""] | int, ids: UInt32[Array, "batch"], shape: tuple[int, ...]
) -> tuple[Key[Array, "batch"], Images]:
    """The key of each image, from which all its noise comes, and the noise that it starts from."""
    keys = samplers.sample_keys(jax.random.key(seed), ids)
    return keys, samplers.row_noise(keys, jnp.asarray(INITIAL), shape)


def _check(
    model: Model,
    n: int,
    guidance: Guidance | None,
    worse: Model | None,
    threshold: str,
    start: Start | None,
    mask: np.ndarray | None,
) -> None:
    """Raise InputError for what sample cannot do with a model."""
    choose(THRESHOLDS, "threshold", threshold)
    if guidance is not None:
        check_guidance(guidance)
    require(worse is None or guidance is not None, "a worse model without guidance: give a scale")
    if worse is not None:
        check_alike(model, worse)
    shape = (n, *model.network.image_shape)
    if start is not None:
        fits = start.images.shape == shape and np.all(np.isfinite(start.images))
        require(fits, f"start images of shape {start.images.shape}: they must be {shape}, finite")
    if mask is not None:
        require(start is not None, "a mask without start images: there is nothing to know")
        fits = mask.shape == (*shape[:3], 1) and np.all((mask == 0) | (mask == 1))
        require(fits, f"mask of shape {mask.shape}: it must be {(*shape[:3], 1)}, of 0 and 1")


def check_alike(model: Model, other: Model) -> None:
    """Raise InputError unless two models denoise the same images on the same forward process."""
    for name in ("image_shape", "n_cfeat"):
        ours, theirs = getattr(model.network, name), getattr(other.network, name)
        require(ours == theirs, f"the other model has {name}={theirs}: it must be {ours}")
    ours, theirs = model.config.diffusion, other.config.diffusion
    require(ours == theirs, f"the other model was trained on {theirs}: it must be {ours}")


def _merge_frames(kept: np.ndarray) -> np.ndarray:
    """(device, F, part, ...) -> (F, batch, ...)."""
    return np.stack([merge(frame) for frame in np.moveaxis(kept, 1, 0)])


def _check_context(model: Model, n: int, context: np.ndarray | None) -> np.ndarray:
    if n < 1:
        raise InputError(f"n={n}: it must be at least 1")
    shape = (n, model.config.network.n_cfeat)
    if context is None:
        return np.zeros(shape, np.float32)
    context = np.asarray(context, np.float32)
    if context.shape != shape or not np.all(np.isfinite(context)):
        raise InputError(f"context of shape {context.shape}: it must be {shape}, finite numbers")
    return context


def frame_rows(tableau: Tableau, timesteps: int, rule: str = "notes") -> list[int]:
    """The rows after which a denoising animation shows the state.

    rule: "all", after every step; "notes", the course's choice: after every step of up to 50;
    of more, where t % 20 == 0, t == T or t < 8.
    """
    rows = np.flatnonzero(tableau.ends_step)
    if rule == "all":
        return rows.tolist()
    if rule != "notes":
        raise InputError(f"frames={rule!r} is unknown: choose from none, notes, all")
    t = tableau.t[rows]
    chosen = (t % 20 == 0) | (t == timesteps) | (t < 8) | (len(rows) <= 50)
    return rows[chosen].tolist()
