"""The ContextUnet: a small U-Net that takes a noisy image, its time and a context.

Submodules are named as in the published network's state_dict (`conv1.0` is `conv1_0` here), so that
its weights can be imported by renaming and transposing.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.traverse_util as traverse
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from diffusion_jax.networks.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    GroupNorm,
    MakeNorm,
    Maps,
    gelu,
    max_pool,
    no_norm,
)
from diffusion_jax.networks.network import Network, check_count, check_image_size
from diffusion_jax.typing import Images, Variables


class ContextUnet(Network):
    """U-Net of two levels, with time and context: the published network of the sprites.

    The published network (1,480,771 parameters) has a shortcut in `init_conv` that is random and
    not saved. Here it is a learned 1 x 1 convolution. With shortcut="none" the block returns
    h / 1.414 without a shortcut, and the network takes the published weights.

    Height and width must be multiples of 4 and at least 8. The window of the average pool is 4 for
    sides from 16 to 28, as published, and a quarter of the side otherwise.

    Attributes:
        n_feat: channels at full resolution, a multiple of 8.
        shortcut: "conv" or "none".
        norm: the norm in each block: "batch", "group" for GroupNorm(8), or "none".
    """

    n_feat: int = 64
    shortcut: Literal["conv", "none"] = "conv"
    norm: Literal["batch", "group", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise InputError if a field is invalid, before anything is traced."""
        super().__post_init__()
        check_count("n_feat", self.n_feat, multiple=8)
        check_image_size(self.image_shape, multiple=4, least=8)

    @nn.compact
    def __call__(
        self, x: Array, t: ArrayLike, context: Array | None = None, train: bool = False
    ) -> Images:
        """Return the output of the network, which is the predicted noise by default.

        Args:
            x: (batch, *image_shape), floating-point.
            t: time in [0, 1], floating-point: one for all images, or (batch,).
            context: (batch, n_cfeat). None means a context of zeros; its embedding is not zero.
            train: whether BatchNorm uses the batch's statistics and updates "batch_stats".

        Returns:
            An array of the shape and dtype of x.
        """
        self.check_inputs(x, t, context)
        time, c = self.rows(t, context)
        n, parts = self.n_feat, self.parts()
        block = partial(ConvBlock, parts=parts, residual=True, project=self.shortcut == "conv")
        first = block(n, name="init_conv")(x, train)
        down1 = UnetDown(n, parts, name="down1")(first, train)
        down2 = UnetDown(2 * n, parts, name="down2")(down1, train)
        quarter = self.image_shape[0] // 4, self.image_shape[1] // 4
        up = ConvTranspose(2 * n, quarter, self.dtype, name="up0_0")(self.pool(down2))
        up = nn.relu(GroupNorm(name="up0_1")(up))
        embed = partial(EmbedFC, dtype=self.dtype)
        up = embed(2 * n, name="contextembed1")(c) * up + embed(2 * n, name="timeembed1")(time)
        up = UnetUp(n, parts, name="up1")(up, down2, train)
        up = embed(n, name="contextembed2")(c) * up + embed(n, name="timeembed2")(time)
        up = UnetUp(n, parts, name="up2")(up, down1, train)
        y = parts.conv(n, name="out_0")(jnp.concatenate([up, first], axis=-1))
        y = nn.relu(GroupNorm(name="out_1")(y))
        return parts.conv(self.image_shape[2], name="out_3")(y).astype(x.dtype)

    def parts(self) -> "Parts":
        """Return the layers from which blocks are built."""
        batch = partial(BatchNorm, self.axis_name, self.kernels)
        norms: dict[str, MakeNorm] = {"batch": batch, "group": GroupNorm, "none": no_norm}
        conv = partial(Conv, dtype=self.dtype, kernels=self.kernels)
        return Parts(conv, norms[self.norm], self.dtype)

    def pool(self, x: Maps) -> Float[Array, "batch 1 1 channel"]:
        """Average over the pooling window, and apply GELU."""
        sides = self.image_shape[:2]
        height, width = (4 if 16 <= side <= 28 else side // 4 for side in sides)
        return gelu(x[:, :height, :width].mean((1, 2), keepdims=True))

    def for_sampling(self, variables: Variables) -> tuple[Any, Variables]:
        """Return the network with each BatchNorm folded into the convolution before it."""
        if self.norm != "batch":
            return self, variables
        params = traverse.flatten_dict(variables["params"], is_leaf=is_layer)
        stats = traverse.flatten_dict(variables["batch_stats"], is_leaf=is_layer)
        for (*place, name), moments in stats.items():
            conv = (*place, name.removesuffix("_1") + "_0")  # conv1_1 follows conv1_0
            params[conv] = BatchNorm.folded(params[conv], params.pop((*place, name)), moments)
        return self.clone(norm="none"), {"params": traverse.unflatten_dict(params)}


def is_layer(path: tuple[str, ...], tree: Variables) -> bool:
    """Return whether a tree of variables belongs to one layer."""
    return "bias" in tree or "mean" in tree


class Parts(NamedTuple):
    """The layers from which blocks are built: makers of convolutions and norms, and the dtype.

    The makers take the name of the layer.
    """

    conv: partial[Conv]
    norm: MakeNorm
    dtype: DTypeLike


class ConvBlock(nn.Module):
    """Convolution, norm and GELU, twice. `residual` adds the input and divides by 1.414.

    An input with a different number of channels is added through a learned 1 x 1 convolution, or
    not at all if `project` is False.
    """

    features: int
    parts: Parts
    residual: bool = False
    project: bool = True

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h, w, features)."""
        h = x
        for name in ("conv1", "conv2"):
            h = self.parts.conv(self.features, name=f"{name}_0")(h)
            h = gelu(self.parts.norm(name=f"{name}_1")(h, train))
        if not self.residual:
            return h
        if x.shape[-1] == self.features:
            h = x + h
        elif self.project:
            h = self.parts.conv(self.features, 1, name="shortcut")(x) + h
        return h / 1.414


class UnetDown(nn.Module):
    """Two blocks, and max pooling that halves height and width."""

    features: int
    parts: Parts

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h / 2, w / 2, features)."""
        for name in ("model_0", "model_1"):
            x = ConvBlock(self.features, self.parts, name=name)(x, train)
        return max_pool(x)


class UnetUp(nn.Module):
    """Transposed convolution of the input and the skipped maps together, then two blocks."""

    features: int
    parts: Parts

    @nn.compact
    def __call__(self, x: Maps, skip: Maps, train: bool) -> Maps:
        """Map two of (batch, h, w, in_features / 2) to (batch, 2 h, 2 w, features)."""
        x = jnp.concatenate([x, skip], axis=-1)
        x = ConvTranspose(self.features, (2, 2), self.parts.dtype, name="model_0")(x)
        for name in ("model_1", "model_2"):
            x = ConvBlock(self.features, self.parts, name=name)(x, train)
        return x


class EmbedFC(nn.Module):
    """Two linear layers with a GELU between them."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch feature"]) -> Float[Array, "batch 1 1 _"]:
        """Map (batch, in_features) to (batch, 1, 1, features), which broadcasts over an image."""
        x = gelu(Dense(self.features, self.dtype, name="model_0")(x))
        return Dense(self.features, self.dtype, name="model_2")(x)[:, None, None, :]
