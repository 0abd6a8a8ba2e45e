"""Export a model and a tableau as one file, which samples with JAX and without this library.

Such a file is a program: its author decides what runs when it is called. FILE.sha256 beside it
holds its SHA-256, which reveals damage but does not prove who wrote the file.
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
from diffusion_jax.diffusion.guidance import Guidance, Model, network_denoiser
from diffusion_jax.files import write_atomically
from diffusion_jax.networks.precisions import computing_in, products_in
from diffusion_jax.samplers import Tableau
from diffusion_jax.sampling.draw import keys_and_noise
from diffusion_jax.tableau import to_float32
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
    """Return the function (seed, context) -> images, with the weights and the tableau inside.

    seed: uint32; context: (b, n_cfeat) float32 for any b; images: (b, height, width, channel),
    float32, nominally in [-1, 1]. sampling.sample draws the same from equal seeds and contexts.
    guidance: whether the function takes a third argument, the scale of guidance, float32.
    platforms: the platforms that the function runs on, in JAX's names: cpu, cuda, rocm, tpu.
    Raise InputError if the dtype is unknown.
    """
    network, variables = computing_in(model.network, dtype).for_sampling(model.variables)
    numbers, noise_scale = to_float32(tableau), np.float32(tableau.noise_scale)

    @products_in(dtype)
    def draw(
        seed: UInt32[Array, ""], context: Context, scale: Float[Array, ""] | None = None
    ) -> Images:
        ids = jnp.arange(context.shape[0], dtype=jnp.uint32)
        keys, noise = keys_and_noise(seed, ids, network.image_shape)
        guide = None if scale is None else Guidance(scale)
        apply = partial(network.apply, variables)
        denoise = network_denoiser(apply, model.prediction, model.schedule.steps, context, guide)
        return samplers.solve(denoise, numbers, noise_scale * noise, keys)[0]

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    context = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {model.n_cfeat}"), jnp.float32)
    scale = [jax.ShapeDtypeStruct((), jnp.float32)] if guidance else []
    return export.export(jax.jit(draw), platforms=platforms)(seed, context, *scale)


def check_new(path: str | Path) -> Path:
    """Return the path. Raise InputError if the file exists, or if its folder does not exist."""
    path = Path(path)
    for file in (path, digest_file(path)):
        require(not file.exists(), f"to={str(path)!r}: {file} exists: name a new file")
    folder = path.parent
    require(folder.is_dir(), f"to={str(path)!r}: there is no folder {str(folder)!r}")
    return path


def digest_file(path: str | Path) -> Path:
    """Return the file beside a sampler that holds its SHA-256, in the format of sha256sum."""
    return Path(f"{path}.sha256")


def write_sampler(path: str | Path, sampler: export.Exported) -> str:
    """Write an exported function and its digest, and return the digest.

    Each file is written whole or not at all. Raise InputError as check_new does.
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
    """Read what write_sampler wrote. No code in it runs until the caller calls it.

    digest: the SHA-256 that its sender states; by default the one in FILE.sha256.
    Raise InputError if the digest differs, if the file is damaged, or if it calls external code
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
