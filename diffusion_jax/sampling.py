"""Sampling: any tableau on a model, on all devices, in batches, with one compilation."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from diffusion_jax import samplers
from diffusion_jax.denoisers import Apply, guided, network_denoiser
from diffusion_jax.networks import fold_batch_norm
from diffusion_jax.parallel import data_parallel, merge, replicate, split
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import Model
from diffusion_jax.samplers import Tableau
from diffusion_jax.samplers.solve import INITIAL
from diffusion_jax.samplers.tableau import pad, to_float32
from diffusion_jax.typing import Context, Images, InputError, Variables

ROWS = 8192  # tables are padded to a multiple of so many rows: 1000 steps of any sampler
REGISTERS = 3  # and to so many registers: the most that a sampler in SAMPLERS uses


class Samples(NamedTuple):
    """Images (n, height, width, channel), nominally in [-1, 1], and their states on the way."""

    images: Float[np.ndarray, "n height width channel"]
    frames: Float[np.ndarray, "F n height width channel"] | None


def sample(
    model: Model,
    tableau: Tableau,
    n: int,
    *,
    context: Float[np.ndarray, "n feature"] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    frames: Sequence[int] | None = None,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    rows: int | None = None,
    how: str = "pmap",
    dtype: str = "float32",
) -> Samples:
    """Draw n images. Image i is a function of (model, tableau, seed, i, context[i]) alone.

    context: a vector for each image; None is a vector of zeros, no context.
    guidance: the scale of classifier-free guidance (denoisers.guided); it costs a second pass.
    frames: numbers of rows whose states are kept, such as frame_rows gives; None keeps none.
    batch_size: how many images at once, on all devices; all by default.
    rows: run only so many rows; 0 does no more than compile.
    dtype: what the network computes in, a name in precisions.PRECISIONS; all else is in float32.
    Raises InputError for a context of the wrong shape or an unknown dtype, before it compiles.
    """
    context = _check_context(model, n, context)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}: it must be in 0..{2**32 - 1}")
    devices = list(devices or jax.local_devices())
    batch_size = batch_size or n
    batch_size += -batch_size % len(devices)
    run = _compiled(
        computing_in(model.network, dtype),
        model.config.diffusion.parameterization,
        model.schedule.steps,
        tuple(devices),
        how,
        dtype,
    )
    table = to_float32(pad(tableau, tableau.rows + -tableau.rows % ROWS, REGISTERS))
    shared = replicate(
        (
            model.variables,
            table,
            np.float32(tableau.noise_scale),
            np.int32(tableau.rows if rows is None else rows),
            None if frames is None else np.asarray(frames, np.int32),
            np.uint32(seed),
            None if guidance is None else np.float32(guidance),
        ),
        devices,
    )
    parts = []
    for first in range(0, n, batch_size):
        ids = np.arange(first, first + batch_size, dtype=np.uint32)
        rows_of = np.minimum(ids, n - 1)  # the last batch is filled up, and cut below
        images, kept = run(*shared, *split((ids, context[rows_of]), len(devices)))
        parts.append((merge(np.asarray(images)), None if kept is None else _merge_frames(kept)))
    images = np.concatenate([images for images, _ in parts])[:n]
    if frames is None:
        return Samples(images, None)
    return Samples(images, np.concatenate([kept for _, kept in parts], axis=1)[:, :n])


@lru_cache
def _compiled(
    network: Any,
    parameterization: str,
    timesteps: int,
    devices: tuple[jax.Device, ...],
    how: str,
    dtype: str,
) -> Any:
    @products_in(dtype)
    def on_one_device(
        variables: Variables,
        tableau: Tableau,
        noise_scale: Float[Array, ""],
        rows: Int[Array, ""],
        frames: Int[Array, "F"] | None,
        seed: UInt32[Array, ""],
        guidance: Float[Array, ""] | None,
        ids: UInt32[Array, "batch"],
        context: Context,
    ) -> tuple[Images, Any]:
        keys = samplers.sample_keys(jax.random.key(seed), ids)
        shape = (network.height, network.height, network.in_channels)
        x = noise_scale * samplers.row_noise(keys, jnp.asarray(INITIAL), shape)
        folded, variables = fold_batch_norm(network, variables)  # once, before the loop
        apply: Apply = partial(folded.apply, variables)
        if guidance is not None:
            apply = guided(apply, guidance)
        decode = PARAMETERIZATIONS[parameterization]
        denoise = network_denoiser(apply, decode, timesteps, context)
        return samplers.solve(denoise, tableau, x, keys, rows=rows, frames=frames)

    in_axes = (None, None, None, None, None, None, None, 0, 0)
    return data_parallel(on_one_device, in_axes, (0, 0), devices=devices, how=how)


def _merge_frames(kept: Array) -> np.ndarray:
    """(device, F, part, ...) -> (F, batch, ...)."""
    return np.stack([merge(frame) for frame in np.moveaxis(np.asarray(kept), 1, 0)])


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
