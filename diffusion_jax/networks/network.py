"""The base class of networks: fields that depend on the data, checks of inputs, initialisation."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args, get_origin

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from diffusion_jax.typing import InputError, Variables, require

MOST = 4096  # the limit of every count: larger networks do not fit in memory


class Network(nn.Module):
    """The base class of networks, which are functions (variables, x, t, context) -> prediction.

    Attributes:
        image_shape: height, width and channels of the images.
        n_cfeat: length of a context vector.
        axis_name: the mapped axis over which BatchNorm takes its statistics in training.
        dtype: dtype of the computation; parameters, norms and statistics are in float32.
        kernels: "fast" for CPU kernels written by hand; or "plain", which also supports
            forward-mode differentiation.

    Raises:
        InputError: if a field, or the shape or dtype of an input, is invalid.
    """

    image_shape: tuple[int, int, int] = (16, 16, 3)
    n_cfeat: int = 5
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32
    kernels: Literal["fast", "plain"] = "fast"

    def __post_init__(self) -> None:
        """Raise InputError if a field is invalid, before anything is traced."""
        for field in dataclasses.fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise InputError(f"{field.name}={value!r}: give one of {', '.join(choices)}")
        fits = len(self.image_shape) == 3
        require(fits, f"image_shape={self.image_shape}: give height, width and channels")
        check_count("n_cfeat", self.n_cfeat)
        check_count("in_channels", self.image_shape[2])
        super().__post_init__()

    def for_sampling(self, variables: Variables) -> tuple[Any, Variables]:
        """Return a network and its variables that compute the same outside training, but faster.

        By default, these are the network itself and the variables.
        """
        return self, variables

    def check_inputs(self, x: Array, t: ArrayLike, context: Array | None) -> None:
        """Raise InputError unless x, t and context have valid shapes and dtypes."""
        image = ", ".join(map(str, self.image_shape))
        fits = x.ndim == 4 and x.shape[1:] == self.image_shape
        require(fits, f"x has shape {x.shape}: give (batch, {image})")
        batch = x.shape[0]
        for name, value in (("x", x), ("t", t)):
            dtype = jnp.result_type(value)
            floats = jnp.issubdtype(dtype, jnp.floating)
            require(floats, f"{name} is of {dtype}: give floats (t is the step / steps)")
        fits = jnp.shape(t) in ((), (batch,))
        require(fits, f"t has shape {jnp.shape(t)}: give a scalar or ({batch},)")
        if context is not None and context.shape != (batch, self.n_cfeat):
            wanted = (batch, self.n_cfeat)
            raise InputError(f"context has shape {context.shape}: give {wanted}, or None")

    def rows(
        self, t: ArrayLike, context: Array | None
    ) -> tuple[Float[Array, "times 1"], Float[Array, "contexts feature"]]:
        """Return time and context as rows: one row if all images share it. None becomes zeros."""
        no_context = jnp.zeros((1, self.n_cfeat), self.dtype)
        return jnp.asarray(t).reshape(-1, 1), no_context if context is None else context


def check_count(name: str, value: Any, multiple: int = 1, least: int = 1, advice: str = "") -> None:
    """Raise InputError unless value is a whole multiple of `multiple`, from `least` to MOST."""
    if isinstance(value, int) and value > MOST:
        raise InputError(f"{name}={value}: it must be at most {MOST}")
    fits = isinstance(value, int) and value % multiple == 0 and value >= least
    of = f"a multiple of {multiple}" if multiple > 1 else "an integer"
    require(fits, f"{name}={value!r}: give {of} from {max(multiple, least)} up{advice}")


def check_image_size(image_shape: tuple[int, int, int], multiple: int, least: int = 1) -> None:
    """Raise InputError unless height and width are multiples of `multiple` and at least `least`."""
    for name, value in zip(("height", "width"), image_shape, strict=False):
        check_count(name, value, multiple, least, "; the data option size=N scales images to it")


def variable_shapes(network: Network) -> Any:
    """Return the shapes of a network's variables, which are needed to read a checkpoint."""
    with jax.enable_x64(False):
        return jax.eval_shape(partial(init_network, network), 0)


def init_variables(network: Network, seed: int) -> Variables:
    """Return a network's initial variables."""
    return compiled_once(partial(init_network, network))(seed)


def init_network(network: Network, seed: Any) -> Variables:
    """Return a network's initial variables. The seed may be traced."""
    x = jnp.zeros((1, *network.image_shape))
    return network.init(jax.random.key(seed), x, jnp.zeros(()))


def compiled_once(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function of a number, compiled for a single run in float32.

    Compilation is fast because it does not optimise.
    """

    def run(number: Any) -> Any:
        with jax.enable_x64(False):
            return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(number)

    return run
