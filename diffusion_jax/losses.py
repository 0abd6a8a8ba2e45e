"""Noising and the training loss."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.typing import Images, Level

# x_t of a clean image and a noise. "ddpm" is Ho et al. 2020 (arXiv:2006.11239), eq. 4; the course
# notes scale the noise by 1 - alpha_bar where its square root is due.
NOISINGS: dict[str, Callable[[Images, Images, Level], Images]] = {
    "ddpm": lambda x0, eps, level: level.alpha * x0 + level.sigma * eps,
    "notes": lambda x0, eps, level: level.alpha * x0 + level.sigma**2 * eps,
}


def mean_squared_error(output: Images, target: Images) -> Float[Array, ""]:
    """DDPM's simple loss (arXiv:2006.11239, eq. 14): the mean over batch, pixels and channels."""
    return jnp.mean((output - target) ** 2)
