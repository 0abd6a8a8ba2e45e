"""DEIS: Zhang and Chen 2022, arXiv:2204.13902."""

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.exponential import multistep
from diffusion_jax.samplers.orders import resolve_order, step_orders
from diffusion_jax.samplers.tableau import Tableau
from diffusion_jax.schedules import NoiseSchedule


def deis(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    lower_order_final: bool = False,
) -> Tableau:
    """Equation 14 (an Adams-Bashforth exponential integrator), order 1 to 3, 3 by default.

    The predicted noise is extrapolated as a polynomial in log(sigma / alpha) and integrated
    exactly over sigma / alpha. (As a polynomial in sigma / alpha it would be lms.)
    lower_order_final: the last step is of order 1, the one before of order 2.
    """
    order = resolve_order("order", order, 3, 3, grid)
    return multistep(grid, "eps", step_orders(grid, order, lower_order_final))
