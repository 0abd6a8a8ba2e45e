"""From a network to a denoiser, the only thing that a sampler sees."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.parameterizations import Parameterization
from diffusion_jax.typing import Context, Denoiser, Images, Level, Prediction

Apply = Callable[[Images, Float[Array, ""], Any], Images]


def guided(apply: Apply, scale: Float[Array, ""]) -> Apply:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    The output is u + scale (c - u), with context (c) and without (u), in one call of apply on
    twice the batch. scale 0 ignores the context, 1 is no guidance, above 1 exaggerates it.
    """

    def apply_both(x: Images, t: Float[Array, ""], context: Context) -> Images:
        both = jnp.concatenate([context, jnp.zeros_like(context)])
        conditional, unconditional = jnp.split(apply(jnp.concatenate([x, x]), t, both), 2)
        return unconditional + scale * (conditional - unconditional)

    return apply_both


def network_denoiser(
    apply: Apply, parameterization: Parameterization, timesteps: int, context: Context | None
) -> Denoiser:
    """The denoiser of apply(x, t, context), t in [0, 1], for one batch of contexts."""

    def denoise(x: Images, level: Level) -> Prediction:
        output = apply(parameterization.network_input(x, level), level.t / timesteps, context)
        return parameterization.decode(output, x, level)

    return denoise
