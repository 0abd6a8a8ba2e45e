"""DPM-Solver and DPM-Solver++: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095.

DPM-Solver interpolates the predicted noise (predict="eps"), DPM-Solver++ the predicted image
(predict="x0").
"""

import numpy as np

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.coefficients import exponential_weights
from diffusion_jax.samplers.exponential import PREDICTIONS, multistep
from diffusion_jax.samplers.orders import resolve_order, step_orders
from diffusion_jax.samplers.tableau import Row, Tableau, symbols, tabulate
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, Level

SHORT = 15  # steps; in shorter runs the authors' code lowers the order of the last steps


def dpm_multistep(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    predict: str = "x0",
    eta: float = 0.0,
    rule: str = "bh2",
    lower_order_final: bool | None = None,
) -> Tableau:
    """DPM-Solver++(2M) (algorithm 2), and its kin of order 1 and 3, in x0 or in eps.

    eta: 0 solves the ODE; 1 is SDE-DPM-Solver++ (eq. 18), for predict="x0". rule: how order 2
    weights its difference: "bh2" is the paper's 2M; "exact" the variant that integrates it.
    order: 2 by default. lower_order_final: the last step is of order 1, the one before of
    order 2; by default in runs of fewer than 15 steps. A step to or from infinite log-SNR is of
    order 1 always.
    """
    order = resolve_order("order", order, 2, 3, grid)
    lower = grid.steps < SHORT if lower_order_final is None else lower_order_final
    return multistep(grid, predict, step_orders(grid, order, lower), eta=eta, rule=rule)


def dpm_singlestep(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int = 2,
    predict: str = "eps",
    rule: str | None = None,
    r1: float | None = None,
    r2: float = 2 / 3,
) -> Tableau:
    """DPM-Solver-2 and -3 (algorithms 1 and 2), and DPM-Solver++(2S) (algorithm 1, second paper).

    order: the calls a step. Between lambda_i and lambda_j = lambda_i + h the denoiser is called
    at lambda_i + r1 h, and at lambda_i + r2 h. r1: 1/2 of order 2, 1/3 of order 3. rule: how a
    stage of order 2 weights its difference, as in dpm_multistep; as published it is "bh2" in
    order 2, "exact" in order 3. A step to or from infinite log-SNR is one call.
    """
    if order not in (1, 2, 3):
        raise InputError(f"order={order}: it must be in 1..3")
    if predict not in PREDICTIONS:
        raise InputError(f"predict={predict!r} is unknown: choose from {', '.join(PREDICTIONS)}")
    first = (1 / 2 if order == 2 else 1 / 3) if r1 is None else r1
    if not 0 < first < (1 if order < 3 else r2) or not r2 < 1:
        raise InputError(f"r1={r1}, r2={r2}: they must obey 0 < r1 < r2 < 1")
    stages = {1: [], 2: [first], 3: [first, r2]}[order]
    rule = ("exact" if order == 3 else "bh2") if rule is None else rule
    rows: list[Row] = []
    finite = np.isfinite(grid.log_snr)
    for step, (start, end) in enumerate(zip(grid.levels[:-1], grid.levels[1:], strict=True)):
        inner = stages if finite[step] and finite[step + 1] else []
        rows += _single_step(schedule, start, end, predict, inner, order, rule)
    return tabulate(rows)


def _single_step(
    schedule: NoiseSchedule,
    start: Level,
    end: Level,
    predict: str,
    inner: list[float],
    order: int,
    rule: str,
) -> list[Row]:
    """A row for each stage: its level is DDIM from the start, plus c (f - f_0) of the stage before.

    The registers hold what is known of the later stages.
    """
    x, x0, eps, xi, *z = symbols(order - 1)
    f = symbols(order - 1)[PREDICTIONS[predict]]
    if not inner:
        return [Row(start, [end.alpha * x0 + end.sigma * eps])]
    ratio = np.array([level.sigma / level.alpha for level in (start, end)])
    h = np.log(ratio[0] / ratio[1])
    levels = [schedule.at_ratio(ratio[0] * np.exp(-r * h)) for r in inner] + [end]
    weights = [0.0]  # of f - f_0 at each stage
    for r, level, before in zip([*inner[1:], 1.0], levels[1:], inner, strict=True):
        kappa, scale = (r * h, level.alpha) if predict == "x0" else (-r * h, level.sigma)
        chosen = "exact" if order == 3 and level is end else rule
        weights.append(scale * exponential_weights(kappa, np.array([before / r]), chosen)[0])
    known = [
        level.alpha * x0 + level.sigma * eps - c * f
        for level, c in zip(levels, weights, strict=True)
    ]
    rows = [Row(start, known, ends_step=False)]
    for stage, c in enumerate(weights[1:]):
        last = stage == len(inner) - 1
        rows.append(Row(levels[stage], [z[0] + c * f, *z[1:]], ends_step=last))
    return rows
