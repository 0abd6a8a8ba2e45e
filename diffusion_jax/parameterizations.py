"""What the network predicts, and how a prediction reads as a clean image and a noise.

At a level, x = alpha x0 + sigma eps; each network output fixes both unknowns.
"""

from collections.abc import Callable
from typing import NamedTuple

from diffusion_jax.typing import Images, Level, Prediction


class Parameterization(NamedTuple):
    """decode(output, x, level) -> Prediction, and its inverse target(x0, eps, level) -> output."""

    decode: Callable[[Images, Images, Level], Prediction]
    target: Callable[[Images, Images, Level], Images]


def _decode_eps(output: Images, x: Images, level: Level) -> Prediction:
    return Prediction((x - level.sigma * output) / level.alpha, output)


def _decode_x0(output: Images, x: Images, level: Level) -> Prediction:
    return Prediction(output, (x - level.alpha * output) / level.sigma)


def _decode_v(output: Images, x: Images, level: Level) -> Prediction:
    return Prediction(
        level.alpha * x - level.sigma * output,
        level.sigma * x + level.alpha * output,
    )


PARAMETERIZATIONS: dict[str, Parameterization] = {
    # Ho et al. 2020, arXiv:2006.11239, eq. 14.
    "eps": Parameterization(_decode_eps, lambda x0, eps, level: eps),
    # Salimans and Ho 2022, arXiv:2202.00512, section 4; v = alpha eps - sigma x0.
    "x0": Parameterization(_decode_x0, lambda x0, eps, level: x0),
    "v": Parameterization(_decode_v, lambda x0, eps, level: level.alpha * eps - level.sigma * x0),
}
