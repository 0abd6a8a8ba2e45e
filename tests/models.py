"""A small network for tests of what is done with one."""

from typing import Any

from diffusion_jax.config import Config
from diffusion_jax.runs import Model, init_variables

SMALL = Config().override(n_feat=8, image_shape=(8, 8, 3), n_cfeat=3, timesteps=40)


def untrained(config: Config = SMALL, **fields: Any) -> Model:
    """A configuration's network with its initial weights."""
    config = config.override(**fields)
    network = config.network.build()
    return Model(config, network, config.diffusion.build(), init_variables(network, 0))
