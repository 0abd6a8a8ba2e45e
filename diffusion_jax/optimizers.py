"""Adam, and how its learning rate changes over a run."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Length(NamedTuple):
    """How long a run is: epochs over n_images images, batch_size of them in a step."""

    n_images: int
    batch_size: int
    epochs: int

    @property
    def steps(self) -> int:
        """The steps of the whole run."""
        return self.end_of_epoch(self.epochs)

    def end_of_epoch(self, epoch: int) -> int:
        """How many steps complete that many epochs."""
        return -(-epoch * self.n_images // self.batch_size)


Factor = Callable[[Int[Array, ""], Length], Float[Array, ""]]


def _notes(step: Array, length: Length) -> Array:
    epoch = step * length.batch_size // length.n_images
    return 1 - epoch / length.epochs


# The learning rate of a step, as a part of the one that the configuration gives.
LR_SCHEDULES: dict[str, Factor] = {
    "notes": _notes,
    "constant": lambda step, length: jnp.ones(()),
    "linear": lambda step, length: 1 - step / length.steps,
    "cosine": lambda step, length: 0.5 * (1 + jnp.cos(step / length.steps * jnp.pi)),
}


def adam(
    learning_rate: float,
    lr_schedule: str,
    length: Length,
    warmup_steps: int = 0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with the defaults of PyTorch.

    lr_schedule names an entry of LR_SCHEDULES; grad_clip bounds the gradient's norm, 0 does not.
    """

    def rate(step: Array) -> Array:
        warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        return learning_rate * warmup * LR_SCHEDULES[lr_schedule](step, length)

    clip = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    return optax.chain(*clip, optax.adam(rate))
