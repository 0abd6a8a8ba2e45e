"""Layers that equal PyTorch's up to rounding, for NHWC images and parameters in float32.

Layers compute in `dtype`, and norms in float32. Parameters are initialised as in PyTorch.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffusion_jax.networks.kernels import KERNELS, Channels, Maps, spread
from diffusion_jax.typing import Variables


def gelu(x: Array) -> Array:
    """Return x Phi(x) (Hendrycks & Gimpel 2016). It uses erf, as PyTorch does; erfc is slower."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def kernel_and_bias(
    module: nn.Module, shape: tuple[int, ...], fan_in: int, features: int, dtype: DTypeLike
) -> tuple[Array, Channels]:
    """Make a layer's kernel and bias, drawn from U(+-1/sqrt(fan_in)), or zeros if fan_in is 0."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        bound = fan_in**-0.5 if fan_in else 0.0
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    kernel, bias = module.param("kernel", init, shape), module.param("bias", init, (features,))
    return kernel.astype(dtype), bias.astype(dtype)


class Dense(nn.Module):
    """Linear layer."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch _"]) -> Float[Array, "*batch _"]:
        """Map (..., in_features) to (..., features)."""
        fan_in = x.shape[-1]
        shape = (fan_in, self.features)
        kernel, bias = kernel_and_bias(self, shape, fan_in, self.features, self.dtype)
        y = x.astype(self.dtype) @ kernel
        return y + bias.reshape(*(1,) * (y.ndim - 1), -1)


class Conv(nn.Module):
    """Convolution of odd size, with bias, that keeps height and width. `zero` starts from zeros."""

    features: int
    size: int = 3
    dtype: DTypeLike = jnp.float32
    kernels: str = "fast"
    zero: bool = False

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Map (batch, h, w, in_features) to (batch, h, w, features)."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        fan_in = 0 if self.zero else x.shape[-1] * self.size**2
        kernel, bias = kernel_and_bias(self, shape, fan_in, self.features, self.dtype)
        return KERNELS[self.kernels].convolve(x.astype(self.dtype), kernel) + spread(bias)


class ConvTranspose(nn.Module):
    """Transposed convolution with stride = size: each pixel becomes size[0] x size[1] pixels.

    It is an einsum because the gradient of lax.conv_transpose is 13 times slower on CPUs. The
    kernel has the shape (*size, features, in_features), as with Flax's transpose_kernel=True.
    """

    features: int
    size: tuple[int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Map (batch, h, w, in_features) to (batch, size[0] h, size[1] w, features)."""
        batch, height, width, inputs = x.shape
        down, across = self.size
        fan_in = self.features * down * across  # PyTorch computes the fan-in from the outputs
        shape = (down, across, self.features, inputs)
        kernel, bias = kernel_and_bias(self, shape, fan_in, self.features, self.dtype)
        y = jnp.einsum("bhwi,klfi->bhkwlf", x, kernel)
        return y.reshape(batch, down * height, across * width, self.features) + spread(bias)


def max_pool(x: Maps) -> Maps:
    """Return the maxima over windows of 2 x 2, computed pairwise.

    On CPUs, the gradient is faster than that of reduce_window. The gradient of `max` over axes
    divides by the number of entries equal to the maximum. This number is 0 where XLA recomputes the
    entries with different rounding. The gradient of `maximum` does not divide. Equal entries share
    the gradient; in PyTorch the first of them gets it all. If the number of rows or columns is odd,
    the last one is dropped.
    """
    rows = jnp.maximum(x[:, :-1:2], x[:, 1::2])
    return jnp.maximum(rows[:, :, :-1:2], rows[:, :, 1::2])


def widen(x: Array) -> Array:
    """Return x in at least float32, the precision in which norms compute."""
    return x.astype(jnp.float32 if x.dtype.itemsize < 4 else x.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) with PyTorch's running statistics.

    Training normalises by the batch's biased variance and stores the unbiased one, whereas Flax
    stores the biased one. The batch includes the batches of all devices that are mapped over
    `axis_name`.
    """

    axis_name: str | None = None
    kernels: str = "fast"
    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Maps:
        """Normalise each channel. If `train`, use the batch, and update the running statistics."""
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        wide = widen(x)
        if not train or self.is_initializing():
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            y = (wide - spread(running_mean.value)) * spread(factor) + spread(bias)
            return y.astype(x.dtype)
        normalise = KERNELS[self.kernels].normalise
        y, mean, var = normalise(wide, scale, bias, self.epsilon, self.axis_name)
        keep = self.momentum
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * var
        return y.astype(x.dtype)

    @classmethod
    def folded(cls, conv: Variables, params: Variables, stats: Variables) -> Variables:
        """Return the parameters of a convolution with the BatchNorm after it folded in.

        Let m be the running mean, v the variance, and f = scale / sqrt(v + epsilon). The kernel
        becomes f k and the bias becomes f (b - m) + bias.
        """
        factor = params["scale"] / jnp.sqrt(stats["var"] + cls.epsilon)
        bias = (conv["bias"] - stats["mean"]) * factor + params["bias"]
        return {"kernel": conv["kernel"] * spread(factor), "bias": bias}


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of each sample by itself, in groups of channels."""

    groups: int = 8
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Maps:
        """Normalise each group of channels of each sample. `train` has no effect."""
        batch, height, width, channel = x.shape
        wide = widen(x).reshape(batch, height * width, self.groups, channel // self.groups)
        centred = wide - wide.mean((1, 3), keepdims=True)
        var = jnp.square(centred).mean((1, 3), keepdims=True)
        y = (centred * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
        scale = self.param("scale", nn.initializers.ones, (channel,))
        bias = self.param("bias", nn.initializers.zeros, (channel,))
        return (y * spread(scale) + spread(bias)).astype(x.dtype)


def no_norm(name: str) -> Callable[[Maps, bool], Maps]:
    """Return the identity, which takes the place of a norm."""
    return lambda x, train: x


MakeNorm = Callable[..., Callable[[Maps, bool], Maps]]  # (name=...) -> norm, called (x, train)
