"""ER-SDE-Solver: Cui et al. 2023, arXiv:2309.06169. Multistep methods in r = sigma / alpha."""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.coefficients import difference_weights
from diffusion_jax.samplers.multistep import multistep, resolve_order, step_orders
from diffusion_jax.tableau import Tableau
from diffusion_jax.typing import require


def er_sde(
    schedule: NoiseSchedule, grid: Grid, order: int | None = None, power: float | None = None
) -> Tableau:
    """ER-SDE-Solver-1 to 3 for the SDE of a noise scale phi(r); order 1 to 3, 3 by default.

    With r = sigma / alpha, p = phi(r), and the derivatives x0' and x0'' in r, the step i -> j is

        x_j = alpha_j (p_j / p_i x_i / alpha_i + (1 - p_j / p_i) x0 + w_1 x0' + w_2 x0'' / 2
                       + sqrt(r_j^2 - (r_i p_j / p_i)^2) xi)
        w_k = (r_j - r_i)^k + k p_j int_{r_j}^{r_i} (r - r_i)^(k - 1) / phi(r) dr.

    The derivatives are the authors' backward differences. x0' is of first order, so that order 3
    converges as order 2.
    power: phi is r^power, where 1 solves the ODE and 2 the reverse SDE. By default, phi is the
    authors' r (exp(r^0.3) + 10).
    The authors approximate the integrals by sums of 100 terms; here, they are exact to 1e-12.
    """
    require(power is None or 1 <= power <= 10, f"power={power}: it must be from 1 to 10")

    def scale(r: ndarray) -> ndarray:  # phi(r) / r
        return np.exp(r**0.3) + 10 if power is None else r ** (power - 1)

    scaled = scale(grid.ratio)

    def weigh(step: int, at: list[int]) -> ndarray:
        first, last = grid.ratio[step : step + 2]
        k = np.arange(1, len(at) + 1)
        powers = k[:, None] - 1
        integrals = integrate(lambda r: (r - first) ** powers / (r * scale(r)), last, first)
        moments = (last - first) ** k + k * last * scaled[step + 1] * integrals
        nodes = grid.ratio[at] - first
        moments[1:] += moments[0] * nodes[0]  # x0' is the difference over the last step
        return grid.alpha[step + 1] * difference_weights(nodes, moments)

    orders = step_orders(grid, resolve_order(order, 3, 3, grid), False)
    return multistep(grid, "x0", scaled[1:] / scaled[:-1], weigh, orders)


def integrate(f: Callable[[ndarray], ndarray], low: float, high: float) -> ndarray:
    """Return the integral of f(r) from low to high, by Gauss's method in log r."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    r = np.sqrt(low * high) * (high / low) ** (nodes / 2)
    return f(r) * r @ weights * np.log(high / low) / 2
