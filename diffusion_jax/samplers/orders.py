"""The orders of multistep methods: what is asked for, and what a step of the grid allows."""

import numpy as np
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.typing import InputError


def resolve_order(name: str, order: int | None, default: int, most: int, grid: Grid) -> int:
    """The order asked for; None is the default, or less where the grid has fewer steps.

    Raises InputError for an order that is not in 1 .. most, or that the steps cannot hold.
    """
    if order is None:
        return min(default, grid.steps)
    if not 1 <= order <= most:
        raise InputError(f"{name}={order}: it must be in 1..{most}")
    if order > grid.steps:
        raise InputError(f"{name}={order}: {grid.steps} steps hold at most order {grid.steps}")
    return order


def step_orders(grid: Grid, order: int, lower_order_final: bool) -> ndarray:
    """The order of each step: at most as many predictions as the history holds.

    A step from or to infinite log-SNR is of order 1, and pure noise does not count as history.
    lower_order_final: the last step is of order 1, the one before of order 2, and so on.
    """
    finite = np.isfinite(grid.log_snr)
    orders = np.minimum(order, np.maximum(np.cumsum(finite[:-1]), 1))
    if lower_order_final:
        orders = np.minimum(orders, np.arange(grid.steps, 0, -1))
    return np.where(finite[:-1] & finite[1:], orders, np.minimum(orders, 1))


def correctable(grid: Grid) -> ndarray:
    """The steps that a corrector can follow: of finite log-SNR, and with a call at their end."""
    finite = np.isfinite(grid.log_snr)
    return finite[:-1] & finite[1:] & (np.arange(1, grid.steps + 1) < grid.steps)
