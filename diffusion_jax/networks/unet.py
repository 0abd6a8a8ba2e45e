"""The usual residual U-Net with attention, for all image sizes that its levels divide."""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from diffusion_jax.networks.layers import Conv, Dense, GroupNorm, Maps
from diffusion_jax.networks.network import Network, check_count, check_image_size
from diffusion_jax.typing import Images, require

Embedding = Float[Array, "rows feature"]  # one row for each image, or one for all


class Unet(Network):
    """Residual U-Net with attention: Ho et al. 2020, arXiv:2006.11239, appendix B.

    It is conditioned on the time and on a context vector, by the scale and shift of Dhariwal &
    Nichol (2021), section 3. Each level halves height and width, which must be multiples of
    2^(levels - 1).

    Attributes:
        n_feat: channels at full resolution, a multiple of 8.
        multipliers: channels of each level, in units of n_feat.
        blocks: residual blocks at each level on the way down; there is one more on the way up.
        attention: levels with self-attention after each block. Level 0 is full resolution, 1 is
            half. The middle of the network always has attention.
        heads: attention heads, a divisor of n_feat.
        time: embedding of the time: "sinusoidal", or "fourier" with random frequencies.
    """

    n_feat: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (2,)
    heads: int = 4
    time: Literal["sinusoidal", "fourier"] = "sinusoidal"

    def __post_init__(self) -> None:
        """Raise InputError if a field is invalid, before anything is traced."""
        super().__post_init__()
        levels = len(self.multipliers)
        require(1 <= levels <= 8, f"multipliers={self.multipliers}: give 1 to 8 of them")
        for name in ("blocks", "heads"):
            check_count(name, getattr(self, name))
        for multiplier in self.multipliers:
            check_count("multipliers", multiplier)
        check_count("n_feat", self.n_feat, multiple=8)
        check_count("n_feat", self.n_feat, multiple=self.heads)
        check_image_size(self.image_shape, multiple=2 ** (levels - 1))
        fits = all(level in range(levels) for level in self.attention)
        require(fits, f"attention={self.attention}: give levels from 0 to {levels - 1}")

    @nn.compact
    def __call__(
        self, x: Array, t: ArrayLike, context: Array | None = None, train: bool = False
    ) -> Images:
        """Return the output of the network, which is the predicted noise by default.

        Arguments and result are as in ContextUnet.
        """
        self.check_inputs(x, t, context)
        emb = self.embedding(t, context)
        conv = partial(Conv, dtype=self.dtype, kernels=self.kernels)
        heads = [self.heads * (level in self.attention) for level in range(len(self.multipliers))]

        def block(h: Maps, level: int, heads: int) -> Maps:
            return ResidualBlock(self.n_feat * self.multipliers[level], heads, conv)(h, emb)

        h = conv(self.n_feat)(x)
        skipped = [h]
        for level in range(len(self.multipliers)):
            if level:
                skipped.append(h := halve(h))
            for _ in range(self.blocks):
                skipped.append(h := block(h, level, heads[level]))
        h = block(block(h, level, self.heads), level, 0)
        for level in reversed(range(len(self.multipliers))):
            for _ in range(self.blocks + 1):
                h = block(jnp.concatenate([h, skipped.pop()], axis=-1), level, heads[level])
            if level:
                h = conv(h.shape[-1])(double(h))
        return conv(x.shape[-1], zero=True)(nn.silu(GroupNorm()(h))).astype(x.dtype)

    def embedding(self, t: ArrayLike, context: Array | None) -> Embedding:
        """Return the embedding of the time plus that of the context."""
        time, c = self.rows(t, context)
        dense = partial(Dense, 4 * self.n_feat, dtype=self.dtype)
        waves = WAVES[self.time](self.n_feat // 2).astype(np.float32)
        angles = time.astype(jnp.float32) * waves[None]
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return nn.silu(dense()(nn.silu(dense()(features))) + dense()(c))


# Angular frequencies of the time in [0, 1]. Sinusoidal: Vaswani et al. (2017) for 1000 t, as in
# Ho et al. (2020). Fourier: Song et al. (2021) with scale 16, the same in every network.
WAVES = {
    "sinusoidal": lambda count: 1000 * 10_000 ** (-np.arange(count) / count),
    "fourier": lambda count: 2 * np.pi * np.random.default_rng(0).normal(0, 16, count),
}


class ResidualBlock(nn.Module):
    """Two convolutions with norms, and attention. The embedding scales and shifts the second norm.

    The last convolution of each branch starts from zeros, so that the branch initially adds
    nothing.
    """

    features: int
    heads: int
    conv: partial[Conv]

    @nn.compact
    def __call__(self, x: Maps, emb: Embedding) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h, w, features)."""
        h = self.conv(self.features)(nn.silu(GroupNorm()(x)))
        condition = Dense(2 * self.features, dtype=h.dtype)(emb)[:, None, None, :]
        scale, shift = jnp.split(condition, 2, axis=-1)
        h = nn.silu(GroupNorm()(h) * (1 + scale) + shift)
        h = self.conv(self.features, zero=True)(h)
        h = h + (x if x.shape[-1] == self.features else self.conv(self.features, 1)(x))
        return h + self.attend(GroupNorm()(h)) if self.heads else h

    def attend(self, x: Maps) -> Maps:
        """Let every pixel attend to all pixels (Vaswani et al. 2017)."""
        batch, height, width, _ = x.shape
        q, k, v = jnp.split(self.conv(3 * self.features, 1)(x), 3, axis=-1)
        split = (batch, height * width, self.heads, self.features // self.heads)
        mixed = jax.nn.dot_product_attention(*(part.reshape(split) for part in (q, k, v)))
        return self.conv(self.features, 1, zero=True)(mixed.reshape(x.shape))


def halve(x: Maps) -> Maps:
    """Average over windows of 2 x 2."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def double(x: Maps) -> Maps:
    """Repeat each pixel in a window of 2 x 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
