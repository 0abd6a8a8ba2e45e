"""Shared types of the library: array shapes, noise levels, predictions, an error and a warning."""

import importlib
import operator
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import jax
from jaxtyping import Array, Float, UInt8

Image = Float[Array, "height width channel"]
Images = Float[Array, "batch height width channel"]
Pixels = UInt8[Array, "batch height width channel"]
Context = Float[Array, "batch feature"]
Variables = Any  # a Flax tree {"params": ..., "batch_stats": ...}
Key = jax.Array
Scalar = SupportsFloat  # a Python, NumPy or JAX number


class InputError(ValueError):
    """An error in the user's input. The message names the value and says what would be right.

    The apps print the message on one line and exit with code 2. Any other exception is a bug and
    keeps its traceback.
    """


class RunWarning(UserWarning):
    """A warning that part of a run is damaged or failed and was skipped. The message names it."""


class Level(NamedTuple):
    """One level of noise: x_t = alpha x_0 + sigma eps.

    t counts schedule steps from 0 (clean) to T, and may be fractional. The fields are scalars, or
    arrays that broadcast against a batch of images: NumPy on the host, JAX on the device.
    """

    t: Any
    alpha: Any
    sigma: Any


class Prediction(NamedTuple):
    """A denoiser's estimate of the clean image and the noise in x = alpha x0 + sigma eps."""

    x0: Images
    eps: Images


@runtime_checkable
class Denoiser(Protocol):
    """The function that a sampler calls: a network together with whatever wraps it."""

    def __call__(self, x: Images, level: Level) -> Prediction:
        """Predict the clean image and the noise of a batch of images at one level."""
        ...


def require(holds: Any, message: str) -> None:
    """Raise InputError with this message unless `holds` is true."""
    if not holds:
        raise InputError(message)


def import_extra(name: str, extra: str) -> Any:
    """Import an optional module. Raise InputError naming the extra that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        library = name.split(".")[0]
        message = f"{library} is not installed: pip install '.[{extra}]'"
        raise InputError(message) from None


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return a seed as a Python int. Raise InputError unless it is a whole number in 0..2^32 - 1.

    Integer scalars of NumPy and JAX are accepted.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise InputError(f"{name}={seed}: it must be a whole number") from None
    require(0 <= number < 2**32, f"{name}={number}: it must be in 0..{2**32 - 1}")
    return number
