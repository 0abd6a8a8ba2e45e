"""A trained network without its BatchNorms: each is one more linear map after a convolution."""

from typing import Any

import flax.traverse_util as traverse
import jax.numpy as jnp

from diffusion_jax.networks.blocks import BatchNorm
from diffusion_jax.typing import Variables


def fold_batch_norm(network: Any, variables: Variables) -> tuple[Any, Variables]:
    """The network that computes the same, out of training, with its BatchNorms in its kernels.

    With the running mean m and variance v, a BatchNorm after a convolution with kernel k and bias
    b is the convolution with kernel f k and bias f (b - m) + bias, f = scale / sqrt(v + epsilon).
    A network without BatchNorm is returned as it is. It may be traced.
    """
    if getattr(network, "norm", None) != "batch":
        return network, variables
    params = traverse.flatten_dict(variables["params"])
    norms = sorted({path[:-1] for path in traverse.flatten_dict(variables["batch_stats"])})
    stats = traverse.flatten_dict(variables["batch_stats"])
    for norm in norms:
        *place, name = norm
        conv = (*place, name.removesuffix("_1") + "_0")  # conv1_1 follows conv1_0
        scale, shift = params.pop((*norm, "scale")), params.pop((*norm, "bias"))
        factor = scale / jnp.sqrt(stats[*norm, "var"] + BatchNorm.epsilon)
        centred = params[*conv, "bias"] - stats[*norm, "mean"]
        params[*conv, "kernel"] = params[*conv, "kernel"] * factor.reshape(1, 1, 1, -1)
        params[*conv, "bias"] = centred * factor + shift
    return network.clone(norm="none"), {"params": traverse.unflatten_dict(params)}
