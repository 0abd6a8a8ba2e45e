"""Losses: the distance of outputs from targets, the weight of each level, how often it is drawn.

Training minimises w[t] distance(output, target), with t drawn from 1..T. The weighting and the
sampling of times both decide how much a level counts; neither corrects for the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key
from numpy import ndarray

from diffusion_jax import spec
from diffusion_jax.diffusion.predictions import Parameterization
from diffusion_jax.diffusion.schedules import NoiseSchedule, variance_preserving
from diffusion_jax.typing import Images, InputError, Level, require

Weighting: TypeAlias = Callable[..., ndarray]
Draw: TypeAlias = Callable[[Key[Array, ""]], Int[Array, ""]]
Times: TypeAlias = Callable[..., Draw]


def simple(snr: ndarray, gain: ndarray) -> ndarray:
    """The same weight at every level: DDPM's simple loss, arXiv:2006.11239, eq. 14.

    It weights the error of the network's output, whatever the network predicts.
    """
    return np.ones_like(snr)


def min_snr(snr: ndarray, gain: ndarray, gamma: float = 5.0) -> ndarray:
    """Min-SNR: |x0 error|^2 has weight min(SNR, gamma): Hang et al. 2023, arXiv:2303.09556.

    Where the SNR is 0 the weight is 1, as in the authors' code. The weight is discontinuous there:
    levels near pure noise have the small weight SNR.
    """
    _check_gamma(gamma)
    return gain * np.where(snr > 0, np.minimum(snr, gamma), 1)


def p2(snr: ndarray, gain: ndarray, gamma: float = 1.0) -> ndarray:
    """P2: |eps error|^2 has weight (1 + SNR)^-gamma: Choi et al. 2022, arXiv:2204.00227; k = 1.

    Where the SNR is 0, an error of eps does not affect x0. There |x0 error|^2 has weight 1, as in
    min_snr.
    """
    _check_gamma(gamma)
    return gain * np.where(snr > 0, snr / (1 + snr) ** gamma, 1)


def edm(snr: ndarray, gain: ndarray, sigma_data: float = 0.5) -> ndarray:
    """EDM: |x0 error|^2 has weight SNR + 1 / sigma_data^2: arXiv:2206.00364, table 1.

    The weight is 1 if the network predicts EDM's output. See Karras et al. 2022.
    """
    require(0 < sigma_data < 1e6, f"sigma_data={sigma_data}: it must be above 0")
    return gain * (snr + 1 / sigma_data**2)


# A weighting returns the weight of the output's squared error at each level.
# snr: (alpha / sigma)^2, which is 0 where alpha is 0. gain: the squared error of x0 divided by that
# of the output. So |x0 error|^2 = gain |output error|^2, and |eps error|^2 = snr |x0 error|^2.
WEIGHTINGS: dict[str, Weighting] = {"simple": simple, "min_snr": min_snr, "p2": p2, "edm": edm}


def uniform(schedule: NoiseSchedule) -> Draw:
    """Every level of 1..T with the same probability: DDPM, arXiv:2006.11239, algorithm 1."""
    return lambda key: jax.random.randint(key, (), 1, schedule.steps + 1)


def lognormal(schedule: NoiseSchedule, mean: float = -1.2, deviation: float = 1.2) -> Draw:
    """Levels drawn so that log(sigma / alpha) is normal: EDM, arXiv:2206.00364, table 1.

    The loss is not divided by the probabilities. As in EDM, levels that are drawn more often count
    more.
    """
    below = np.cumsum(lognormal_probabilities(schedule, mean, deviation)[1:-1])
    bounds = jnp.asarray(below, jnp.float32)

    def draw(key: Key[Array, ""]) -> Int[Array, ""]:
        place = jax.random.uniform(key)
        return 1 + jnp.sum(place >= bounds, dtype=jnp.int32)

    return draw


def lognormal_probabilities(
    schedule: NoiseSchedule, mean: float = -1.2, deviation: float = 1.2
) -> Float64[ndarray, "levels"]:
    """Return the probability of each level if log(sigma / alpha) is normal; 0 at level 0.

    mean and deviation: P_mean and P_std of EDM. A level has the probability of all values between
    the half steps around it. The first and the last level also have that of the values beyond them.
    """
    require(abs(mean) < 1e3, f"mean={mean}: it must be finite")
    require(0 < deviation < 1e3, f"deviation={deviation}: it must be above 0")
    half = schedule.level(np.arange(1, schedule.steps) + 0.5)
    z = (np.log(half.sigma / half.alpha) - mean) / deviation
    below = [0.5 * math.erfc(-each / math.sqrt(2)) for each in z]
    return np.append(0.0, np.diff([0.0, *below, 1.0]))


TIMES: dict[str, Times] = {"uniform": uniform, "lognormal": lognormal}

Noising: TypeAlias = Literal["ddpm", "course"]


@dataclass(frozen=True)
class Loss:
    """The training loss: the mean of weight * distance(output - target).

    distance: a function of the error of each pixel.
    weighting, times: entries of WEIGHTINGS and TIMES, with their options bound.
    noising: "ddpm" is Ho et al. 2020 (arXiv:2006.11239), eq. 4; "course" scales the noise by 1 -
    alpha_bar instead of its square root.
    """

    distance: Callable[[Images], Images]
    weighting: Weighting
    times: Times
    noising: Noising

    def __call__(
        self, output: Images, target: Images, weight: Float[Array, "batch"]
    ) -> Float[Array, ""]:
        """Return the mean over batch, pixels and channels. weight: the weight of each image."""
        return jnp.mean(weight[:, None, None, None] * self.distance(output - target))

    def noised(self, x0: Images, eps: Images, level: Level) -> Images:
        """Return the noisy images x_t."""
        sigma = level.sigma if self.noising == "ddpm" else level.sigma**2
        return level.alpha * x0 + sigma * eps

    def weights(
        self, prediction: Parameterization, schedule: NoiseSchedule
    ) -> Float64[ndarray, "levels"]:
        """Return the weight of the error of a network's output at levels 0..T; it is 0 at level 0.

        Raise InputError if a weight is not finite in float32.
        """
        one = np.ones(schedule.steps)
        level = Level(None, schedule.alpha[1:], schedule.sigma[1:])
        with np.errstate(all="ignore"):  # weights that are not finite are refused below
            gain = np.square(prediction.decode(one, 0 * one, level).x0)
            table = self.weighting(1 / schedule.ratio[1:] ** 2, gain)
            fits = np.all(np.isfinite(table.astype(np.float32)))
        if not fits:
            raise InputError(
                "loss: the weights of this weighting and prediction are not finite in float32 on "
                "this schedule; choose prediction=v or x0, or a schedule with less noise"
            )
        return np.append(0.0, table)

    def check(self, prediction: Parameterization, schedule: NoiseSchedule) -> None:
        """Raise InputError unless the loss can train this prediction on this schedule."""
        require(
            self.noising == "ddpm" or schedule.alpha_at is variance_preserving,
            "loss: noising=course needs a variance preserving schedule",
        )
        self.weights(prediction, schedule)


def mse(
    weighting: Annotated[Weighting, WEIGHTINGS] = simple,
    times: Annotated[Times, TIMES] = uniform,
    noising: Noising = "ddpm",
) -> Loss:
    """Mean squared error; by default, DDPM's simple loss (arXiv:2006.11239, eq. 14)."""
    return Loss(jnp.square, weighting, times, noising)


def huber(
    c: float = 0.03,
    weighting: Annotated[Weighting, WEIGHTINGS] = simple,
    times: Annotated[Times, TIMES] = uniform,
    noising: Noising = "ddpm",
) -> Loss:
    """Pseudo-Huber loss: Song and Dhariwal 2023, arXiv:2310.14189, section 3.3.

    It is sqrt(d^2 + c^2) - c of each pixel, where d = output - target. In the paper, d is the norm
    of a whole image.
    """
    require(0 < c < 1e6, f"c={c}: it must be above 0")
    return Loss(lambda d: jnp.sqrt(d**2 + c**2) - c, weighting, times, noising)


LOSSES: dict[str, Callable[..., Loss]] = {"mse": mse, "huber": huber}


def build(text: str) -> Loss:
    """Return the loss that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, LOSSES, "loss")


def _check_gamma(gamma: float) -> None:
    require(0 < gamma < 1e6, f"gamma={gamma}: it must be above 0")
