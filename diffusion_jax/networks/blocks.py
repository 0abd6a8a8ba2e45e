"""Layers of the ContextUnet, equal to PyTorch's to rounding: NHWC images, parameters in float32.

Attributes are named as in the published network's state_dict (`conv1.0` is `conv1_0` here), so
that its weights are imported by renaming and transposition. Layers compute in `dtype`, norms in
float32.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffusion_jax.networks.convolution import convolve
from diffusion_jax.networks.winograd import Maps
from diffusion_jax.typing import Images, Key

Channels = Float[Array, " channel"]
Layers = list[Callable[..., Array]]
MakeNorm = Callable[[int], Callable[..., Array]]  # features -> norm, called as norm(x, train)


def gelu(x: Array) -> Array:
    """x Phi(x) (Hendrycks & Gimpel 2016), by erf as in PyTorch; jax takes erfc, which is slower."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def uniform(fan_in: int) -> Callable[..., Array]:
    """Return PyTorch's default initialiser of kernels and biases, U(+-1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key: Key, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nn.Module):
    """Convolution of odd size that keeps height and width, with bias."""

    in_features: int
    features: int
    size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h, w, features)."""
        init = uniform(self.in_features * self.size**2)
        shape = (self.size, self.size, self.in_features, self.features)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        return convolve(x, kernel) + spread(bias)


def dense(in_features: int, features: int, dtype: DTypeLike) -> nn.Dense:
    """Return a linear layer."""
    init = uniform(in_features)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init)


def max_pool(x: Maps) -> Maps:
    """Maximum over windows of 2 x 2, by pairs: faster than reduce_window's gradient on CPU.

    The gradient of `max` over axes divides by the number of entries equal to the maximum, which
    is 0 where XLA computes the entries once more and rounds otherwise; that of `maximum` has no
    division. Equal entries share the gradient; PyTorch gives it to the first.
    """
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


class ConvTranspose(nn.Module):
    """Transposed convolution with stride = size: each pixel becomes size x size pixels.

    An einsum, for the gradient of lax.conv_transpose is 13 times slower on CPU. The kernel is
    (size, size, features, in_features), as with flax's transpose_kernel=True.
    """

    in_features: int
    features: int
    size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Map (batch, h, w, in_features) to (batch, size h, size w, features)."""
        init = uniform(self.features * self.size**2)  # PyTorch takes the fan-in from the outputs
        shape = (self.size, self.size, self.features, self.in_features)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        batch, height, width, _ = x.shape
        y = jnp.einsum("bhwi,klfi->bhkwlf", x, kernel)
        y = y.reshape(batch, self.size * height, self.size * width, self.features)
        return y + spread(bias)


def spread(channels: Channels) -> Float[Array, "1 1 1 channel"]:
    """Shape a vector of channels to be broadcast against images."""
    return channels.reshape(1, 1, 1, -1)


def scale_and_shift(module: nn.Module, x: Images) -> Images:
    """Multiply by the parameter `scale` and add `bias`, one of each per channel, made here."""
    scale = module.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = module.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return x * spread(scale) + spread(bias)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) with PyTorch's running statistics.

    Training normalises by the batch's biased variance and stores the unbiased one, where flax
    stores the biased. With `axis_name`, the batch is all that is mapped over that axis.
    """

    features: int
    axis_name: str | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Images:
        """Normalise each channel, by the batch and updating the averages where train is True."""
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (self.features,))
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        wide = x.astype(jnp.float32)
        if not train or self.is_initializing():
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            y = (wide - spread(running_mean.value)) * spread(factor) + spread(bias)
            return y.astype(x.dtype)
        y, mean, var = normalise(wide, scale, bias, self.epsilon, self.axis_name)
        count = _count(x, self.axis_name)
        keep = self.momentum
        unbiased = var * (count / max(count - 1, 1))
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * unbiased
        return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: Images, scale: Channels, bias: Channels, epsilon: float, axis: str | None
) -> tuple[Images, Channels, Channels]:
    """Normalise by the moments of the batch, over all that is mapped over axis.

    Returns what comes of it, the mean and the biased variance; of these two, gradients are not
    taken. That of the first is written out (Ioffe & Szegedy 2015, section 3), for it needs fewer
    passes over the images than the automatic one, and nothing kept but x.
    """
    return _normalise(x, scale, bias, epsilon, axis)[0]


def _normalise(
    x: Images, scale: Channels, bias: Channels, epsilon: float, axis: str | None
) -> tuple[tuple, tuple]:
    mean, var = _moments(x, axis)
    rate = jax.lax.rsqrt(var + epsilon)
    y = (x - spread(mean)) * spread(scale * rate) + spread(bias)
    return (y, mean, var), (x, scale, mean, rate)


