"""Explicit linear multistep methods for dy/dr = eps, where y = x / alpha and r = sigma / alpha.

They have one call per step. order: the number of eps that a step combines, as far as the history
reaches; None means 4, or the number of steps if that is smaller.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import adams_weights, difference_weights
from diffusion_jax.samplers.multistep import resolve_order
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.spec import choose
from diffusion_jax.typing import require

PANEL, SHARE = np.polynomial.legendre.leggauss(8)  # Gauss's rule on [-1, 1]


def lms(schedule: NoiseSchedule, grid: Grid, order: int | None = None) -> Tableau:
    """Adams-Bashforth with weights that are exact on the grid: k-diffusion's LMS; order 1 to 4."""
    order = resolve_order(order, 4, 4, grid)

    def weigh(step: int, past: ndarray) -> ndarray:
        return adams_weights(_nodes(grid.ratio, step, past))

    return tabulate(_rows(grid, order, weigh, to_clean=True))


def pndm(schedule: NoiseSchedule, grid: Grid, order: int | None = None) -> Tableau:
    """PLMS, the multistep method of PNDM (Liu et al. 2022, arXiv:2202.09778) in latent diffusion.

    It is ipndm, except that the first step is Heun's, with two calls, and that the step to clean
    data extrapolates as well. With few large steps it is unstable, and samplers.build warns. The
    paper starts with three steps of a Runge-Kutta method, which take 12 calls.
    """
    order = resolve_order(order, 4, 4, grid)
    rows = _rows(grid, order, _even, to_clean=True)
    if order == 1 or grid.alpha[0] == 0:
        return tabulate(rows)
    s = symbols(order - 1)
    predict = rows[0]._replace(ends_step=False)
    correct = Row(grid.levels[1], [s.x + _span(grid, 0) / 2 * (s.eps - s.z[0]), s.z[0]])
    return tabulate([predict, correct, *rows[1:]])


def ipndm(schedule: NoiseSchedule, grid: Grid, order: int | None = None) -> Tableau:
    """iPNDM, PNDM that starts with low orders: Zhang and Chen 2022, arXiv:2204.13902; order 1 to 4.

    It uses the Adams-Bashforth weights of an evenly spaced grid on every grid, so its order is 2
    where the grid is uneven. The step to clean data is DDIM's. Its authors use grid=karras.
    """
    return tabulate(_rows(grid, resolve_order(order, 4, 4, grid), _even))


def ipndm_v(schedule: NoiseSchedule, grid: Grid, order: int | None = None) -> Tableau:
    """iPNDM_v, the variable-step Adams-Bashforth method of zju-pi/diff-sampler; order 1 to 4.

    In the published code, a parenthesis is misplaced: the second Newton moment is (1 - a b) / 2
    where (1 - a) b / 2 is exact, and so order 4 falls to 3. This is the published method. Without
    the fault it would be lms, except that the step to clean data is DDIM's.
    """

    def weigh(step: int, past: ndarray) -> ndarray:
        nodes = _nodes(grid.ratio, step, past)
        moments = 1 / np.arange(2.0, len(nodes) + 2)
        if len(nodes) > 1:  # change the second Newton moment, and leave the third as it is
            excess = (nodes[0] * nodes[1] + nodes[0] - 1) / 2
            moments[1:] += excess * np.array([1, nodes[0] + nodes[1]])[: len(nodes) - 1]
        return difference_weights(nodes, moments)

    return tabulate(_rows(grid, resolve_order(order, 4, 4, grid), weigh))


