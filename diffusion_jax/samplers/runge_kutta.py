"""Runge-Kutta methods in r = sigma / alpha, and exponential ones in log(alpha / sigma)."""

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import phi
from diffusion_jax.samplers.singlestep import Weigh, single_steps
from diffusion_jax.tableau import Tableau
from diffusion_jax.typing import require

CLASSICAL = {  # the places of the inner stages in a step, and the weights of f_1, f_2, ...
    1: ([], [[]]),
    2: ([1.0], [[0.0], [1 / 2]]),
    3: ([1 / 2, 1.0], [[0.0, 0.0], [2.0, 0.0], [2 / 3, 1 / 6]]),
    4: ([1 / 2, 1 / 2, 1.0], [[0, 0, 0], [1 / 2, 0, 0], [0, 1, 0], [1 / 3, 1 / 3, 1 / 6]]),
}


def runge_kutta(schedule: NoiseSchedule, grid: Grid, order: int = 3) -> Tableau:
    """rhoRK of DEIS (Zhang and Chen 2022, arXiv:2204.13902): Runge-Kutta methods for dy/dr = eps.

    y is x / alpha. order, 1 to 4, is also the number of calls per step: Euler's method, Heun's,
    Kutta's, and the classical one.
    """
    require(order in CLASSICAL, f"order={order}: it must be in 1..4")
    places, weights = CLASSICAL[order]

    def weigh(kappa: ndarray) -> ndarray:
        return np.expm1(kappa[-1]) * np.exp(-kappa)[:, None] * np.array(weights)

    def scheme(step: int) -> tuple[ndarray, Weigh]:
        q = grid.ratio[step + 1] / grid.ratio[step]
        return np.log1p(np.array(places) * (q - 1)) / np.log(q), weigh

    return single_steps(schedule, grid, "eps", order, scheme)


def heunpp(schedule: NoiseSchedule, grid: Grid) -> Tableau:
    """Heun++, as ComfyUI has it under the name heunpp2: 3 calls per step; order 1.

    Euler's method first takes this step and the next one. The slope of the step is then a weighted
    mean of the slopes at the three levels. The second and the third have the weight r / (3 r_0),
    where r is that of their level and r_0 that of the grid's first level. The second-to-last step
    has two slopes, and the weight r / (2 r_0). The last step is Euler's.
    """
    ratio, change = grid.ratio, np.diff(grid.ratio)
    first = ratio[np.isfinite(ratio)][0]

    def scheme(step: int) -> tuple[ndarray, Weigh]:
        ahead = ratio[step + 1 : min(step + 3, grid.steps)]
        calls = 1 + len(ahead)
        weights = np.zeros((calls, calls - 1))
        weights[-1] = ahead / (calls * first) * change[step] / ratio[step + 1]
        if calls == 3:
            weights[1, 0] = change[step + 1] / ratio[step + 2]
        places = np.log(ahead / ratio[step]) / np.log(ratio[step + 1] / ratio[step])
        return places, lambda kappa: weights

    return single_steps(schedule, grid, "eps", 3, scheme)


def res(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int = 2,
    predict: str = "x0",
    c2: float = 1 / 2,
    c3: float = 1.0,
) -> Tableau:
    """RES, single-step: Zhang et al. 2023, arXiv:2308.02157; order, 2 or 3, is the number of calls.

    These are the exponential Runge-Kutta methods of Hochbruck and Ostermann 2005 (SIAM Journal on
    Numerical Analysis 43). With order=2 it is dpmpp with rule=exact. Multistep RES is
    dpmpp_multistep with rule=exact.
    predict: f, "x0" or "eps". c2, c3: the places of the later calls in the step, in log-SNR.
    """
    require(order in (2, 3), f"order={order}: it must be 2 or 3")
    valid = 0 < c2 <= 1 and 0 < c3 <= 1 and (order == 2 or abs(c2 - 2 / 3) > 1e-6)
    require(valid, f"c2={c2}, c3={c3}: they must be above 0 and at most 1; c2=2/3 needs order=2")
    gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2)) if order == 3 else 0.0

    def weigh(kappa: ndarray) -> list[list[float]]:
        h = kappa[-1]
        last = h * phi(2, -h) / (gamma * c2 + (c2, c3)[order - 2])
        if order == 2:
            return [[0], [last]]
        inner = gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h)
        return [[0, 0], [h * inner, 0], [gamma * last, last]]

    return single_steps(schedule, grid, predict, order, lambda step: ([c2, c3][: order - 1], weigh))


def etdrk(schedule: NoiseSchedule, grid: Grid, order: int = 3, predict: str = "x0") -> Tableau:
    """ETDRK, exponential time differencing: Cox and Matthews 2002 (J. Comput. Phys. 176).

    order: the number of calls per step, 2 to 4. predict: f, "x0" or "eps".
    """
    require(order in (2, 3, 4), f"order={order}: it must be in 2..4")

    def weigh(kappa: ndarray) -> list[list[float]]:
        h = kappa[-1]
        if order == 2:
            return [[0], [h * phi(2, -h)]]
        middle, last = 4 * h * (phi(2, -h) - 2 * phi(3, -h)), h * (4 * phi(3, -h) - phi(2, -h))
        if order == 3:
            return [[0, 0], [2 * h * phi(1, -h), 0], [middle, last]]
        half = h / 2 * phi(1, -h / 2)
        return [[0, 0, 0], [half, 0, 0], [0, 2 * half, 0], [middle / 2, middle / 2, last]]

    places = {2: [1.0], 3: [1 / 2, 1.0], 4: [1 / 2, 1 / 2, 1.0]}[order]
    return single_steps(schedule, grid, predict, order, lambda step: (places, weigh))
