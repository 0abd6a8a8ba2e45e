"""The convolution's own gradients are those that jax finds for lax's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffusion_jax.networks import convolution
from diffusion_jax.networks.convolution import convolve


def plain(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(("size", "inputs", "outputs"), [(3, 5, 7), (1, 3, 4), (5, 2, 2)])
def test_gradients(size: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(size)
    x, kernel, g = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 8, 6, inputs), (size, size, inputs, outputs), (3, 8, 6, outputs))
    )
    expected, pullback = jax.vjp(plain, x, kernel)
    ours, our_pullback = jax.vjp(convolve, x, kernel)
    assert np.allclose(ours, expected, atol=1e-5)
    elsewhere = convolution._automatic_gradients(x, kernel, g)
    for gradient, other, wanted in zip(our_pullback(g), elsewhere, pullback(g), strict=True):
        assert np.allclose(gradient, wanted, atol=1e-4)
        assert np.allclose(other, wanted, atol=1e-4)
