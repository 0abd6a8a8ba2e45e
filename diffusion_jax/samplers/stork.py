"""STORK: stabilised Runge-Kutta steps in t, whose inner stages extrapolate the predicted noise."""

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import require


def stork(schedule: NoiseSchedule, grid: Grid, stages: int = 50, derivatives: int = 2) -> Tableau:
    """STORK-2: Tan et al. 2025, arXiv:2505.24210, for predicted noise; order 2.

    A step solves dx/dt = (alpha' / alpha) x + (sigma' - alpha' sigma / alpha) eps by the
    second-order Runge-Kutta-Gegenbauer method. The network is called only at its first stage; at
    the others, eps is a Taylor polynomial in t with finite differences of the last predictions. As
    in the authors' code, the first step takes a second call, at the end of an Euler step, because
    it has no history. A step from pure noise or to clean data is DDIM's.
    stages: the number of stages, 2 to 200. With more of them, longer steps are stable.
    derivatives: the degree of the polynomial, 1 to 3, as far as the history reaches.

    The authors' stages are at the places of the Runge-Kutta-Legendre method, which lowers the
    order to 1. Take a schedule whose betas grow slowly, as theirs do.
    """
    require(2 <= stages <= 200, f"stages={stages}: it must be in 2..200")
    require(derivatives in (1, 2, 3), f"derivatives={derivatives}: it must be in 1..3")
    s = symbols(max(derivatives, 2))
    t, places, scheme = grid.t, abscissae(stages), gegenbauer(stages)
    rows: list[Row] = []

    def slopes(step: int, at: ndarray) -> tuple[ndarray, ndarray]:
        """Return the factors of x and of eps in the change of x over a step, (S,) each."""
        low, high = np.maximum(at - 1 / 2, 0), np.minimum(at + 1 / 2, schedule.steps)
        _, alpha, sigma = schedule.level(at)
        start, end = schedule.level(low), schedule.level(high)
        span = (t[step + 1] - t[step]) / (high - low)
        rate = span * (end.alpha - start.alpha) / alpha
        return rate, span * (end.sigma - start.sigma) - rate * sigma

    def advance(step: int, x: ndarray, eps: list[ndarray], times: ndarray) -> ndarray:
        """Return x at the end of a step, from predictions at given times."""
        at = t[step] + places * (t[step + 1] - t[step])
        rate, factor = slopes(step, at)
        force = factor[:, None] * (extrapolate(at, times) @ np.stack(eps))
        first = rate[0] * x + force[0]
        before, y = x, x + scheme[0, 2] * first
        for (mu, nu, new, old), a, b in zip(scheme[1:], rate[1:], force[1:], strict=True):
            before, y = (
                y,
                mu * y + nu * before + (1 - mu - nu) * x + new * (a * y + b) + old * first,
            )
        return y

    begin = int(np.sum(grid.alpha == 0))
    for step, level in enumerate(grid.levels[:-1]):
        x_next = grid.alpha[step + 1] * s.x0 + grid.sigma[step + 1] * s.eps
        history = min(step - begin, derivatives)
        if step >= begin and grid.sigma[step + 1] > 0:
            if history == 0:
                rate, factor = slopes(step, t[step])
                euler = s.x + rate * s.x + factor * s.eps
                rows.append(Row(level, [euler, s.x, s.eps], ends_step=False))
                x_next = advance(step, s.z[0], [s.z[1], s.eps], t[[step, step + 1]])
                rows.append(Row(grid.levels[step + 1], [x_next, s.z[1]]))
                continue
            x_next = advance(step, s.x, [s.eps, *s.z[:history]], t[step - np.arange(history + 1)])
        rows.append(Row(level, [x_next, s.eps, *s.z][: derivatives + 1]))
    return tabulate(rows)


def gegenbauer(stages: int) -> ndarray:
    """Return mu, nu, mu~ and gamma~ of each stage of RKG2: Skaras et al. 2021.

    (Journal of Computational Physics 425, 109879.) The state after stage j is mu y_{j-1}
    + nu y_{j-2} + (1 - mu - nu) y_0 + mu~ f(y_{j-1}) + gamma~ f(y_0), where f is the slope times
    the step.
    """
    j = np.arange(2.0, stages + 1)
    b = np.append([1, 1 / 3], 4 * (j - 1) * (j + 4) / (3 * j * (j + 1) * (j + 2) * (j + 3)))
    mu, nu = (2 * j + 1) / j * b[2:] / b[1:-1], -(j + 1) / j * b[2:] / b[:-2]
    scale = 6 / ((stages + 4) * (stages - 1))
    later = np.stack([mu, nu, scale * mu, -scale * mu * (1 - j * (j + 1) / 2 * b[1:-1])], 1)
    return np.concatenate([[[1, 0, scale, 0]], later])


def abscissae(stages: int) -> ndarray:
    """Return the place in the step at which each stage of RKG2 takes its slope, from 0 on."""
    j = np.arange(1.0, stages)
    places = (j - 1) * (j + 4) / ((stages - 1) * (stages + 4))
    places[0] = 6 / ((stages - 1) * (stages + 4))
    return np.append(0.0, places)


def extrapolate(at: ndarray, times: ndarray) -> ndarray:
    """Return the weights (S, n) of the polynomial through n values at given times, at S times."""
    powers = np.arange(len(times))[:, None]
    scale = times[0] - times[1]
    return np.linalg.solve(
        ((times - times[0]) / scale) ** powers, ((at - times[0]) / scale) ** powers
    ).T
