"""Compare the convolution and its gradients with jax's, and with sums in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffusion_jax.networks import ContextUnet
from diffusion_jax.networks.kernels import KERNELS, convolution, winograd
from diffusion_jax.networks.kernels.convolution import convolve
from tests.test_folding import random_variables
from tests.test_networks import jit


def plain(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def drawn(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize(("size", "inputs", "outputs"), [(3, 5, 7), (1, 3, 4), (5, 2, 2)])
def test_gradients(size: int, inputs: int, outputs: int) -> None:
    x, kernel, g = drawn(size, (3, 8, 6, inputs), (size, size, inputs, outputs), (3, 8, 6, outputs))
    expected, pullback = jax.vjp(plain, x, kernel)
    ours, our_pullback = jax.vjp(convolve, x, kernel)
    assert np.allclose(ours, expected, atol=1e-5)
    elsewhere = convolution._plain_gradients(x, kernel, g)
    for gradient, other, wanted in zip(our_pullback(g), elsewhere, pullback(g), strict=True):
        assert np.allclose(gradient, wanted, atol=1e-4)
        assert np.allclose(other, wanted, atol=1e-4)


def sums(x, kernel, g):
    """Compute a convolution and its gradients by nine products, in NumPy and float64."""
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, by_padded, by_kernel = np.zeros_like(g), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(3, 3):
        window = (slice(None), slice(i, i + height), slice(j, j + width))
        y += padded[window] @ kernel[i, j]
        by_padded[window] += g @ kernel[i, j].T
        by_kernel[i, j] = np.einsum("bhwi,bhwo->io", padded[window], g)
    return y, by_padded[:, 1:-1, 1:-1], by_kernel


def errors(x, kernel, g):
    """Return errors of winograd and of plain convolutions and gradients, relative to the norm."""
    wanted = sums(x, kernel, g)
    y, pullback = jax.vjp(convolve, x, kernel)
    plainly = plain(x, kernel), *convolution._plain_gradients(x, kernel, g)

    def error(found, true):
        return np.linalg.norm(np.asarray(found, np.float64) - true) / np.linalg.norm(true)

    return [
        (error(found, true), error(other, true))
        for found, other, true in zip((y, *pullback(g)), plainly, wanted, strict=True)
    ]


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((6, 8, 8), (64, 64)), ((5, 2, 6), (32, 64)), ((1, 16, 4), (64, 32))],
)
def test_winograds_errors_are_those_of_rounding(shape, channels) -> None:
    inputs, outputs = channels
    x, kernel, g = drawn(0, (*shape, inputs), (3, 3, *channels), (*shape, outputs))
    assert winograd.suits(x, kernel)
    for ours, others in errors(x, kernel, g):
        assert ours < 2 * others < 2e-6


def test_winograd_in_float64() -> None:
    with jax.enable_x64(True):
        shapes = (2, 4, 4, 64), (3, 3, 64, 64), (2, 4, 4, 64)
        assert all(ours < 1e-14 for ours, _ in errors(*drawn(0, *shapes, dtype=jnp.float64)))


@pytest.mark.parametrize("batch", [12, 7])
@pytest.mark.parametrize("parts", [1, 3, 12])
def test_winograd_in_parts_of_the_batch(batch: int, parts: int, monkeypatch) -> None:
    x, kernel, g = drawn(parts, (batch, 4, 4, 64), (3, 3, 64, 64), (batch, 4, 4, 64))
    monkeypatch.setattr(winograd, "CACHE", x.nbytes * 4 // parts)
    assert winograd._parts(x, kernel).shape[0] == (parts if batch % parts == 0 else batch)
    assert all(ours < 1e-6 for ours, _ in errors(x, kernel, g))


@pytest.mark.parametrize(
    ("shape", "channels", "dtype"),
    [
        ((1, 8, 8), (16, 64), jnp.float32),
        ((1, 7, 8), (64, 64), jnp.float32),
        ((1, 8, 7), (64, 64), jnp.float32),
        ((1, 8, 8), (64, 64), jnp.bfloat16),
    ],
)
def test_what_winograd_does_not_suit(shape, channels, dtype) -> None:
    """Expect correct results for few channels, odd sizes and low precision."""
    inputs, outputs = channels
    x, kernel, g = drawn(0, (*shape, inputs), (3, 3, *channels), (*shape, outputs), dtype=dtype)
    assert not winograd.suits(x, kernel)
    assert all(ours <= 1.01 * others for ours, others in errors(x, kernel, g))


def gradients_of_kernel(x, kernel, g):
    pulled = (jax.vjp(f, x, kernel)[1](g)[1] for f in (convolve, plain))
    return (np.asarray(gradient, np.float32) for gradient in pulled)


@pytest.mark.parametrize("batch", [12, 7])
@pytest.mark.parametrize("parts", [1, 3, 12])
def test_patches_in_parts_of_the_batch(batch: int, parts: int, monkeypatch) -> None:
    x, kernel, g = drawn(parts, (batch, 4, 4, 8), (3, 3, 8, 5), (batch, 4, 4, 5))
    monkeypatch.setattr(winograd, "CACHE", x.nbytes * 9 // parts)
    ours, wanted = gradients_of_kernel(x, kernel, g)
    assert np.allclose(ours, wanted, atol=1e-4)


def test_parts_add_up_in_float32(monkeypatch) -> None:
    """Sum ones. In bfloat16, 257 rounds to 256, so a sum image by image would stop there."""
    monkeypatch.setattr(winograd, "CACHE", 0)
    ones = (jnp.ones(shape, jnp.bfloat16) for shape in ((512, 1, 1, 8), (3, 3, 8, 1)))
    ours, _ = gradients_of_kernel(*ones, jnp.ones((512, 1, 1, 1), jnp.bfloat16))
    assert (ours[1, 1] == 512).all()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_plain_kernels_differentiate_in_forward_mode(norm: str) -> None:
    """Compare the derivative by x and by the parameters along a direction with differences."""
    with jax.enable_x64(True):
        network = ContextUnet((8, 8, 1), n_feat=8, norm=norm, kernels="plain", dtype=jnp.float64)
        variables = jax.tree.map(np.float64, random_variables(network))
        params = variables.pop("params")
        x, dx = drawn(0, (2, 8, 8, 1), (2, 8, 8, 1), dtype=jnp.float64)
        at, along = (x, params), (dx, jax.tree.map(np.cos, params))

        def apply(x, params):
            v = {"params": params, **variables}
            return network.apply(v, x, 0.5, train=True, mutable=["batch_stats"])[0]

        def moved(step):
            return apply(*jax.tree.map(lambda a, d: a + step * d, at, along))

        ahead, behind = map(jit(moved), (1e-6, -1e-6))
        differences = (ahead - behind) / 2e-6
        _, derivative = jit(lambda at, along: jax.jvp(apply, at, along))(at, along)
    assert np.linalg.norm(derivative - differences) < 1e-6 * np.linalg.norm(differences)


def test_plain_and_fast_norms_agree() -> None:
    x, g, scale, bias = drawn(0, (3, 4, 2, 5), (3, 4, 2, 5), (5,), (5,))

    def run(kernels, x, scale, bias):
        y, *moments = KERNELS[kernels].normalise(3 * x + 1, scale, bias, 1e-5, None)
        return jnp.vdot(y, g), moments

    grads = (jax.grad(partial(run, kernels), (0, 1, 2), has_aux=True) for kernels in KERNELS)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, *(grad(x, scale, bias) for grad in grads))
