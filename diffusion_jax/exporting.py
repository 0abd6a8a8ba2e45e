"""A model and a tableau as one file, which samples wherever there is JAX, without this library.

Such a file is a program: whoever wrote it decides what runs where it is called. Its SHA-256 stands
beside it, in FILE.sha256, and tells damage; where the file is from, only its sender can tell.
"""

import hashlib
import re
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
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import Model
from diffusion_jax.samplers import Tableau
from diffusion_jax.samplers.tableau import to_float32
from diffusion_jax.sampling import keys_and_noise
from diffusion_jax.typing import Context, Images, InputError, require

PLATFORMS = ("cpu", "cuda")
CALLS = {"shape_assertion"}  # what an exported sampler calls outside StableHLO


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
    network, variables = computing_in(model.network, dtype).for_sampling(model.variables)
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
    for file in (path, digest_file(path)):
        require(not file.exists(), f"to={str(path)!r}: {file} exists: name a new file")
    if not path.parent.is_dir():
        raise InputError(f"to={str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def digest_file(path: str | Path) -> Path:
    """The file beside a sampler that holds its SHA-256, in the format of sha256sum."""
    return Path(f"{path}.sha256")


def write_sampler(path: str | Path, sampler: export.Exported) -> str:
    """Write an exported function and its digest, and return the digest.

    Each file is written whole or not at all. Raises InputError as check_new does.
    """
    path, data = check_new(path), bytes(sampler.serialize())
    digest = hashlib.sha256(data).hexdigest()
    try:
        write_atomically(digest_file(path), f"{digest}  {path.name}\n".encode())
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"to={str(path)!r}: {error.strerror}") from error
    return digest


def read_sampler(path: str | Path, digest: str | None = None) -> export.Exported:
    """Read what write_sampler wrote. Nothing of it runs before it is called.

    digest: its SHA-256 as its sender states it; by default that of FILE.sha256.
    Raises InputError if the digest differs, the file is damaged, or it calls code outside itself
    that no exported sampler calls.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        stated = (digest or digest_file(path).read_text()[:64]).lower()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read with its digest: {error}") from None
    found = hashlib.sha256(data).hexdigest()
    require(found == stated, f"{path}: its SHA-256 is {found}, not {stated}: it was changed")
    try:
        sampler = export.deserialize(bytearray(data))
        program = sampler.mlir_module()
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} is not a sampler that this JAX reads: {reason}") from None
    names = re.findall(r"custom_call\b(?:\s+@([\w.$-]+)\()?", program)
    unknown = sorted({name or "an unnamed target" for name in names} - CALLS)
    require(not unknown, f"{path} calls {', '.join(unknown)}: no exported sampler does")
    return sampler
