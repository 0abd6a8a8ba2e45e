"""Exponential multistep methods: DPM-Solver(++), DEIS, UniPC and SA-Solver as one.

In the notation of coefficients.py, a step i -> j is

    x_j = alpha_j x0 + sigma_j d eps + scale sum_k c_k (f_k - f_0) + sigma_j sqrt(1 - d^2) xi

with d = exp(-eta h), f = x0 or eps, and f_k the prediction of k steps before. A corrector replaces
x_j, once f is known there, by the same formula with that f among the f_k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import require


def multistep(
    grid: Grid,
    predict: str,
    predictor: ndarray,
    corrector: ndarray | None = None,
    eta: float | ndarray = 0.0,
    rule: str = "exact",
) -> Tableau:
    """One row a step: it corrects the step that it completes, and predicts the next.

    predictor, corrector, eta: of each step; corrector is 0 where a step is not corrected.
    predict: f, "x0" or "eps". rule: see exponential_weights.
    """
    check_predict(predict)
    require(rule in ("exact", "bh1", "bh2"), f"rule={rule!r}: it must be exact, bh1 or bh2")
    eta = np.broadcast_to(np.asarray(eta, np.float64), predictor.shape)
    require(np.all((eta >= 0) & (eta < np.inf)), f"eta={eta}: it must be 0 or more")
    require(predict == "x0" or not np.any(eta), f"eta={eta}: noise needs predict='x0'")
    corrector = np.zeros_like(predictor) if corrector is None else corrector
    steps = _Steps(grid, predict, eta, rule)
    held = np.where(corrector > 0, np.maximum(predictor, corrector), predictor - 1)
    s = symbols(int(held.max()))
    known = [getattr(s, predict), *s.z]
    rows = []
    orders, corrections = predictor.tolist(), corrector.tolist()
    for step, level in enumerate(grid.levels[:-1]):
        sigma, decay = grid.sigma[step + 1], steps.decay(step)
        x_next = grid.alpha[step + 1] * s.x0 + sigma * decay * s.eps
        x_next = x_next + sigma * np.sqrt(1 - decay**2) * s.xi
        x_next = x_next + steps.history(step, orders[step], known)
        if step and corrections[step - 1]:
            correction = steps.history(step - 1, corrections[step - 1], known[1:], known[0])
            correction = correction - steps.history(step - 1, orders[step - 1], known[1:])
            x_next = x_next + steps.transport(step) * correction
        rows.append(Row(level, [x_next, *known[: len(s.z)]]))
    return tabulate(rows)


def check_predict(predict: str) -> None:
    """Raise InputError for what no method extrapolates."""
    require(predict in ("x0", "eps"), f"predict={predict!r} is unknown: choose from x0, eps")


class _Steps(NamedTuple):
    """The coefficients of the steps of a grid."""

    grid: Grid
    predict: str
    eta: ndarray
    rule: str

    def history(
        self, step: int, order: int, f: Sequence[ndarray], end: ndarray | None = None
    ) -> ndarray:
        """scale sum_k c_k (f_k - f_0) of f_0 .. f_{order-1}, and of f at the end if given."""
        at, others = list(range(step - 1, step - order, -1)), f[1:order]
        if end is not None:
            at, others = [step + 1, *at], [end, *others]
        if not at:
            return 0 * f[0]
        log_snr = self.grid.log_snr
        h = log_snr[step + 1] - log_snr[step]
        scale, kappa = self.grid.sigma[step + 1], -h
        if self.predict == "x0":
            scale, kappa = self.grid.alpha[step + 1], (1 + self.eta[step]) * h
        weights = exponential_weights(kappa, (log_snr[at] - log_snr[step]) / h, self.rule)
        return scale * (weights @ (np.stack(others) - f[0]))

    def decay(self, step: int) -> float:
        """exp(-eta h)."""
        ratio = self.grid.ratio
        shrink = 0.0 if ratio[step] == np.inf else ratio[step + 1] / ratio[step]
        return shrink ** self.eta[step]

    def transport(self, step: int) -> float:
        """What a change of x at the start of a step becomes at its end, where f stays."""
        if self.predict == "eps":
            return self.grid.alpha[step + 1] / self.grid.alpha[step]
        return self.grid.sigma[step + 1] / self.grid.sigma[step] * self.decay(step)


def resolve_order(order: int | None, default: int, most: int, grid: Grid) -> int:
    """The order asked for; None is the default, or less where the grid has fewer steps.

    Raises InputError for an order that is not in 1 .. most, or that the steps cannot hold.
    """
    if order is None:
        return min(default, grid.steps)
    require(order in range(1, most + 1), f"order={order}: it must be in 1..{most}")
    require(order <= grid.steps, f"order={order}: {grid.steps} steps hold at most {grid.steps}")
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
    return np.where(finite[:-1] & finite[1:], orders, 1)


def corrector_orders(grid: Grid, orders: ndarray) -> ndarray:
    """The orders of those steps that can be corrected, else 0.

    They are of finite log-SNR, and a call follows them.
    """
    finite = np.isfinite(grid.log_snr)
    return np.where(finite[:-1] & finite[1:] & (np.arange(grid.steps, 0, -1) > 1), orders, 0)
