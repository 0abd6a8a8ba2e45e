"""The precision in which a network computes. Its inputs and its parameters are in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion_jax.spec import choose


class Precision(NamedTuple):
    """The dtype of a network's maps, and the precision to which it may round float32 products."""

    dtype: DTypeLike
    products: str


# On GPUs, JAX rounds the factors of float32 products to TF32 by default. Here that is named tf32.
PRECISIONS = {
    "float32": Precision(jnp.float32, "highest"),
    "tf32": Precision(jnp.float32, "tensorfloat32"),
    "bfloat16": Precision(jnp.bfloat16, "default"),
}


def computing_in(network: Any, dtype: str) -> Any:
    """Return the network in a named precision. Raise InputError if the name is unknown."""
    return network.clone(dtype=choose(PRECISIONS, "dtype", dtype).dtype)


@contextmanager
def products_in(dtype: str) -> Iterator[None]:
    """Set the precision of the products in the with block. dtype: a name in PRECISIONS.

    On a CPU, tf32 is float32.
    """
    with jax.default_matmul_precision(choose(PRECISIONS, "dtype", dtype).products):
        yield
