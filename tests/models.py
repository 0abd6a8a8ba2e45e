"""A small network for tests that need any model."""

from typing import Any

from diffusion_jax import runs
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.runs.config import Config

SMALL = Config(
    network="context_unet:n_feat=8",
    image_shape=(8, 8, 3),
    class_names=("a", "b", "c"),
    schedule="course:steps=40",
)


def untrained(config: Config = SMALL, **fields: Any) -> Model:
    """Return a configuration's network with its initial weights."""
    return runs.untrained(config.override(**fields))
