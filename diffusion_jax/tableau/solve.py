"""The loop that runs any tableau, with any number of rows, in one executable."""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from diffusion_jax.tableau import XI, Tableau
from diffusion_jax.typing import Denoiser, Images, Level

INITIAL = np.uint32(2**32 - 1)  # the "row" whose noise is the initial state


def sample_keys(key: Key[Array, ""], ids: UInt32[Array, "batch"]) -> Key[Array, "batch"]:
    """Return a key for each sample. It depends only on the sample's id, not on its batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


def row_noise(keys: Key[Array, "batch"], row: UInt32[Array, ""], shape: tuple[int, ...]) -> Images:
    """Return standard normal noise of one row for each sample. shape: (height, width, channel)."""
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, row), shape, jnp.float32)
    )(keys)


def solve(
    denoise: Denoiser,
    tableau: Tableau,
    x: Images,
    keys: Key[Array, "batch"],
    *,
    rows: Int[Array, ""] | int | None = None,
    start: Int[Array, ""] | int = 0,
    frames: Int[Array, "F"] | None = None,
) -> tuple[Images, Float[Array, "F batch height width channel"] | None]:
    """Run rows start .. rows - 1 of a tableau on a batch of states.

    rows and start may be traced, so that one compilation serves every number of rows that fits the
    table. Noise is drawn only in rows that use it.
    Return the last state and, if frames (ascending row numbers) are given, the states after those
    rows. Apart from frames, memory does not depend on the number of rows.
    """

    def combine(weights: Array, held: tuple[Array, ...]) -> Images:
        return reduce(add, (weight * part for weight, part in zip(weights, held, strict=True)))

    def run_row(row: Array, carry: tuple) -> tuple:
        (x, *registers), kept = carry
        mix = tableau.mix[row]
        level = Level(tableau.t[row], tableau.alpha[row], tableau.sigma[row])
        noise = lax.cond(
            jnp.any(mix[:, XI] != 0),
            lambda: row_noise(keys, row.astype(jnp.uint32), x.shape[1:]),
            lambda: jnp.zeros_like(x),
        )
        held = (x, *denoise(x, level), noise, *registers)
        state = tuple(combine(weights, held) for weights in mix)
        return state, keep(kept, row, state[0])

    def keep(kept: Array | None, row: Array, x: Images) -> Array | None:
        if kept is None or frames is None:
            return None
        slot = jnp.where(frames == row, size=1, fill_value=len(frames))[0][0]
        return kept.at[slot].set(x, mode="drop")

    tableau = jax.tree.map(jnp.asarray, tableau)
    registers = [jnp.zeros_like(x)] * (tableau.mix.shape[1] - 1)
    kept = None if frames is None else jnp.zeros((len(frames), *x.shape), x.dtype)
    end = len(tableau.t) if rows is None else rows
    (x, *_), kept = lax.fori_loop(start, end, run_row, ((x, *registers), kept))
    return x, kept
