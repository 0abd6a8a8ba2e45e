"""Noising, the training loss, how it weighs the levels, and how often it visits them.

A network is trained on w[t] |output - target|^2, with t drawn from 1..T. Weightings and time
samplings both say how much a level counts; neither corrects for the other.
"""

import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key
from numpy import ndarray

from diffusion_jax.parameterizations import PARAMETERIZATIONS, SIGMA_DATA
from diffusion_jax.schedules import NoiseSchedule, variance_preserving
from diffusion_jax.typing import Images, InputError, Level, choose, require

# x_t of a clean image and a noise. "ddpm" is Ho et al. 2020 (arXiv:2006.11239), eq. 4; the course
# notes scale the noise by 1 - alpha_bar where its square root is due.
NOISINGS: dict[str, Callable[[Images, Images, Level], Images]] = {
    "ddpm": lambda x0, eps, level: level.alpha * x0 + level.sigma * eps,
    "notes": lambda x0, eps, level: level.alpha * x0 + level.sigma**2 * eps,
}


def check_noising(name: str, schedule: NoiseSchedule) -> None:
    """Raise InputError if noise cannot be added in this way on the schedule."""
    choose(NOISINGS, "noising", name)
    require(
        name != "notes" or schedule.alpha_at is variance_preserving,
        f"noising={name!r}: it scales the noise by 1 - alpha_bar, which other schedules than the "
        "variance preserving ones do not have; take ddpm",
    )


def mean_squared_error(
    output: Images, target: Images, weight: float | Float[Array, "batch"] = 1.0
) -> Float[Array, ""]:
    """DDPM's simple loss (arXiv:2006.11239, eq. 14): the mean over batch, pixels and channels.

    weight: of each image; 1 is the simple loss.
    """
    if not isinstance(weight, float):
        weight = weight[:, None, None, None]
    return jnp.mean(weight * (output - target) ** 2)


def simple(snr: ndarray, gain: ndarray) -> ndarray:
    """DDPM's simple loss, of whatever the network predicts: all levels count the same."""
    return np.ones_like(snr)


def min_snr(snr: ndarray, gain: ndarray, gamma: float = 5.0) -> ndarray:
    """Hang et al. 2023, arXiv:2303.09556: min(SNR, gamma) |x0 error|^2.

    Where the SNR is 0 the weight is 1, as in the authors' code. It is discontinuous there: levels
    near pure noise weigh as little as their SNR.
    """
    return gain * np.where(snr > 0, np.minimum(snr, gamma), 1)


def p2(snr: ndarray, gain: ndarray, gamma: float = 1.0) -> ndarray:
    """Choi et al. 2022, arXiv:2204.00227, with k = 1: |eps error|^2 / (1 + SNR)^gamma.

    Where the SNR is 0 an error of eps says nothing of x0: the weight of |x0 error|^2 is 1 there, as
    in min_snr.
    """
    return gain * np.where(snr > 0, snr / (1 + snr) ** gamma, 1)


def edm(snr: ndarray, gain: ndarray) -> ndarray:
    """Karras et al. 2022, arXiv:2206.00364, table 1: (1 / r^2 + 1 / sigma_data^2) |x0 error|^2.

    r = sigma / alpha. It is 1 where the network predicts what EDM's does.
    """
    return gain * (snr + 1 / SIGMA_DATA**2)


# The weight of an output's squared error. snr: (alpha / sigma)^2, 0 where alpha is 0; gain: the
# squared error of x0 for each one of the output, so that |x0 error|^2 weighs gain and
# |eps error|^2 = snr |x0 error|^2 weighs gain * snr.
WEIGHTINGS: dict[str, Callable[..., ndarray]] = {
    "simple": simple,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
}


def weights(
    name: str, parameterization: str, schedule: NoiseSchedule, gamma: float = 0.0
) -> Float64[ndarray, "levels"]:
    """The weight of the squared error of a network's output at levels 0..T; 0 at level 0.

    gamma: of the weightings that have one; 0 takes the paper's.
    Raises InputError for a gamma that is not taken, and for weights that float32 cannot hold.
    """
    weigh = choose(WEIGHTINGS, "loss_weighting", name)
    takes_gamma = "gamma" in inspect.signature(weigh).parameters
    require(takes_gamma or not gamma, f"weighting_gamma={gamma}: {name} takes none, leave it at 0")
    one = np.ones(schedule.steps)
    level = Level(None, schedule.alpha[1:], schedule.sigma[1:])
    with np.errstate(all="ignore"):  # what is not finite is refused below
        gain = np.square(PARAMETERIZATIONS[parameterization].decode(one, 0 * one, level).x0)
        snr = 1 / schedule.ratio[1:] ** 2
        table = weigh(snr, gain, **({"gamma": gamma} if gamma else {}))
        fits = np.all(np.isfinite(table.astype(np.float32)))
    if not fits:
        raise InputError(
            f"loss_weighting={name!r}: its weights for parameterization={parameterization!r} are "
            "not finite in float32 on this schedule; choose v or x0, or a schedule with less noise"
        )
    return np.append(0.0, table)


Draw = Callable[[Key[Array, ""]], Int[Array, ""]]


def uniform(schedule: NoiseSchedule) -> Draw:
    """Every level of 1..T equally often."""
    return lambda key: jax.random.randint(key, (), 1, schedule.steps + 1)


def lognormal(schedule: NoiseSchedule) -> Draw:
    """EDM's rule, by inversion of the distribution function of lognormal_probabilities.

    The loss is not divided by the probabilities: as in EDM, levels that are drawn more often count
    more.
    """
    below = np.cumsum(lognormal_probabilities(schedule)[1:-1])
    bounds = jnp.asarray(below, jnp.float32)

    def draw(key: Key[Array, ""]) -> Int[Array, ""]:
        place = jax.random.uniform(key)
        return 1 + jnp.sum(place >= bounds, dtype=jnp.int32)

    return draw


def lognormal_probabilities(
    schedule: NoiseSchedule, mean: float = -1.2, deviation: float = 1.2
) -> Float64[ndarray, "levels"]:
    """How probable each level is where log(sigma / alpha) is normal; 0 at level 0.

    Karras et al. 2022, arXiv:2206.00364, table 1 (P_mean, P_std). A level stands for all that lies
    between the half steps around it; the first and the last one also for what lies beyond.
    """
    half = schedule.level(np.arange(1, schedule.steps) + 0.5)
    z = (np.log(half.sigma / half.alpha) - mean) / deviation
    below = [0.5 * math.erfc(-each / math.sqrt(2)) for each in z]
    return np.append(0.0, np.diff([0.0, *below, 1.0]))


TIME_SAMPLINGS: dict[str, Callable[[NoiseSchedule], Draw]] = {
    "uniform": uniform,
    "lognormal": lognormal,
}
