"""The ContextUnet: a small U-Net that predicts from a noisy image, its time and a context."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from diffusion_jax.networks.blocks import (
    BatchNorm,
    Conv,
    ConvTranspose,
    EmbedFC,
    GroupNorm,
    MakeNorm,
    Maps,
    ResidualConvBlock,
    UnetDown,
    UnetUp,
    gelu,
    no_norm,
)
from diffusion_jax.typing import Images, InputError

SHORTCUTS = {"conv": True, "none": False}
NORMS: dict[str, Callable[[str | None], MakeNorm]] = {
    "batch": lambda axis_name: partial(BatchNorm, axis_name=axis_name),
    "group": lambda axis_name: lambda features: GroupNorm(),
    "none": lambda axis_name: lambda features: no_norm,
}

LARGEST = 4096  # of every count: networks beyond fit no memory


class ContextUnet(nn.Module):
    """U-Net of two levels, conditioned on the time and on a context vector.

    The published network of the sprites (1,480,771 parameters), with its random, unsaved
    shortcut of `init_conv` replaced: by a learned 1 x 1 convolution, or by nothing, h / 1.414,
    with shortcut="none", which takes the published weights.

    Attributes:
        in_channels: channels of the images.
        n_feat: channels at full height, a multiple of 8.
        n_cfeat: length of a context vector.
        height: height and width of the images, a multiple of 4 from 8 up. The window of the
            average pool is 4 from 16 to 28, as published, and height / 4 elsewhere.
        shortcut: "conv" or "none".
        norm: "batch", or "group" for GroupNorm(8) in place of each BatchNorm, or "none" for
            nothing there: what folding.fold_batch_norm makes.
        axis_name: mapped axis over which BatchNorm takes its statistics in training.
        dtype: of the computation; parameters, norms and statistics are in float32.

    Raises:
        InputError: a field, or the shape of an input, is none of these.
    """

    in_channels: int = 3
    n_feat: int = 64
    n_cfeat: int = 5
    height: int = 16
    shortcut: str = "conv"
    norm: str = "batch"
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Check the fields before anything is traced."""
        check_count("in_channels", self.in_channels)
        check_count("n_feat", self.n_feat, multiple=8)
        check_count("n_cfeat", self.n_cfeat)
        check_count("height", self.height, multiple=4, least=8)
        check_choice("shortcut", self.shortcut, SHORTCUTS)
        check_choice("norm", self.norm, NORMS)
        super().__post_init__()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.height, self.height, self.in_channels

    def setup(self) -> None:
        """Name the layers as the state_dict does."""
        n, dtype = self.n_feat, self.dtype
        norm = NORMS[self.norm](self.axis_name)
        self.init_conv = ResidualConvBlock(
            self.in_channels, n, norm, dtype, residual=True, project=SHORTCUTS[self.shortcut]
        )
        self.down1 = UnetDown(n, n, norm, dtype)
        self.down2 = UnetDown(n, 2 * n, norm, dtype)
        self.timeembed1 = EmbedFC(1, 2 * n, dtype)
        self.timeembed2 = EmbedFC(1, n, dtype)
        self.contextembed1 = EmbedFC(self.n_cfeat, 2 * n, dtype)
        self.contextembed2 = EmbedFC(self.n_cfeat, n, dtype)
        self.up0 = [ConvTranspose(2 * n, 2 * n, self.height // 4, dtype), GroupNorm(), nn.relu]
        self.up1 = UnetUp(4 * n, n, norm, dtype)
        self.up2 = UnetUp(2 * n, n, norm, dtype)
        self.out = [
            Conv(2 * n, n, 3, dtype),
            GroupNorm(),
            nn.relu,
            Conv(n, self.in_channels, 3, dtype),
        ]

    def __call__(
        self, x: Array, t: ArrayLike, context: Array | None = None, train: bool = False
    ) -> Images:
        """Predict, as a rule, the noise of images.

        Args:
            x: (batch, height, height, in_channels), floating.
            t: time in [0, 1], floating: one for all, or (batch,).
            context: (batch, n_cfeat); None is a context of zeros, which is not an embedding of
                zeros.
            train: whether BatchNorm takes the batch's statistics and updates "batch_stats".

        Returns:
            The shape and dtype of x.
        """
        self.check_inputs(x, t, context)
        time, c = self.vectors(t, context)
        first = self.init_conv(x.astype(self.dtype), train)
        down1 = self.down1(first, train)
        down2 = self.down2(down1, train)
        up = self.chain(self.up0, self.to_vec(down2))
        up = self.contextembed1(c) * up + self.timeembed1(time)
        up = self.up1(up, down2, train)
        up = self.contextembed2(c) * up + self.timeembed2(time)
        up = self.up2(up, down1, train)
        return self.chain(self.out, jnp.concatenate([up, first], axis=-1)).astype(x.dtype)

    def vectors(
        self, t: ArrayLike, context: Array | None
    ) -> tuple[Float[Array, "times 1"], Float[Array, "contexts feature"]]:
        """Return time and context as rows: a single one where all images share it."""
        time = jnp.asarray(t).astype(self.dtype).reshape(-1, 1)
        if context is None:
            return time, jnp.zeros((1, self.n_cfeat), self.dtype)
        return time, context.astype(self.dtype)

    def to_vec(self, x: Maps) -> Maps:
        """Average over the pool's window and apply GELU: (batch, 1, 1, channel)."""
        window = 4 if 16 <= self.height <= 28 else self.height // 4
        return gelu(x[:, :window, :window].mean((1, 2), keepdims=True))

    def chain(self, layers: Any, x: Maps) -> Maps:
        """Apply layers one after the other."""
        for layer in layers:
            x = layer(x)
        return x

    def check_inputs(self, x: Array, t: ArrayLike, context: Array | None) -> None:
        """Raise InputError where an input has not the shape or kind that __call__ names."""
        image = self.image_shape
        if x.ndim != 4 or x.shape[1:] != image:
            raise InputError(f"x has shape {x.shape}: give (batch, {', '.join(map(str, image))})")
        for name, value in (("x", x), ("t", t)):
            dtype = jnp.result_type(value)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"{name} is of {dtype}: give floats (t is the step / steps)")
        batch = x.shape[0]
        if jnp.shape(t) not in ((), (batch,)):
            raise InputError(f"t has shape {jnp.shape(t)}: give a scalar or ({batch},)")
        if context is not None and context.shape != (batch, self.n_cfeat):
            raise InputError(
                f"context has shape {context.shape}: give ({batch}, {self.n_cfeat}), or None"
            )


def check_count(name: str, value: int, multiple: int = 1, least: int = 1) -> None:
    """Raise InputError unless value is an integer, a multiple of `multiple`, and in bounds."""
    if isinstance(value, int) and value > LARGEST:
        raise InputError(f"{name}={value}: it must be at most {LARGEST}")
    if isinstance(value, int) and value % multiple == 0 and value >= least:
        return
    of = f"a multiple of {multiple}" if multiple > 1 else "an integer"
    raise InputError(f"{name}={value!r}: give {of} from {max(multiple, least)} up")


def check_choice(name: str, value: str, choices: dict[str, Any]) -> None:
    """Raise InputError unless value is a key of choices."""
    if value not in choices:
        raise InputError(f"{name}={value!r}: give one of {', '.join(choices)}")
