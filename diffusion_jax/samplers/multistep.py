"""One formula for exponential multistep methods: DPM-Solver(++), DEIS, UniPC and SA-Solver.

In the notation of coefficients.py, a step i -> j is

    x_j = alpha_j x0 + sigma_j d eps + scale sum_k c_k (f_k - f_0) + sigma_j sqrt(1 - d^2) xi

where d = exp(-eta h), f is x0 or eps, and f_k is the prediction of k steps before. When f is known
at the end of the step, a corrector replaces x_j: it uses the same formula with that f among the
f_k.
"""

from functools import partial

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import require


def multistep(
    grid: Grid,
    predict: str,
    predictor: ndarray,
    corrector: ndarray | None = None,
    eta: float | ndarray = 0.0,
    rule: str | ndarray = "exact",
) -> Tableau:
    """Return a tableau in which each row corrects the step that it completes and predicts the next.

    predictor, corrector: the order of each step; 0 leaves a step uncorrected. Steps at infinite
    log-SNR cannot be corrected; neither can the last step, because no evaluation follows it.
    eta, rule: one for all steps, or one for each; for rule, see exponential_weights.
    predict: f, "x0" or "eps".
    """
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    known_rules = np.isin(rule, ("exact", "bh1", "bh2")).all()
    require(known_rules, f"rule={rule!r}: it must be exact, bh1 or bh2")
    rule = np.broadcast_to(rule, predictor.shape)
    eta = np.broadcast_to(np.asarray(eta, np.float64), predictor.shape)
    require(np.all((eta >= 0) & (eta < np.inf)), f"eta={eta}: it must be 0 or more")
    require(predict == "x0" or not np.any(eta), f"eta={eta}: noise needs predict='x0'")
    followed = np.isfinite(grid.half_log_snr[:-1]) & (np.arange(grid.steps, 0, -1) > 1)
    corrector = followed * (0 if corrector is None else corrector)
    held = np.where(corrector > 0, np.maximum(predictor, corrector), predictor - 1)
    s = symbols(int(held.max()))
    known = [getattr(s, predict), *s.z]
    history = partial(_weighted_differences, grid, predict, eta, rule)
    decay = (grid.ratio[1:] / grid.ratio[:-1]) ** eta  # exp(-eta h)
    carried = grid.sigma if predict == "x0" else grid.alpha
    rows = []
    for step, level in enumerate(grid.levels[:-1]):
        sigma, kept = grid.sigma[step + 1], decay[step]
        x_next = grid.alpha[step + 1] * s.x0 + sigma * kept * s.eps
        x_next = x_next + history(step, predictor[step], known)
        x_next = x_next + sigma * np.sqrt(1 - kept**2) * s.xi
        if step and corrector[step - 1]:
            correction = history(step - 1, corrector[step - 1], known[1:], known[0])
            correction = correction - history(step - 1, predictor[step - 1], known[1:])
            x_next = x_next + carried[step + 1] / carried[step] * kept * correction
        rows.append(Row(level, [x_next, *known[: len(s.z)]]))
    return tabulate(rows)


def _weighted_differences(
    grid: Grid,
    predict: str,
    eta: ndarray,
    rule: ndarray,
    step: int,
    order: int | np.integer,
    f: list[ndarray],
    end: ndarray | None = None,
) -> ndarray:
    """Return scale sum_k c_k (f_k - f_0) of f_0 .. f_{order-1}.

    end: f at the end of the step, which is then included.
    """
    at, others = list(range(step - 1, step - int(order), -1)), f[1:order]
    if end is not None:
        at, others = [step + 1, *at], [end, *others]
    if not at:
        return 0 * f[0]
    h = grid.half_log_snr[step + 1] - grid.half_log_snr[step]
    scale, kappa = grid.sigma[step + 1], -h
    if predict == "x0":
        scale, kappa = grid.alpha[step + 1], (1 + eta[step]) * h
    weights = exponential_weights(
        kappa, (grid.half_log_snr[at] - grid.half_log_snr[step]) / h, rule[step]
    )
    return scale * (weights @ (np.stack(others) - f[0]))


def resolve_order(order: int | None, default: int, most: int, grid: Grid) -> int:
    """Return the given order; for None, the default or the number of steps if that is smaller.

    Raise InputError if the order is not in 1 .. most, or is larger than the number of steps.
    """
    if order is None:
        return min(default, grid.steps)
    require(order in range(1, most + 1), f"order={order}: it must be in 1..{most}")
    require(order <= grid.steps, f"order={order}: {grid.steps} steps hold at most {grid.steps}")
    return order


def step_orders(grid: Grid, order: int, lower_order_final: bool) -> ndarray:
    """Return the order of each step: at most the number of predictions in its history.

    A step from or to infinite log-SNR has order 1, and pure noise does not count as history.
    lower_order_final: whether the last step between finite log-SNRs has order 1, the one before it
    order 2, and so on.
    """
    finite = np.isfinite(grid.half_log_snr)
    inner = finite[:-1] & finite[1:]
    orders = np.minimum(order, np.maximum(np.cumsum(finite[:-1]), 1))
    if lower_order_final:
        orders = np.minimum(orders, np.cumsum(inner[::-1])[::-1])
    return np.where(inner, orders, np.minimum(order, 1))
