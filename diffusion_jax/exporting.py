"""A model and a tableau as one file, which samples wherever there is JAX, without this library."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, UInt32

from diffusion_jax import samplers
from diffusion_jax.denoisers import Guidance, network_denoiser
from diffusion_jax.files import write_atomically
from diffusion_jax.networks import fold_batch_norm
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import Model
from diffusion_jax.samplers import Tableau
from diffusion_jax.samplers.tableau import to_float32
from diffusion_jax.sampling import keys_and_noise
from diffusion_jax.typing import Context, Images, InputError

PLATFORMS = ("cpu", "cuda")


def export_sampler(
    model: Model,
    tableau: Tableau,
    *,
    guidance: bool = False,
    dtype: str = "float32",
    platforms: Sequence[str] = PLATFORMS,
) -> export.Exported:
    """The function (seed, context) -> images, with the weights and the tableau inside.

    seed: uint32; context: (b, n_cfeat) float32 for any b; images: (b, height, width, channel),
    float32, nominally in [-1, 1], those that sampling.sample draws from the same seed and context.
    guidance: whether a third argument is the scale of guidance, float32.
    platforms: what the function will run on, in JAX's names: cpu, cuda, rocm, tpu.
    Raises InputError for an unknown dtype.
    """
    network, variables = fold_batch_norm(computing_in(model.network, dtype), model.variables)
    decode = PARAMETERIZATIONS[model.config.diffusion.parameterization]
    table, noise_scale = to_float32(tableau), np.float32(tableau.noise_scale)

    @products_in(dtype)
    def draw(
        seed: UInt32[Array, ""], context: Context, scale: Float[Array, ""] | None = None
    ) -> Images:
        ids = jnp.arange(context.shape[0], dtype=jnp.uint32)
        keys, noise = keys_and_noise(seed, ids, network.image_shape)
        guide = None if scale is None else Guidance(scale)
        apply = partial(network.apply, variables)
        denoise = network_denoiser(apply, decode, model.schedule.steps, context, guide)
        return samplers.solve(denoise, table, noise_scale * noise, keys)[0]

    number = jax.ShapeDtypeStruct((), jnp.float32)
    batch = export.symbolic_shape(f"b, {model.config.network.n_cfeat}")
    arguments = [
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct(batch, jnp.float32),
        *([number] if guidance else []),
    ]
    return export.export(jax.jit(draw), platforms=platforms)(*arguments)


def check_new(path: str | Path) -> Path:
    """The path. Raises InputError where something stands there, or its folder does not exist."""
    path = Path(path)
    if path.exists():
        raise InputError(f"to={str(path)!r} exists: name a new file")
    if not path.parent.is_dir():
        raise InputError(f"to={str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def write_sampler(path: str | Path, sampler: export.Exported) -> None:
    """Write an exported function into a new file, whole or not at all. InputError as check_new."""
    try:
        write_atomically(check_new(path), bytes(sampler.serialize()))
    except OSError as error:
        raise InputError(f"to={str(path)!r}: {error.strerror}") from error
