"""What a network predicts, and how its output is converted to a clean image and a noise.

At each level x = alpha x0 + sigma eps, so that x and the output determine both x0 and eps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from diffusion_jax import spec
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, Level, Prediction, require

Values = Any  # JAX or NumPy arrays: the formulas hold for both


@dataclass(frozen=True)
class Parameterization:
    """The meaning of a network's output: decode converts it, and target is the inverse.

    The network learns the target. needs_signal: whether decode divides by alpha, so that it cannot
    start from pure noise.
    """

    needs_signal: ClassVar[bool] = False

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return the clean image and the noise that an output stands for."""
        raise NotImplementedError

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return the output that stands for a clean image and a noise."""
        raise NotImplementedError

    def size(self, level: Level) -> Any:
        """Return the standard deviation of x_t for data of unit variance, but at least 1."""
        size = (level.alpha**2 + level.sigma**2) ** 0.5
        return jnp.where(size < 1 + 1e-5, 1, size)  # exactly 1 on variance preserving schedules

    def network_input(self, x: Values, level: Level) -> Values:
        """Return the network's input: x, scaled to about unit size at every level."""
        return x / self.size(level)


@dataclass(frozen=True)
class Eps(Parameterization):
    """The noise eps: Ho et al. 2020, arXiv:2006.11239, eq. 14."""

    needs_signal: ClassVar[bool] = True

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return ((x - sigma output) / alpha, output)."""
        return Prediction((x - level.sigma * output) / level.alpha, output)

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return eps."""
        return eps


@dataclass(frozen=True)
class X0(Parameterization):
    """The clean image x0."""

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return (output, (x - alpha output) / sigma)."""
        return Prediction(output, (x - level.alpha * output) / level.sigma)

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return x0."""
        return x0


@dataclass(frozen=True)
class V(Parameterization):
    """v = alpha eps - sigma x0: Salimans and Ho 2022, arXiv:2202.00512, section 4."""

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return (alpha x - sigma v, sigma x + alpha v) / (alpha^2 + sigma^2)."""
        square = level.alpha**2 + level.sigma**2
        return Prediction(
            (level.alpha * x - level.sigma * output) / square,
            (level.sigma * x + level.alpha * output) / square,
        )

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return alpha eps - sigma x0."""
        return level.alpha * eps - level.sigma * x0


@dataclass(frozen=True)
class Score(Parameterization):
    """The gradient of log p_t, which is -eps / sigma: Song et al. 2020, arXiv:2011.13456."""

    needs_signal: ClassVar[bool] = True

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return ((x + sigma^2 score) / alpha, -sigma score)."""
        return Prediction((x + level.sigma**2 * output) / level.alpha, -level.sigma * output)

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return -eps / sigma."""
        return -eps / level.sigma


@dataclass(frozen=True)
class Flow(Parameterization):
    """The velocity eps - x0 of a straight path: Liu et al. 2022, arXiv:2209.03003, eq. 1."""

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return (x - sigma output, x + alpha output) / (alpha + sigma)."""
        total = level.alpha + level.sigma
        return Prediction((x - level.sigma * output) / total, (x + level.alpha * output) / total)

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return eps - x0."""
        return eps - x0


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

    def size(self, level: Level) -> Any:
        """Return the standard deviation of x_t for data of standard deviation sigma_data."""
        return (level.sigma**2 + (level.alpha * self.sigma_data) ** 2) ** 0.5

    def decode(self, output: Values, x: Values, level: Level) -> Prediction:
        """Return c_skip y + c_out output, and the noise that belongs to it."""
        norm = self.size(level)
        scaled, output = x / norm, output * self.sigma_data
        x0 = level.alpha * self.sigma_data**2 / norm * scaled + level.sigma / norm * output
        eps = level.sigma / norm * scaled - level.alpha / norm * output
        return Prediction(x0, eps)

    def target(self, x0: Values, eps: Values, level: Level) -> Values:
        """Return (x0 - c_skip y) / c_out."""
        norm = self.size(level)
        image = level.sigma / (self.sigma_data * norm) * x0
        return image - level.alpha * self.sigma_data / norm * eps


PREDICTIONS: dict[str, Callable[..., Parameterization]] = {
    "eps": Eps,
    "x0": X0,
    "v": V,
    "score": Score,
    "flow": Flow,
    "edm": Edm,
}


def build(text: str) -> Parameterization:
    """Return the parameterization that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, PREDICTIONS, "prediction")


def check(prediction: Parameterization, schedule: NoiseSchedule) -> None:
    """Raise InputError if networks with this prediction cannot sample on the schedule."""
    if prediction.needs_signal and schedule.alpha[-1] == 0:
        able = [name for name, each in PREDICTIONS.items() if not each().needs_signal]
        raise InputError(
            f"prediction={type(prediction).__name__.lower()} on a schedule that ends in pure "
            "noise: it does not determine x0 where alpha is 0; "
            f"choose from {', '.join(able)}"
        )
