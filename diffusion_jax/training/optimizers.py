"""Optimizers, and how their learning rate changes over a run."""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeAlias

import numpy as np
import optax
from jaxtyping import Float64, Int
from numpy import ndarray

from diffusion_jax import spec
from diffusion_jax.typing import require

ROUNDING = 1e-5  # of a step; whole epochs that end in a step's midst are further from its start


class Length(NamedTuple):
    """The length of a run: epochs over n_images images, with batch_size images in a step.

    epochs may be a fraction.
    """

    n_images: int
    batch_size: int
    epochs: float

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.end_of_epoch(self.epochs)

    def end_of_epoch(self, epoch: float) -> int:
        """Return the number of steps that complete this many epochs."""
        return math.ceil(epoch * self.n_images / self.batch_size - ROUNDING)


class Optimizer(NamedTuple):
    """How gradients change the weights. The learning rate is separate, and computed on the host.

    transformation: the update for a learning rate of 1.
    rate: the learning rate of each step, in float64; steps count from 0. A compiled step takes the
    rate as an argument, so that one program serves every learning rate, decay and length of a run.
    """

    transformation: optax.GradientTransformation
    rate: Callable[[Int[ndarray, "steps"]], Float64[ndarray, "steps"]]


Decay: TypeAlias = Callable[[ndarray, Length], ndarray]  # factors of the learning rate, by step


def course(step: ndarray, length: Length) -> ndarray:
    """Linear decay to 0 that changes once an epoch, as in the course."""
    return 1 - step * length.batch_size // length.n_images / length.epochs


def constant(step: ndarray, length: Length) -> ndarray:
    """No decay."""
    return np.ones(len(step))


def linear(step: ndarray, length: Length) -> ndarray:
    """Linear decay to 0 that changes in every step."""
    return 1 - step / length.steps


def cosine(step: ndarray, length: Length) -> ndarray:
    """Decay to 0 along half a cosine."""
    return 0.5 * (1 + np.cos(step / length.steps * np.pi))


DECAYS: dict[str, Decay] = {
    "course": course,
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


def adam(
    length: Length,
    learning_rate: float = 1e-3,
    decay: Annotated[Decay, DECAYS] = course,
    warmup: int = 0,
    clip: float = 0.0,
) -> Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with the defaults of PyTorch.

    learning_rate: its value at the start. decay: how it falls. warmup: the number of steps over
    which it rises from 0. clip: the largest norm of the gradient; 0 means no clipping.
    """
    least = 1e-12  # smaller numbers change nothing in float32
    require(
        least <= learning_rate < 1e6,
        f"learning_rate={learning_rate}: it must be above 0, and at least {least}",
    )
    require(0 <= warmup < 2**31, f"warmup={warmup}: it must be 0 or more")
    require(
        clip == 0 or least <= clip < 1e30,
        f"clip={clip}: it must be at least {least}, or 0 for none",
    )

    def rate(step: ndarray) -> ndarray:
        return learning_rate * np.minimum(1.0, (step + 1) / max(warmup, 1)) * decay(step, length)

    first = [optax.clip_by_global_norm(clip)] if clip else []
    return Optimizer(optax.chain(*first, optax.scale_by_adam(), optax.scale(-1.0)), rate)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": adam}


def build(text: str, length: Length) -> Optimizer:
    """Return the optimizer that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, OPTIMIZERS, "optimizer", length=length)
