"""Exponential multistep methods with one call per step: DPM-Solver(++), UniPC and SA-Solver.

order: None means the method's default, or the number of steps if that is smaller.
lower_order_final: whether the last step between finite log-SNRs has order 1, the one before it
order 2, and so on, as in the code of DPM-Solver and UniPC. (Their grids end there. A further step
to clean data has order 1 in every method.)
"""

import numpy as np

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.samplers.multistep import exponential_multistep, resolve_order, step_orders
from diffusion_jax.tableau import Tableau
from diffusion_jax.typing import require

# sigma / alpha below which SA-Solver treats a step as large, and two long steps; found by trial.
CLEAR = 0.4, 0.3


def dpm_multistep(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    predict: str = "x0",
    eta: float = 0.0,
    rule: str = "bh2",
    lower_order_final: bool | None = None,
) -> Tableau:
    """DPM-Solver++, multistep, 2M: Lu et al. 2022, arXiv:2211.01095, algorithm 2; order 1 to 3.

    predict: "x0"; or "eps", which is DPM-Solver (arXiv:2206.00927) in multistep form.
    eta: 0 solves the ODE; 1 is SDE-DPM-Solver++, which needs predict="x0".
    rule: how order 2 weights its difference. "bh2" is the paper's 2M; "exact" integrates the
    difference exactly.
    order: 2 by default.
    lower_order_final: true by default if there are fewer than 10 steps, as in the authors' code.
    """
    order = resolve_order(order, 2, 3, grid)
    lower = grid.steps < 10 if lower_order_final is None else lower_order_final
    return exponential_multistep(grid, predict, step_orders(grid, order, lower), eta=eta, rule=rule)


def dpmpp_3m_sde(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    eta: float = 1.0,
    lower_order_final: bool | None = None,
) -> Tableau:
    """k-diffusion's DPM-Solver++(3M) SDE; order 1 to 3, 3 by default.

    The differences are integrated exactly. k-diffusion weights the second one as if it were half of
    the derivative, which lowers the order for eta 0 from 3 to 2.
    lower_order_final: that of dpm_multistep; k-diffusion has false.
    """
    order = resolve_order(order, 3, 3, grid)
    return dpm_multistep(schedule, grid, order, "x0", eta, "exact", lower_order_final)


def unipc(
    schedule: NoiseSchedule,
    grid: Grid,
    order: int | None = None,
    predict: str = "x0",
    rule: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Tableau:
    """UniPC: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2: order p = 1 to 3.

    The corrector uses the prediction at the end of a step, which the next step needs anyway. So
    each step takes one call and has order p + 1. The last step has no corrector, because no call
    follows it.
    rule: B(h), "bh1" or "bh2". order: 2 by default.
    """
    orders = step_orders(grid, resolve_order(order, 2, 3, grid), lower_order_final)
    return exponential_multistep(grid, predict, orders, orders * corrector, rule=rule)


def sa_solver(
    schedule: NoiseSchedule,
    grid: Grid,
    tau: float = 1.0,
    order: int | None = None,
    corrector_order: int = 2,
    tau_from: float = 0.0,
    tau_to: float = 1.0,
    rule: str = "bh1",
    largest: float = 1.0,
    lower_order_final: bool = True,
    pece: bool = False,
) -> Tableau:
    """SA-Solver: Xue et al. 2023, arXiv:2309.05019, algorithm 1: stochastic Adams methods in x0.

    tau: scale of the noise; 0 solves the ODE, and 1 the reverse SDE. It applies to steps that end
    at tau_from <= t / T <= tau_to; other steps have tau 0.
    order: number of predictions that the predictor uses, 1 to 3; 2 by default.
    corrector_order: number of predictions that the corrector uses, including the new one: 2 to 4,
    or 0 for no corrector; 2 by default. The corrector keeps the noise of its predictor.
    rule: see exponential_weights.
    lower_order_final: as above, but the step to clean data counts, as in the authors' code.
    pece: whether each corrected state is evaluated again, which doubles the calls.

    The authors' rule, "bh1", overshoots in large steps that end at little noise. A step of
    log(alpha / sigma) above `largest` that ends where sigma / alpha < 0.4 is UniPC's: it has tau 0
    and the rule "bh2". It has order 1 if it is more than twice as long as the step before, because
    that is too far to extrapolate. If two steps in a row are above half of `largest`, the second
    has the rule "bh2" where it ends at sigma / alpha < 0.3.
    """
    require(0 <= tau < np.inf, f"tau={tau}: it must be 0 or more")
    bounds = f"tau_from={tau_from}, tau_to={tau_to}: they must obey 0 <= tau_from <= tau_to <= 1"
    require(0 <= tau_from <= tau_to <= 1, bounds)
    known = corrector_order in (0, 2, 3, 4)
    require(known, f"corrector_order={corrector_order}: it must be 0, 2, 3 or 4")
    require(largest > 0, f"largest={largest}: it must be above 0")
    orders = step_orders(grid, resolve_order(order, 2, 3, grid), False)
    corrector = step_orders(grid, max(corrector_order - 1, 0), False)
    if lower_order_final:
        left = np.arange(grid.steps, 0, -1)
        orders, corrector = np.minimum(orders, left), np.minimum(corrector, left)
    h = np.diff(grid.half_log_snr)
    before = np.append(h[0], h[:-1])
    clear, clearer = (np.isfinite(h) & (grid.ratio[1:] < ratio) for ratio in CLEAR)
    large = clear & (h > largest)
    bounded = large | (clearer & (np.minimum(h, before) > largest / 2))
    orders = np.where(large & (h > 2 * before), 1, orders)
    place = grid.t[1:] / schedule.steps
    eta = tau**2 * ((tau_from <= place) & (place <= tau_to) & ~large)
    return exponential_multistep(
        grid, "x0", orders, corrector, eta, np.where(bounded, "bh2", rule), pece
    )
