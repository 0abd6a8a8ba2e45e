"""What a network predicts: a x0 + b eps, with factors a and b that depend on the level.

At each level x = alpha x0 + sigma eps, so that x and the output determine both x0 and eps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from diffusion_jax import spec
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, Level, Prediction, require

Values = Any  # numbers, or JAX or NumPy arrays: the formulas hold for all of them


@dataclass(frozen=True)
class Parameterization:
    """The meaning of a network's output. A subclass defines its factors."""

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return (a, b): the network learns the target a x0 + b eps."""
        raise NotImplementedError

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return the output that stands for a clean image and a noise."""
        a, b = self.factors(level)
        return a * x0 + b * eps

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return the clean image and the noise that an output stands for."""
        a, b = self.factors(level)
        determinant = level.alpha * b - level.sigma * a
        return Prediction(
            (b * x - level.sigma * output) / determinant,
            (level.alpha * output - a * x) / determinant,
        )

    def size(self, level: Level) -> Values:
        """Return the standard deviation of x_t for data of unit variance, but at least 1."""
        size = (level.alpha**2 + level.sigma**2) ** 0.5
        return jnp.where(size < 1 + 1e-5, 1, size)  # exactly 1 on variance preserving schedules

    def network_input(self, x: Values, level: Level) -> Values:
        """Return the network's input: x, scaled to about unit size at every level."""
        return x / self.size(level)


@dataclass(frozen=True)
class Eps(Parameterization):
    """The noise eps: Ho et al. 2020, arXiv:2006.11239, eq. 14."""

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return (0, 1)."""
        return 0.0, 1.0


@dataclass(frozen=True)
class X0(Parameterization):
    """The clean image x0."""

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return (1, 0)."""
        return 1.0, 0.0


@dataclass(frozen=True)
class V(Parameterization):
    """v = alpha eps - sigma x0: Salimans and Ho 2022, arXiv:2202.00512, section 4."""

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return (-sigma, alpha)."""
        return -level.sigma, level.alpha


@dataclass(frozen=True)
class Score(Parameterization):
    """The gradient of log p_t, which is -eps / sigma: Song et al. 2020, arXiv:2011.13456."""

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return (0, -1 / sigma)."""
        return 0.0, -1 / level.sigma


@dataclass(frozen=True)
class Flow(Parameterization):
    """The velocity eps - x0 of a straight path: Liu et al. 2022, arXiv:2209.03003, eq. 1."""

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return (-1, 1)."""
        return -1.0, 1.0


@dataclass(frozen=True)
class Edm(Parameterization):
    """EDM's preconditioned output: Karras et al. 2022, arXiv:2206.00364, table 1.

    Let y = x / alpha and r = sigma / alpha. Then x0 = c_skip(r) y + c_out(r) output, and the input
    of the network is c_in(r) y. sigma_data: the standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        """Raise InputError unless sigma_data is positive and finite."""
        require(0 < self.sigma_data < 1e6, f"sigma_data={self.sigma_data}: it must be above 0")

    def factors(self, level: Level) -> tuple[Values, Values]:
        """Return the factors of (x0 - c_skip y) / c_out."""
        size = self.size(level)
        return level.sigma / (self.sigma_data * size), -level.alpha * self.sigma_data / size

    def size(self, level: Level) -> Values:
        """Return the standard deviation of x_t for data of standard deviation sigma_data."""
        return (level.sigma**2 + (level.alpha * self.sigma_data) ** 2) ** 0.5


PREDICTIONS: dict[str, Callable[..., Parameterization]] = {
    "eps": Eps,
    "x0": X0,
    "v": V,
    "score": Score,
    "flow": Flow,
    "edm": Edm,
}
NOISE = Level(1.0, 0.0, 1.0)  # the level without any signal


def build(text: str) -> Parameterization:
    """Return the parameterization that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, PREDICTIONS, "prediction")


def fits(prediction: Parameterization, schedule: NoiseSchedule) -> bool:
    """Return whether the output determines x0 at every level, also where alpha is 0."""
    return bool(schedule.alpha[-1] > 0 or prediction.factors(NOISE)[0] != 0)


def check(prediction: Parameterization, schedule: NoiseSchedule) -> None:
    """Raise InputError if networks with this prediction cannot sample on the schedule."""
    able = [name for name, each in PREDICTIONS.items() if fits(each(), schedule)]
    if not fits(prediction, schedule):
        raise InputError(
            f"prediction={type(prediction).__name__.lower()} on a schedule that ends in pure "
            "noise: it does not determine x0 where alpha is 0; "
            f"choose from {', '.join(able)}"
        )
