"""SA-Solver: Xue et al. 2023, arXiv:2309.05019."""

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.exponential import multistep
from diffusion_jax.samplers.orders import correctable, resolve_order, step_orders
from diffusion_jax.samplers.tableau import Tableau
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError


def sa_solver(
    schedule: NoiseSchedule,
    grid: Grid,
    tau: float = 1.0,
    order: int | None = None,
    corrector_order: int = 2,
    tau_from: float = 0.0,
    tau_to: float = 1.0,
    rule: str = "bh1",
    lower_order_final: bool = True,
) -> Tableau:
    """A stochastic Adams predictor with a corrector (algorithm 1), in x0.

    tau scales the noise (eq. 5): 0 solves the ODE, 1 is the reverse SDE; it is in force in steps
    that start at tau_from <= t / T <= tau_to. order: the predictions that the predictor uses, 1 to
    3. corrector_order: those that the corrector uses, with the new one, 2 to 4, or 0 for none.
    Both are 2 by default. The corrector keeps the noise of its predictor. rule: see
    exponential_weights; "bh1" is the authors' choice for few steps.
    """
    if not 0 <= tau < np.inf:
        raise InputError(f"tau={tau}: it must be 0 or more")
    if not 0 <= tau_from <= tau_to <= 1:
        raise InputError(
            f"tau_from={tau_from}, tau_to={tau_to}: they must obey 0 <= tau_from <= tau_to <= 1"
        )
    order = resolve_order("order", order, 2, 3, grid)
    orders = step_orders(grid, order, lower_order_final)
    if corrector_order not in (0, 2, 3, 4):
        raise InputError(f"corrector_order={corrector_order}: it must be 0, 2, 3 or 4")
    corrector = step_orders(grid, max(corrector_order - 1, 0), lower_order_final)
    corrector = np.where(correctable(grid), corrector, 0)
    place = grid.t[:-1] / schedule.steps
    eta = tau**2 * ((tau_from <= place) & (place <= tau_to))
    return multistep(grid, "x0", orders, corrector, eta=eta, rule=rule)
