"""Explicit linear multistep methods for dy/dr = eps, where y = x / alpha and r = sigma / alpha.

They have one call per step. order: the number of eps that a step combines, as far as the history
reaches; None means 4, or the number of steps if that is smaller.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import difference_weights
from diffusion_jax.samplers.multistep import resolve_order
from diffusion_jax.spec import choose
from diffusion_jax.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import require

EVEN = ([-1 / 2], [-16 / 12, 5 / 12], [-59 / 24, 37 / 24, -9 / 24])  # weights of eps_k - eps
PANEL, SHARE = np.polynomial.legendre.leggauss(8)  # Gauss's rule on [-1, 1]


def deis(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    space: str = "t",
    to_clean: bool = False,
) -> Tableau:
    """DEIS, multistep: Zhang and Chen 2022, arXiv:2204.13902; order 1 to 4.

    The predicted noise is extrapolated as a polynomial in `space` and integrated exactly over r.
    space: "t" gives the paper's tAB, whose tAB3 is order=4. "ratio" stands for r and gives the
    paper's rhoAB, the Adams-Bashforth methods of variable step. Both lms and ipndm_v are such
    methods, though the published code of ipndm_v has faults. "log_snr" with order=3 gives what
    diffusers calls DEIS, which is dpm_solver_multistep with rule=exact.
    The paper's rhoRK is runge_kutta.
    to_clean: whether the step to clean data extrapolates too, as in lms, or is DDIM's.
    """
    require(not (to_clean and space == "log_snr"), "to_clean=true: log_snr is infinite there")
    with np.errstate(divide="ignore"):
        log_snr = -np.log(schedule.ratio)
    ratio = grid.ratio
    spaces = {
        "t": (
            grid.t,
            np.arange(schedule.steps + 1.0),
            lambda t: np.divide(*schedule.level(t)[:0:-1]),
        ),
        "ratio": (ratio, schedule.ratio, lambda place: place),
        "log_snr": (grid.half_log_snr, log_snr, lambda place: np.exp(-place)),
    }
    place, table, ratio_at = choose(spaces, "space", space)

    def weigh(step: int, past: ndarray) -> ndarray:
        """Integrate s^p dr by parts, by Gauss's rule between the levels of the schedule."""
        start, span = place[step], place[step + 1] - place[step]
        cuts = (table - start) / span
        edges = np.sort([0.0, *cuts[(cuts > 0) & (cuts < 1)], 1.0])
        width = np.diff(edges)[:, None] / 2
        s = edges[:-1, None] + width * (PANEL + 1)
        power = np.arange(1, len(past) + 1)[:, None, None]
        inner = np.sum(
            power * s ** (power - 1) * ratio_at(start + s * span) * width * SHARE, (1, 2)
        )
        low, high = ratio[[step, step + 1]]
        return difference_weights((place[past] - start) / span, (high - inner) / (high - low))

    return tabulate(_rows(grid, resolve_order(order, 4, 4, grid), weigh, to_clean))


def pndm(
    schedule: NoiseSchedule, grid: Grid, order: int | None = None, improved: bool = False
) -> Tableau:
    """PLMS, the multistep method of PNDM (Liu et al. 2022, arXiv:2202.09778); order 1 to 4.

    It uses the Adams-Bashforth weights of an evenly spaced grid on every grid, so its order is 2
    where the grid is uneven. It begins with a step of Heun's, with two calls, as in latent
    diffusion, which is unstable if the step is large. (The paper begins with three steps of a
    Runge-Kutta method, of four calls each.)
    improved: whether it is iPNDM (arXiv:2204.13902), which begins with low orders, and whose step
    to clean data is DDIM's. Its authors use grid=karras.
    """
    order = resolve_order(order, 4, 4, grid)

    rows = _rows(grid, order, lambda step, past: np.array(EVEN[len(past) - 1]), not improved)
    if improved or order == 1 or grid.alpha[0] == 0:
        return tabulate(rows)
    s = symbols(order - 1)
    predict = rows[0]._replace(ends_step=False)
    correct = Row(grid.levels[1], [s.x + _span(grid, 0) / 2 * (s.eps - s.z[0]), s.z[0]])
    return tabulate([predict, correct, *rows[1:]])


def gradient_estimation(schedule: NoiseSchedule, grid: Grid, ge_gamma: float = 2.0) -> Tableau:
    """Gradient-estimation sampling: Permenter and Yuan 2023, arXiv:2306.04848; order 1.

    A step is DDIM's with g eps + (1 - g) eps_1 for eps, where eps_1 is that of the step before and
    g is ge_gamma, 1 or more. On an even grid, g = 3/2 is Adams-Bashforth of order 2. The first step
    and the step to clean data are DDIM's.
    """
    require(1 <= ge_gamma < np.inf, f"ge_gamma={ge_gamma}: it must be at least 1")
    return tabulate(_rows(grid, 2, lambda step, past: np.array([1 - ge_gamma]), False))


def _rows(
    grid: Grid, order: int, weigh: Callable[[int, ndarray], ndarray], to_clean: bool
) -> list[Row]:
    """Return the rows of DDIM + span * sum_k c_k (eps_k - eps).

    weigh(step, past): the c, for the eps_k that were computed at the levels grid[past].
    to_clean: whether the step to clean data is of this form too. Otherwise it is DDIM's.
    """
    s = symbols(order - 1)
    rows = []
    for step, level in enumerate(grid.levels[:-1]):
        x_next = grid.alpha[step + 1] * s.x0 + grid.sigma[step + 1] * s.eps
        past = step - 1 - np.arange(min(order - 1, int(np.sum(grid.alpha[:step] > 0))))
        if len(past) and (to_clean or grid.sigma[step + 1] > 0):
            weights = _span(grid, step) * weigh(step, past)
            x_next = x_next + weights @ (np.stack(s.z[: len(past)]) - s.eps)
        rows.append(Row(level, [x_next, s.eps, *s.z][:order]))
    return rows


def _span(grid: Grid, step: int) -> float:
    """Return alpha_j (r_j - r_i) for the step i -> j."""
    return grid.sigma[step + 1] - grid.alpha[step + 1] / grid.alpha[step] * grid.sigma[step]
