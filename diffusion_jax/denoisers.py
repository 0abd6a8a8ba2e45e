"""From a network to a denoiser, the only thing that a sampler sees."""

from collections.abc import Callable

from jaxtyping import Array, Float

from diffusion_jax.parameterizations import Parameterization
from diffusion_jax.typing import Context, Denoiser, Images, Level, Prediction

Apply = Callable[[Images, Float[Array, ""], Context | None], Images]


def network_denoiser(
    apply: Apply, parameterization: Parameterization, timesteps: int, context: Context | None
) -> Denoiser:
    """The denoiser of apply(x, t, context), t in [0, 1], for one batch of contexts."""

    def denoise(x: Images, level: Level) -> Prediction:
        return parameterization.decode(apply(x, level.t / timesteps, context), x, level)

    return denoise
