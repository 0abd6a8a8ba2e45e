"""The vocabulary of the library: arrays by shape, a level of noise, a prediction, and one error."""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import (
    Any,
    NamedTuple,
    Protocol,
    SupportsFloat,
    TypeVar,
    get_args,
    get_origin,
    runtime_checkable,
)

import jax
from jaxtyping import Array, Float, UInt8

Image = Float[Array, "height width channel"]
Images = Float[Array, "batch height width channel"]
Pixels = UInt8[Array, "batch height width channel"]
Context = Float[Array, "batch feature"]
Variables = Any  # a Flax tree {"params": ..., "batch_stats": ...}
Key = jax.Array
Scalar = SupportsFloat  # a number of Python, NumPy or JAX

T = TypeVar("T")


class InputError(ValueError):
    """What a user gave is wrong. The message names it and says what would be right.

    The apps print the message as one line and exit with code 2; everything else is a bug and
    keeps its traceback.
    """


class RunWarning(UserWarning):
    """Something of a run is damaged or failed, and was passed over. The message names it."""


class Level(NamedTuple):
    """One level of noise: x_t = alpha x_0 + sigma eps.

    t is in schedule steps, 0 (clean) to T, and may be fractional. Scalars, or arrays that
    broadcast against a batch of images; of NumPy on the host, of JAX on the device.
    """

    t: Any
    alpha: Any
    sigma: Any


class Prediction(NamedTuple):
    """What a denoiser says of x at a level: clean image and noise, x = alpha x0 + sigma eps."""

    x0: Images
    eps: Images


@runtime_checkable
class Denoiser(Protocol):
    """A network, with whatever wraps it, as the samplers see it."""

    def __call__(self, x: Images, level: Level) -> Prediction:
        """Predict the clean image and the noise of a batch of images at one level."""
        ...


def choose(registry: Mapping[str, T], what: str, name: str) -> T:
    """Look a name up in a registry; raise InputError with the choices if it is not there."""
    if name not in registry:
        raise InputError(f"{what}={name!r} is unknown: choose from {', '.join(registry)}")
    return registry[name]


def require(holds: Any, message: str) -> None:
    """Raise InputError with the message unless it holds."""
    if not holds:
        raise InputError(message)


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return a seed as a Python int. Raises InputError unless it is a whole number in 0..2^32 - 1.

    Whole numbers of NumPy and JAX are accepted, as scalars.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise InputError(f"{name}={seed}: it must be a whole number") from None
    require(0 <= number < 2**32, f"{name}={number}: it must be in 0..{2**32 - 1}")
    return number


def options_of(make: Callable[..., Any]) -> dict[str, Any]:
    """The options of a sampler or a grid, which come after its two arguments, by their types."""
    parameters = list(inspect.signature(make).parameters.values())[2:]
    return {parameter.name: parameter.annotation for parameter in parameters}


def check_kind(option: str, value: Any, kind: Any) -> None:
    """Raise InputError unless an option has its type: a whole number may stand for a real one."""
    kinds = tuple(get_origin(one) or one for one in get_args(kind) or (kind,))
    wide = (*kinds, int) if float in kinds else kinds
    right = isinstance(value, wide) and (bool in kinds or not isinstance(value, bool))
    names = " or ".join(one.__name__ for one in kinds)
    require(right, f"{option}={value!r}: it must be of type {names}")
