"""Denoisers, the functions that samplers call: made from networks, guided and thresholded."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax import spec
from diffusion_jax.diffusion.predictions import Parameterization
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.typing import (
    Context,
    Denoiser,
    Images,
    InputError,
    Level,
    Prediction,
    Variables,
    require,
)

Apply = Callable[[Images, Float[Array, ""], Any], Images]
Mask = Float[Array, "batch height width 1"]


class Model(NamedTuple):
    """A network, its weights, its prediction type, and the noise schedule of its training.

    class_names: the names of the entries of a context vector.
    """

    network: Any
    variables: Variables
    schedule: NoiseSchedule
    prediction: Parameterization
    class_names: tuple[str, ...] = ()

    @property
    def n_cfeat(self) -> int:
        """The length of a context vector."""
        return self.network.n_cfeat


class Guidance(NamedTuple):
    """How far, and at which levels, the output is moved away from that of a weaker network.

    The fields are numbers, and are traced on the device.
    scale: w in output = bad + w (good - bad). 0 gives the bad output. 1 gives the good output, as
    without guidance.
    low, high: guidance applies where low < sigma / alpha <= high (Kynkaanniemi et al. 2024,
    arXiv:2404.07724). Elsewhere the output is the good one.
    rescale: how far the standard deviation of the output is moved back to that of the good output,
    from 0 to 1 (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16).
    renoise_bad: 0 or 1. With 1, the noise is taken from the bad output, and only the image is
    guided. With a table from for_cfg_pp, this is CFG++ (Chung et al. 2024, arXiv:2406.08070). The
    scale must then be from 0 to 1.
    """

    scale: Any = 1.0
    low: Any = 0.0
    high: Any = float("inf")
    rescale: Any = 0.0
    renoise_bad: Any = 0.0


class Guide(NamedTuple):
    """A guidance, and the run folder and step of the weaker model, if the guidance needs one."""

    guidance: Guidance
    run: str = ""
    step: int | None = None


def cfg(
    scale: float = 2.0, low: float = 0.0, high: float = math.inf, rescale: float = 0.0
) -> Guide:
    """Classifier-free guidance, away from the output without context: arXiv:2207.12598.

    See Ho and Salimans 2022. scale: 1 turns guidance off.
    low, high: guide only where low < sigma / alpha <= high.
    rescale: how far the contrast is moved back to that without guidance, from 0 to 1.
    """
    return Guide(check_guidance(Guidance(scale, low, high, rescale)))


def cfg_pp(scale: float = 0.6, low: float = 0.0, high: float = math.inf) -> Guide:
    """CFG++, which guides the image but not the noise: arXiv:2406.08070.

    The noise is that of the output without context. scale: from 0 to 1. It needs a sampler whose
    steps end in a predicted image and noise: ddim, euler, lms, dpmpp and the multistep methods.
    """
    return Guide(check_guidance(Guidance(scale, low, high, renoise_bad=1.0)))


def auto(
    run: str = "",
    scale: float = 2.0,
    low: float = 0.0,
    high: float = math.inf,
    rescale: float = 0.0,
    step: int | None = None,
) -> Guide:
    """Autoguidance, away from the output of a weaker model: Karras et al. 2024, arXiv:2406.02507.

    run, step: the folder and the checkpoint of the weaker model.
    """
    require(run, "guidance=auto: give the weaker model, run=FOLDER")
    return Guide(check_guidance(Guidance(scale, low, high, rescale)), run, step)


GUIDANCES: dict[str, Callable[..., Guide]] = {"cfg": cfg, "cfg_pp": cfg_pp, "auto": auto}


def guide(text: str) -> Guide:
    """Return the guidance that a spec describes. A plain number is the scale of cfg.

    Raise InputError as spec.parse does.
    """
    try:
        return cfg(float(text))
    except InputError:
        raise
    except ValueError:
        return spec.build(text, GUIDANCES, "guidance")


def check_guidance(guidance: Guidance) -> Guidance:
    """Return the guidance. If a number is invalid, raise an InputError that names it."""
    scale, low, high, rescale, renoise_bad = map(float, guidance)
    require(abs(scale) < math.inf, f"guidance: scale={scale}: it must be finite")
    require(0 <= low < high, f"guidance: low={low}, high={high}: they must obey 0 <= low < high")
    require(0 <= rescale <= 1, f"guidance: rescale={rescale}: it must be in [0, 1]")
    require(renoise_bad in (0, 1), f"guidance: renoise_bad={renoise_bad}: it must be 0 or 1")
    in_range = not renoise_bad or 0 <= scale <= 1
    require(in_range, f"guidance: scale={scale}: for CFG++ it must be in [0, 1]")
    return guidance


def network_denoiser(
    apply: Apply,
    parameterization: Parameterization,
    timesteps: int,
    context: Context,
    guidance: Guidance | None = None,
    guide_model: Apply | None = None,
) -> Denoiser:
    """Return the denoiser of a network apply(x, t, context) for a batch of contexts.

    t is in [0, 1]. With guidance there are two outputs, a good one with context and a bad one. By
    default the bad one is the network's output without context, computed in the same call on a
    batch of twice the size (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598, eq.
    6). If `guide_model` is given, the bad one is the output of that network with context
    (autoguidance, Karras et al. 2024, arXiv:2406.02507).
    """

    def denoise(x: Images, level: Level) -> Prediction:
        t, inputs = level.t / timesteps, parameterization.network_input(x, level)
        if guidance is None:
            return parameterization.decode(apply(inputs, t, context), x, level)
        if guide_model is None:
            contexts = jnp.concatenate([context, jnp.zeros_like(context)])
            good, bad = jnp.split(apply(jnp.concatenate([inputs, inputs]), t, contexts), 2)
        else:
            good, bad = apply(inputs, t, context), guide_model(inputs, t, context)
        inside = (level.sigma > guidance.low * level.alpha) & (
            (level.sigma <= guidance.high * level.alpha) | jnp.isinf(guidance.high)
        )
        mixed = bad + jnp.where(inside, guidance.scale, 1.0) * (good - bad)
        mixed = _rescale(mixed, good, jnp.where(inside, guidance.rescale, 0.0))
        x0, eps = parameterization.decode(mixed, x, level)
        noise_of_bad = parameterization.decode(bad, x, level).eps
        return Prediction(x0, jnp.where(inside & (guidance.renoise_bad > 0), noise_of_bad, eps))

    return denoise


def _rescale(output: Images, good: Images, part: Float[Array, ""]) -> Images:
    def deviation(images: Images) -> Array:
        return images.std((1, 2, 3), keepdims=True)

    ratio = deviation(good) / jnp.maximum(deviation(output), jnp.finfo(output.dtype).tiny)
    return output * (1 + part * (ratio - 1))


def none(x0: Images) -> Images:
    """Leave predicted images unchanged."""
    return x0


def clip(x0: Images) -> Images:
    """Clip predicted images to [-1, 1]."""
    return jnp.clip(x0, -1, 1)


def dynamic(x0: Images, percentile: float = 99.5) -> Images:
    """Clip predicted images to a percentile of |x0| and divide by it: arXiv:2205.11487, sec. 2.3.

    The percentile is that of each image, and at least 1.
    """
    require(0 < percentile <= 100, f"percentile={percentile}: it must be in (0, 100]")
    bound = jnp.percentile(jnp.abs(x0), percentile, axis=(1, 2, 3), keepdims=True)
    bound = jnp.maximum(bound, 1)
    return jnp.clip(x0, -bound, bound) / bound


THRESHOLDS: dict[str, Callable[..., Images]] = {"none": none, "clip": clip, "dynamic": dynamic}


def threshold(text: str) -> Callable[[Images], Images]:
    """Return the function by which a spec bounds predicted images.

    Raise InputError as spec.parse does.
    """
    return spec.parse(text, THRESHOLDS, "threshold", ("x0",)).bind()


def changed(denoise: Denoiser, change: Callable[[Images], Images]) -> Denoiser:
    """Return a denoiser that changes the predicted image, and adapts the noise.

    The noise changes so that x = alpha x0 + sigma eps still holds.
    """

    def wrapped(x: Images, level: Level) -> Prediction:
        x0, eps = denoise(x, level)
        new = change(x0)
        return Prediction(new, eps + level.alpha / level.sigma * (x0 - new))

    return wrapped


def known(image: Images, mask: Mask) -> Callable[[Images], Images]:
    """Return a change for inpainting: it replaces the prediction by `image` where `mask` is 1."""
    return lambda x0: jnp.where(mask == 1, image, x0)