def _normalise_backward(epsilon: float, axis: str | None, saved: tuple, gradients: tuple) -> tuple:
    x, scale, mean, rate = saved
    g = gradients[0]
    centred = (x - spread(mean)) * spread(rate)
    by_bias, by_scale = g.sum((0, 1, 2)), (g * centred).sum((0, 1, 2))
    sums = jnp.stack([by_bias, by_scale])
    if axis:
        sums = jax.lax.psum(sums, axis)
    along_mean, along_var = sums / _count(x, axis)
    by_x = spread(scale * rate) * (g - spread(along_mean) - centred * spread(along_var))
    return by_x, by_scale, by_bias


normalise.defvjp(_normalise, _normalise_backward)


def _moments(x: Images, axis: str | None) -> tuple[Channels, Channels]:
    """Mean and biased variance of each channel, over all mapped batches.

    Each device's two moments are gathered at once, and joined without cancellation (Chan, Golub &
    LeVeque 1983): half the collectives of a mean over devices of each in turn.
    """
    mean = x.mean((0, 1, 2))
    var = jnp.square(x - spread(mean)).mean((0, 1, 2))  # two passes: no cancellation
    if axis:
        means, variances = jax.lax.all_gather(jnp.stack([mean, var]), axis, axis=1)
        mean = means.mean(0)
        var = variances.mean(0) + jnp.square(means - mean).mean(0)
    return mean, var


def _count(x: Images, axis: str | None) -> int:
    """How many values each channel has, over all mapped batches."""
    return x.size // x.shape[-1] * (jax.lax.axis_size(axis) if axis else 1)


def no_norm(x: Images, train: bool = False) -> Images:
    """Leave the input as it is."""
    return x


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018): each sample by itself, in groups of channels."""

    groups: int = 8
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Images:
        """Normalise each group of channels of each sample. `train` changes nothing."""
        batch, height, width, channel = x.shape
        wide = x.astype(jnp.float32)
        wide = wide.reshape(batch, height * width, self.groups, channel // self.groups)
        centred = wide - wide.mean((1, 3), keepdims=True)
        var = jnp.square(centred).mean((1, 3), keepdims=True)
        y = (centred * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        return scale_and_shift(self, y).astype(x.dtype)


class ResidualConvBlock(nn.Module):
    """Twice convolution, norm and GELU; `residual` adds the input and divides by 1.414.

    Where the input has another number of channels, it is added through a learned 1 x 1
    convolution, or not at all without `project`.
    """

    in_features: int
    features: int
    norm: MakeNorm
    dtype: DTypeLike = jnp.float32
    residual: bool = False
    project: bool = True

    def setup(self) -> None:
        """Name the layers as the state_dict does."""
        features, dtype = self.features, self.dtype
        self.conv1: Layers = [Conv(self.in_features, features, 3, dtype), self.norm(features)]
        self.conv2: Layers = [Conv(features, features, 3, dtype), self.norm(features)]
        if self.residual and self.project and self.in_features != features:
            self.shortcut = Conv(self.in_features, features, 1, dtype)

    def __call__(self, x: Maps, train: bool = False) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h, w, features)."""
        h = x
        for conv, normalise in (self.conv1, self.conv2):
            h = gelu(normalise(conv(h), train))
        if not self.residual:
            return h
        if self.in_features == self.features:
            h = x + h
        elif self.project:
            h = self.shortcut(x) + h
        return h / 1.414


class UnetDown(nn.Module):
    """Two blocks and max pooling: half the height and width."""

    in_features: int
    features: int
    norm: MakeNorm
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Name the layers as the state_dict does."""
        self.model = [
            ResidualConvBlock(self.in_features, self.features, self.norm, self.dtype),
            ResidualConvBlock(self.features, self.features, self.norm, self.dtype),
        ]

    def __call__(self, x: Maps, train: bool = False) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h / 2, w / 2, features)."""
        for block in self.model:
            x = block(x, train)
        return max_pool(x)


class UnetUp(nn.Module):
    """Transposed convolution and two blocks, of the input beside what was skipped."""

    in_features: int
    features: int
    norm: MakeNorm
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Name the layers as the state_dict does."""
        self.model = [
            ConvTranspose(self.in_features, self.features, 2, self.dtype),
            ResidualConvBlock(self.features, self.features, self.norm, self.dtype),
            ResidualConvBlock(self.features, self.features, self.norm, self.dtype),
        ]

    def __call__(self, x: Maps, skip: Maps, train: bool = False) -> Maps:
        """Map two of (batch, h, w, in_features / 2) to (batch, 2 h, 2 w, features)."""
        up, *blocks = self.model
        x = up(jnp.concatenate([x, skip], axis=-1))
        for block in blocks:
            x = block(x, train)
        return x


class EmbedFC(nn.Module):
    """Two linear layers with a GELU between them."""

    in_features: int
    features: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Name the layers as the state_dict does."""
        self.model: Layers = [
            dense(self.in_features, self.features, self.dtype),
            gelu,
            dense(self.features, self.features, self.dtype),
        ]

    def __call__(self, x: Float[Array, "batch feature"]) -> Float[Array, "batch 1 1 _"]:
        """Map (batch, in_features) to (batch, 1, 1, features), to be spread over an image."""
        for layer in self.model:
            x = layer(x)
        return x[:, None, None, :]
