"""What the network predicts, and how a prediction reads as a clean image and a noise.

At a level, x = alpha x0 + sigma eps; each network output fixes both unknowns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, Level, Prediction, choose

Values = Any  # Images, or their like in NumPy: what follows is arithmetic for either


def _size(level: Level) -> Any:
    """The standard deviation of x_t, for data of standard deviation 1, where it is above 1."""
    size = (level.alpha**2 + level.sigma**2) ** 0.5
    return jnp.where(size < 1 + 1e-5, 1, size)  # 1 on variance preserving schedules, not nearly 1


class Parameterization(NamedTuple):
    """decode(output, x, level) -> Prediction, and its inverse target(x0, eps, level) -> output.

    needs_signal: decode divides by alpha, so that it cannot start from pure noise.
    size: what x is divided by before the network sees it.
    """

    decode: Callable[[Values, Values, Level], Prediction]
    target: Callable[[Values, Values, Level], Values]
    needs_signal: bool = False
    size: Callable[[Level], Any] = _size

    def network_input(self, x: Values, level: Level) -> Values:
        """x as the network sees it: of about unit size at every level."""
        return x / self.size(level)


def _decode_eps(output: Values, x: Values, level: Level) -> Prediction:
    return Prediction((x - level.sigma * output) / level.alpha, output)


def _decode_x0(output: Values, x: Values, level: Level) -> Prediction:
    return Prediction(output, (x - level.alpha * output) / level.sigma)


def _decode_v(output: Values, x: Values, level: Level) -> Prediction:
    square = level.alpha**2 + level.sigma**2
    return Prediction(
        (level.alpha * x - level.sigma * output) / square,
        (level.sigma * x + level.alpha * output) / square,
    )


def _decode_score(output: Values, x: Values, level: Level) -> Prediction:
    return Prediction((x + level.sigma**2 * output) / level.alpha, -level.sigma * output)


def _decode_flow(output: Values, x: Values, level: Level) -> Prediction:
    total = level.alpha + level.sigma
    return Prediction((x - level.sigma * output) / total, (x + level.alpha * output) / total)


SIGMA_DATA = 0.5  # EDM's standard deviation of the data


def _edm_norm(level: Level) -> Any:
    """The standard deviation of x_t, for data of standard deviation SIGMA_DATA."""
    return (level.sigma**2 + (level.alpha * SIGMA_DATA) ** 2) ** 0.5


def _decode_edm(output: Values, x: Values, level: Level) -> Prediction:
    norm = _edm_norm(level)
    scaled, output = x / norm, output * SIGMA_DATA
    x0 = level.alpha * SIGMA_DATA**2 / norm * scaled + level.sigma / norm * output
    eps = level.sigma / norm * scaled - level.alpha / norm * output
    return Prediction(x0, eps)


def _target_edm(x0: Values, eps: Values, level: Level) -> Values:
    norm = _edm_norm(level)
    return level.sigma / (SIGMA_DATA * norm) * x0 - level.alpha * SIGMA_DATA / norm * eps


PARAMETERIZATIONS: dict[str, Parameterization] = {
    # Ho et al. 2020, arXiv:2006.11239, eq. 14.
    "eps": Parameterization(_decode_eps, lambda x0, eps, level: eps, needs_signal=True),
    "x0": Parameterization(_decode_x0, lambda x0, eps, level: x0),
    # Salimans and Ho 2022, arXiv:2202.00512, section 4; v = alpha eps - sigma x0.
    "v": Parameterization(_decode_v, lambda x0, eps, level: level.alpha * eps - level.sigma * x0),
    # Song et al. 2020, arXiv:2011.13456: the gradient of log p_t, which is -eps / sigma.
    "score": Parameterization(
        _decode_score, lambda x0, eps, level: -eps / level.sigma, needs_signal=True
    ),
    # Liu et al. 2022, arXiv:2209.03003, eq. 1: the velocity of a straight path, eps - x0.
    "flow": Parameterization(_decode_flow, lambda x0, eps, level: eps - x0),
    # Karras et al. 2022, arXiv:2206.00364, table 1, in y = x / alpha and r = sigma / alpha:
    # x0 = c_skip(r) y + c_out(r) output, where the network sees c_in(r) y.
    "edm": Parameterization(_decode_edm, _target_edm, size=_edm_norm),
}


def check(name: str, schedule: NoiseSchedule) -> None:
    """Raise InputError if networks of this parameterization cannot sample on the schedule."""
    chosen = choose(PARAMETERIZATIONS, "parameterization", name)
    if chosen.needs_signal and schedule.alpha[-1] == 0:
        able = [other for other, each in PARAMETERIZATIONS.items() if not each.needs_signal]
        raise InputError(
            f"parameterization={name!r} on a schedule that ends in pure noise: it says nothing of "
            f"x0 where alpha is 0; choose from {', '.join(able)}"
        )
