"""UniPC: Zhao et al. 2023, arXiv:2302.04867."""

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.exponential import multistep
from diffusion_jax.samplers.orders import correctable, resolve_order, step_orders
from diffusion_jax.samplers.tableau import Tableau
from diffusion_jax.schedules import NoiseSchedule


def unipc(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    predict: str = "x0",
    rule: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Tableau:
    """UniP-p with UniC-p (algorithms 1 and 2), order p = 1 to 3, 2 by default.

    The corrector takes the prediction at the end of a step, which the next step calls anyway:
    one call a step, order p + 1. rule: B(h), "bh1" or "bh2" (section 3.1); it matters where there
    is one difference alone. The last step has no corrector, for no call follows it.
    lower_order_final: the last step is of order 1, the one before of order 2, and so on.
    """
    order = resolve_order("order", order, 2, 3, grid)
    orders = step_orders(grid, order, lower_order_final)
    corrected = np.where(correctable(grid) & corrector, orders, 0)
    return multistep(grid, predict, orders, corrected, rule=rule)
