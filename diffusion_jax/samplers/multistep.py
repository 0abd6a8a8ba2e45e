"""One formula for multistep methods: DPM-Solver(++), DEIS, UniPC, SA-Solver and ER-SDE-Solver.

A step i -> j is

    x_j = alpha_j x0 + sigma_j d eps + sum_k w_k (f_k - f_0) + sigma_j sqrt(1 - d^2) xi

where f is x0 or eps, and f_k is the prediction of k steps before. When f is known at the end of the
step, a corrector replaces x_j: it uses the same formula with that f among the f_k. In exponential
methods, d = exp(-eta h) and w = scale c, in the notation of coefficients.py.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.typing import require


def exponential_multistep(
    grid: Grid,
    predict: str,
    predictor: ndarray,
    corrector: ndarray | None = None,
    eta: float | ndarray = 0.0,
    rule: str | ndarray = "exact",
    pece: bool = False,
) -> Tableau:
    """Return the tableau of an exponential multistep method; see `multistep`.

    eta, rule: one for all steps, or one for each; for rule, see exponential_weights.
    """
    require(predict in ("x0", "eps"), f"predict={predict!r}: it must be x0 or eps")
    known_rules = np.isin(rule, ("exact", "bh1", "bh2")).all()
    require(known_rules, f"rule={rule!r}: it must be exact, bh1 or bh2")
    rule = np.broadcast_to(rule, predictor.shape)
    eta = np.broadcast_to(np.asarray(eta, np.float64), predictor.shape)
    require(np.all((eta >= 0) & (eta < np.inf)), f"eta={eta}: it must be 0 or more")
    require(predict == "x0" or not np.any(eta), f"eta={eta}: noise needs predict='x0'")
    place = grid.half_log_snr

    def weigh(step: int, at: list[int]) -> ndarray:
        h = place[step + 1] - place[step]
        scale, kappa = grid.sigma[step + 1], -h
        if predict == "x0":
            scale, kappa = grid.alpha[step + 1], (1 + eta[step]) * h
        return scale * exponential_weights(kappa, (place[at] - place[step]) / h, rule[step])

    decay = (grid.ratio[1:] / grid.ratio[:-1]) ** eta
    return multistep(grid, predict, decay, weigh, predictor, corrector, pece)


def multistep(
    grid: Grid,
    predict: str,
    decay: ndarray,
    weigh: Callable[[int, list[int]], ndarray],
    predictor: ndarray,
    corrector: ndarray | None = None,
    pece: bool = False,
) -> Tableau:
    """Return a tableau in which each row corrects the step that it completes and predicts the next.

    predict: f, "x0" or "eps". decay: the d of each step.
    weigh(step, at): the w of a step, for the f_k at the levels grid[at].
    predictor, corrector: the order of each step; 0 leaves a step uncorrected. Steps at infinite
    log-SNR cannot be corrected; neither can the last step, because no evaluation follows it.
    pece: whether the corrected state is evaluated again, in a row of its own.
    """
    followed = np.isfinite(grid.half_log_snr[:-1]) & (np.arange(grid.steps, 0, -1) > 1)
    corrector = followed * (0 if corrector is None else corrector)
    held = np.where(corrector > 0, np.maximum(predictor, corrector), predictor - 1)
    s = symbols(int(held.max()))
    known = [getattr(s, predict), *s.z]

    def differences(
        step: int, order: int | np.integer, f: list[ndarray], end: list[ndarray]
    ) -> ndarray:
        at, others = [*range(step - 1, step - order, -1)], f[1:order]
        at, others = [step + 1] * len(end) + at, end + others
        return weigh(step, at) @ (np.stack(others) - f[0]) if at else 0 * f[0]

    carried = grid.sigma if predict == "x0" else grid.alpha
    rows: list[Row] = []
    for step, level in enumerate(grid.levels[:-1]):
        sigma, kept = grid.sigma[step + 1], decay[step]
        x_next = grid.alpha[step + 1] * s.x0 + sigma * kept * s.eps
        x_next = x_next + differences(step, predictor[step], known, [])
        x_next = x_next + sigma * np.sqrt(1 - kept**2) * s.xi
        if step and corrector[step - 1]:
            correction = differences(step - 1, corrector[step - 1], known[1:], known[:1])
            correction = correction - differences(step - 1, predictor[step - 1], known[1:], [])
            if pece:
                rows[-1] = rows[-1]._replace(ends_step=False)
                rows.append(Row(level, [s.x + correction, *s.z]))
            else:
                x_next = x_next + carried[step + 1] / carried[step] * kept * correction
        rows.append(Row(level, [x_next, *known[: len(s.z)]]))
    return tabulate(rows)


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
