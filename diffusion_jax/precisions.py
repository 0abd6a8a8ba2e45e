"""The precision in which a network computes; what it is given and what it keeps are in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion_jax.typing import choose


class Precision(NamedTuple):
    """The type of a network's maps, and what products of float32 may be rounded to."""

    dtype: DTypeLike
    products: str


# By default, JAX rounds the factors of float32 products on GPUs to TF32: here that has its name.
PRECISIONS = {
    "float32": Precision(jnp.float32, "highest"),
    "tf32": Precision(jnp.float32, "tensorfloat32"),
    "bfloat16": Precision(jnp.bfloat16, "default"),
}


def computing_in(network: Any, dtype: str) -> Any:
    """The network, computing in a named precision. Raises InputError for an unknown name."""
    return network.clone(dtype=choose(PRECISIONS, "dtype", dtype).dtype)


@contextmanager
def products_in(dtype: str) -> Iterator[None]:
    """What is traced here takes its products in a named precision; on a CPU tf32 is float32."""
    with jax.default_matmul_precision(choose(PRECISIONS, "dtype", dtype).products):
        yield
