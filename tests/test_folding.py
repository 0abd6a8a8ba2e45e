"""A network whose BatchNorms are folded away computes the same outputs outside of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import ContextUnet
from tests.test_networks import jit


def random_variables(network: ContextUnet) -> dict:
    """Return variables without default values: scales and variances lie in 0.5 to 2."""
    x = jnp.zeros((1, *network.image_shape))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(()))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        low, high = (0.5, 2) if kind in ("scale", "var") else (-0.3, 0.3)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("shortcut", ["conv", "none"])
def test_the_folded_network_computes_the_same(shortcut: str) -> None:
    network = ContextUnet((8, 8, 3), n_feat=8, shortcut=shortcut)
    variables = random_variables(network)
    folded, fewer = network.for_sampling(variables)
    assert fewer.keys() == {"params"}
    assert folded.norm == "none"
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    context = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    expected = jit(network.apply)(variables, x, jnp.float32(0.3), context)
    ours = jit(folded.apply)(fewer, x, jnp.float32(0.3), context)
    assert np.abs(expected).max() > 0.1
    assert np.allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    ones = jax.tree.map(jnp.ones_like, variables["batch_stats"])
    unfolded = jit(network.apply)({**variables, "batch_stats": ones}, x, jnp.float32(0.3), context)
    assert np.abs(unfolded - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_network_without_batch_norm_stays() -> None:
    network = ContextUnet((8, 8, 3), n_feat=8, norm="group")
    variables = random_variables(network)
    assert network.for_sampling(variables) == (network, variables)
