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


def gradients_of_kernel(x, kernel, g):
    pulled = (jax.vjp(f, x, kernel)[1](g)[1] for f in (convolve, plain))
    return (np.asarray(gradient, np.float32) for gradient in pulled)


@pytest.mark.parametrize("batch", [12, 7])
@pytest.mark.parametrize("parts", [1, 3, 12])
def test_the_kernels_gradient_in_parts_of_the_batch(batch: int, parts: int, monkeypatch) -> None:
    rng = np.random.default_rng(parts)
    x, kernel, g = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((batch, 4, 4, 8), (3, 3, 8, 5), (batch, 4, 4, 5))
    )
    monkeypatch.setattr(convolution, "CACHE", x.nbytes * 9 // parts)
    ours, wanted = gradients_of_kernel(x, kernel, g)
    assert np.allclose(ours, wanted, atol=1e-4)


def test_parts_add_up_in_float32(monkeypatch) -> None:
    """In bfloat16, 257 rounds to 256: a sum of ones by one image at a time would stop there."""
    monkeypatch.setattr(convolution, "CACHE", 0)
    ones = (jnp.ones(shape, jnp.bfloat16) for shape in ((512, 1, 1, 8), (3, 3, 8, 1)))
    ours, _ = gradients_of_kernel(*ones, jnp.ones((512, 1, 1, 1), jnp.bfloat16))
    assert (ours[1, 1] == 512).all()
