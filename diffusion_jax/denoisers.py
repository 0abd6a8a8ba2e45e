"""From a network to a denoiser, the only thing that a sampler sees, and what may wrap it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.parameterizations import Parameterization
from diffusion_jax.typing import Context, Denoiser, Images, Level, Prediction, require

Apply = Callable[[Images, Float[Array, ""], Any], Images]
Mask = Float[Array, "batch height width 1"]
PERCENTILE = 99.5  # of |x0|, in dynamic thresholding (Imagen's)


class Guidance(NamedTuple):
    """How far the output is moved away from a worse one, and where. Numbers, traced on the device.

    scale: w in output = bad + w (good - bad); 0 is the bad output, 1 the good one, no guidance.
    low, high: guide only where low < sigma / alpha <= high (Kynkaanniemi et al. 2024,
        arXiv:2404.07724); elsewhere the output is the good one.
    rescale: from 0 to 1, how far the standard deviation of the output is brought back to the good
        one's (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16).
    renoise_bad: 0 or 1; 1 takes the noise, not the image, from the bad output. That is CFG++ (Chung
        et al. 2024, arXiv:2406.08070) in ddim with eta 0 and in euler, and sampling refuses other
        samplers. scale is then from 0 to 1.
    """

    scale: Any = 1.0
    low: Any = 0.0
    high: Any = float("inf")
    rescale: Any = 0.0
    renoise_bad: Any = 0.0


def check_guidance(guidance: Guidance) -> Guidance:
    """Return the guidance if its numbers can be. Raises InputError naming the one that cannot."""
    scale, low, high, rescale, renoise_bad = map(float, guidance)
    require(abs(scale) < float("inf"), f"guidance={scale}: it must be finite")
    require(0 <= low < high, f"guidance interval {low},{high}: it must obey 0 <= low < high")
    require(0 <= rescale <= 1, f"guidance rescale={rescale}: it must be in [0, 1]")
    require(renoise_bad in (0, 1), f"renoise_bad={renoise_bad}: it must be 0 or 1")
    require(not renoise_bad or 0 <= scale <= 1, f"guidance={scale}: CFG++ takes it from [0, 1]")
    return guidance


def network_denoiser(
    apply: Apply,
    parameterization: Parameterization,
    timesteps: int,
    context: Context,
    guidance: Guidance | None = None,
    worse: Apply | None = None,
) -> Denoiser:
    """The denoiser of apply(x, t, context), t in [0, 1], for one batch of contexts.

    With guidance the bad output is the one without context, computed in the same call on twice the
    batch (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598, eq. 6), or the output
    of a worse network with context (autoguidance, Karras et al. 2024, arXiv:2406.02507).
    """

    def denoise(x: Images, level: Level) -> Prediction:
        t, inputs = level.t / timesteps, parameterization.network_input(x, level)
        if guidance is None:
            return parameterization.decode(apply(inputs, t, context), x, level)
        if worse is None:
            good, bad = _both(apply, inputs, t, context)
        else:
            good, bad = apply(inputs, t, context), worse(inputs, t, context)
        inside = (level.sigma > guidance.low * level.alpha) & (
            (level.sigma <= guidance.high * level.alpha) | jnp.isinf(guidance.high)
        )
        mixed = bad + jnp.where(inside, guidance.scale, 1.0) * (good - bad)
        mixed = _rescale(mixed, good, jnp.where(inside, guidance.rescale, 0.0))
        x0, eps = parameterization.decode(mixed, x, level)
        noise_of_bad = parameterization.decode(bad, x, level).eps
        return Prediction(x0, jnp.where(inside & (guidance.renoise_bad > 0), noise_of_bad, eps))

    return denoise


def _both(apply: Apply, x: Images, t: Float[Array, ""], context: Context) -> list[Images]:
    """The outputs with and without context."""
    contexts = jnp.concatenate([context, jnp.zeros_like(context)])
    return jnp.split(apply(jnp.concatenate([x, x]), t, contexts), 2)


def _rescale(output: Images, good: Images, part: Float[Array, ""]) -> Images:
    def deviation(images: Images) -> Array:
        return images.std((1, 2, 3), keepdims=True)

    ratio = deviation(good) / jnp.maximum(deviation(output), jnp.finfo(output.dtype).tiny)
    return output * (1 + part * (ratio - 1))


def _clip(x0: Images) -> Images:
    return jnp.clip(x0, -1, 1)


def _dynamic(x0: Images) -> Images:
    """Imagen's (Saharia et al. 2022, arXiv:2205.11487, section 2.3)."""
    bound = jnp.percentile(jnp.abs(x0), PERCENTILE, axis=(1, 2, 3), keepdims=True)
    bound = jnp.maximum(bound, 1)
    return jnp.clip(x0, -bound, bound) / bound


# How a predicted image is kept within [-1, 1].
THRESHOLDS: dict[str, Callable[[Images], Images]] = {
    "none": lambda x0: x0,
    "clip": _clip,
    "dynamic": _dynamic,
}


def changed(denoise: Denoiser, change: Callable[[Images], Images]) -> Denoiser:
    """A denoiser whose predicted image is changed, and its noise with it: alpha x0 + sigma eps."""

    def wrapped(x: Images, level: Level) -> Prediction:
        x0, eps = denoise(x, level)
        new = change(x0)
        return Prediction(new, eps + level.alpha / level.sigma * (x0 - new))

    return wrapped


def known(image: Images, mask: Mask) -> Callable[[Images], Images]:
    """A change of the predicted image: the pixels of image where mask is 1 (inpainting)."""
    return lambda x0: jnp.where(mask == 1, image, x0)