def deis(
    schedule: NoiseSchedule, grid: Grid, order: int | None = None, space: str = "t"
) -> Tableau:
    """DEIS, multistep: Zhang and Chen 2022, arXiv:2204.13902; order 1 to 4.

    The predicted noise is extrapolated as a polynomial in `space` and integrated exactly over r.
    space: "t" is the paper's tAB, whose tAB3 has order=4. "ratio", for sigma / alpha, is its rhoAB,
    and equals lms. "log_snr", for log(alpha / sigma), is what diffusers calls DEIS, with order=3;
    it equals dpm_solver_multistep with rule=exact. All take DDIM's step to clean data. The paper's
    rhoRK is runge_kutta.
    """
    whole, minus = np.arange(schedule.steps + 1.0), np.negative
    with np.errstate(divide="ignore"):
        log_snr = minus(np.log(schedule.ratio))
    place, table, ratio_at = choose(
        {
            "t": (grid.t, whole, lambda t: np.divide(*schedule.level(t)[:0:-1])),
            "ratio": (grid.ratio, schedule.ratio, lambda ratio: ratio),
            "log_snr": (grid.half_log_snr, log_snr, lambda place: np.exp(minus(place))),
        },
        "space",
        space,
    )

    def weigh(step: int, past: ndarray) -> ndarray:
        """Integrate s^p dr by parts, by Gauss's rule between the levels of the schedule."""
        start, end = place[step], place[step + 1]
        cuts = (table - start) / (end - start)
        edges = np.sort([0.0, *cuts[(cuts > 0) & (cuts < 1)], 1.0])
        width = np.diff(edges)[:, None]
        s = edges[:-1, None] + width * (PANEL + 1) / 2
        r = ratio_at(start + s * (end - start))
        low, high = grid.ratio[[step, step + 1]]
        power = np.arange(1, len(past) + 1)[:, None, None]
        inner = np.sum(power * s ** (power - 1) * r * width * SHARE / 2, (1, 2))
        return difference_weights(_nodes(place, step, past), (high - inner) / (high - low))

    return tabulate(_rows(grid, resolve_order(order, 4, 4, grid), weigh))


def gradient_estimation(schedule: NoiseSchedule, grid: Grid, ge_gamma: float = 2.0) -> Tableau:
    """Gradient-estimation sampling: Permenter and Yuan 2023, arXiv:2306.04848; order 1.

    A step is DDIM's with g eps + (1 - g) eps_1 for eps: eps_1 is that of the step before, and g is
    ge_gamma. So it is Adams-Bashforth of order 2, where g is 3/2 on an even grid, carried
    further. The first step and the step to clean data are DDIM's. ge_gamma: 1, which is DDIM, or
    more.
    """
    require(1 <= ge_gamma < np.inf, f"ge_gamma={ge_gamma}: it must be at least 1")
    return tabulate(_rows(grid, 2, lambda step, past: np.array([1 - ge_gamma])))


def _rows(
    grid: Grid, order: int, weigh: Callable[[int, ndarray], ndarray], to_clean: bool = False
) -> list[Row]:
    """Return the rows of DDIM + span * sum_k c_k (eps_k - eps).

    weigh(step, past): the c, for the eps_k that were computed at the levels grid[past].
    to_clean: whether the step to clean data is of this form too. Otherwise it is DDIM's.
    """
    s = symbols(order - 1)
    rows = []
    for step in range(grid.steps):
        x_next = grid.alpha[step + 1] * s.x0 + grid.sigma[step + 1] * s.eps
        past = step - 1 - np.arange(min(order - 1, int(np.sum(grid.alpha[:step] > 0))))
        if len(past) and (to_clean or grid.sigma[step + 1] > 0):
            weights = _span(grid, step) * weigh(step, past)
            x_next = x_next + weights @ (np.stack(s.z[: len(past)]) - s.eps)
        rows.append(Row(grid.levels[step], [x_next, s.eps, *s.z][:order]))
    return rows


def _even(step: int, past: ndarray) -> ndarray:
    """Return the Adams-Bashforth weights of an evenly spaced grid."""
    return adams_weights(-np.arange(1.0, len(past) + 1))


def _nodes(place: ndarray, step: int, past: ndarray) -> ndarray:
    """Return where past levels lie, from 0 at the start of the step to 1 at its end."""
    return (place[past] - place[step]) / (place[step + 1] - place[step])


def _span(grid: Grid, step: int) -> float:
    """Return alpha_j (r_j - r_i) for the step i -> j."""
    return grid.sigma[step + 1] - grid.alpha[step + 1] / grid.alpha[step] * grid.sigma[step]
