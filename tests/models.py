"""Small networks for tests that need any model, and the configuration of the tests that train."""

from typing import Any

import flax.linen as nn

from diffusion_jax import runs
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks import NETWORKS, Network
from diffusion_jax.networks.layers import BatchNorm, Conv, Dense
from diffusion_jax.runs.config import Config


class Tiny(Network):
    """BatchNorm and a convolution, plus linear maps of time and context. It compiles fast."""

    @nn.compact
    def __call__(self, x, t, context=None, train=False):
        """Take the arguments of every network."""
        self.check_inputs(x, t, context)
        features = self.image_shape[2]
        rows = [Dense(features, self.dtype)(part) for part in self.rows(t, context)]
        y = BatchNorm(self.axis_name, self.kernels)(x, train)
        y = Conv(features, dtype=self.dtype, kernels=self.kernels)(y)
        return (y + (rows[0] + rows[1])[:, None, None]).astype(x.dtype)


NETWORKS["tiny"] = Tiny
SMALL = Config(
    network="context_unet:n_feat=8",
    image_shape=(8, 8, 3),
    class_names=("a", "b", "c"),
    schedule="course:steps=40",
    batch_size=8,
    epochs=3,
    ema="power:snapshots=4",
)  # with 20 images, the tests that train this share a compiled program
TINY = SMALL.override(network="tiny", ema="none")


def untrained(config: Config = TINY, **fields: Any) -> Model:
    """Return a configuration's network with its initial weights."""
    return runs.untrained(config.override(**fields))
