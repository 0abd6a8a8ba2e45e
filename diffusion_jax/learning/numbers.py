"""The free numbers of a sampler with one call a step, and the table that they stand for.

Step i of N goes from level i to level i + 1, of which the last is clean (alpha = 1, sigma = 0):

    x_{i+1} = alpha_{i+1} (x0_i + sum_k w_ik (x0_{i-k} - x0_i)) + sigma_{i+1} (d_i eps_i + e_i xi)

Each multistep method has this form; DDIM has w = e = 0 and d = 1. If the denoiser always predicts
the same image, the sampler returns this image, whatever the numbers are.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.schedules import NoiseSchedule, noise_ratio
from diffusion_jax.tableau import X0, Tableau, Z, check
from diffusion_jax.tableau.identity import canonical, is_same
from diffusion_jax.typing import require

MOST_CALLS, MOST_REGISTERS = 50, 8
TOLERANCE = 1e-8
DENSE = 4096  # values of alpha on the device, evenly spaced in log(sigma / alpha)


class Numbers(NamedTuple):
    """The free numbers of N steps that remember K predictions, as float64 or traced arrays.

    spacing: (N,), the lengths of the steps in t are proportional to exp(spacing).
    history: (N, K), the w. kept, fresh: (N,), the d and the e.
    """

    spacing: Any
    history: Any
    kept: Any
    fresh: Any


def from_tableau(tableau: Tableau, registers: int = 3) -> Numbers:
    """Return the numbers of a tableau that ends at clean data.

    registers: the predictions to remember; more if the tableau needs more.
    Raise InputError if its steps do not have the form above.
    """
    calls, form = tableau.rows, canonical(tableau)
    few = f"{calls} network evaluations: a sampler to learn from has at most {MOST_CALLS}"
    require(calls <= MOST_CALLS, few)
    right = "take a multistep method with one evaluation a step, such as sa_solver, ddim or unipc"
    lengths = -np.diff(np.append(tableau.t, 0.0))
    descends = len(form.alpha) == calls and np.all(lengths > 0) and np.all(form.states[:-1, 0] != 0)
    require(descends, f"the sampler to learn from does not go down step by step: {right}")
    alpha, sigma = np.append(tableau.alpha, 1.0), np.append(tableau.sigma, 0.0)
    first, images = form.states[:, 0], form.states[:, 1:]
    weights, kept, fresh = np.zeros((calls, calls)), np.zeros(calls), np.zeros(calls)
    noise = np.zeros_like(form.covariance)
    for i in range(calls):
        slope = first[i + 1] / first[i]  # of x_{i+1} in x_i, with all x0 held
        rest = images[i + 1] - slope * images[i]
        weights[i, :i] = rest[:i][::-1] / alpha[i + 1]
        noise[i + 1] = slope * noise[i]
        noise[:, i + 1] = noise[i + 1]
        variance = form.covariance[i + 1, i + 1] - slope**2 * noise[i, i]
        noise[i + 1, i + 1] = form.covariance[i + 1, i + 1]
        if i + 1 < calls:
            kept[i] = slope * sigma[i] / sigma[i + 1]
            fresh[i] = np.sqrt(max(variance, 0)) / sigma[i + 1]
    used = np.flatnonzero(np.any(np.abs(weights) > TOLERANCE, 0))
    needed = 0 if len(used) == 0 else used[-1] + 1
    many = f"the sampler to learn from remembers {needed} predictions: it may remember at most "
    require(needed <= MOST_REGISTERS, many + f"{MOST_REGISTERS}; take a lower order or fewer steps")
    registers = max(needed, min(registers, calls - 1))
    numbers = Numbers(np.log(lengths), weights[:, :registers], kept, fresh)
    again = canonical(_tabulate(numbers, tableau.t, tableau.alpha, tableau.sigma))
    fits = is_same(again, form, TOLERANCE)
    require(fits, f"the steps of the sampler to learn from have a different form: {right}")
    return numbers


def to_tableau(numbers: Numbers, schedule: NoiseSchedule, first: float) -> Tableau:
    """Return the tableau of numbers, in float64. first: the t of the first level."""
    numbers = Numbers(*(np.asarray(each, np.float64) for each in numbers))
    return _tabulate(numbers, *schedule.level(_times(numbers.spacing, first, np)))


def traced_tableau(numbers: Numbers, schedule: NoiseSchedule, first: float) -> Tableau:
    """Return the tableau of traced numbers, through which gradients flow.

    As in the schedule, log(sigma / alpha) is linear in t between its steps.
    """
    knots = np.append(np.geomspace(1e-3, 1, 50)[:-1], np.arange(1, schedule.steps + 1))
    log_ratio = np.log(noise_ratio(*schedule.level(knots)[1:]))
    finite = np.isfinite(log_ratio)
    dense = np.linspace(log_ratio[0], log_ratio[finite][-1], DENSE)
    t = _times(numbers.spacing, first, jnp)
    log = jnp.interp(t, knots[finite], log_ratio[finite])
    alphas = schedule.alpha_at(np.exp(dense))
    start = schedule.level(first)  # its alpha may be 0
    alpha = jnp.interp(log, dense, alphas).at[0].set(start.alpha)
    sigma = jnp.interp(log, dense, alphas * np.exp(dense)).at[0].set(start.sigma)
    ends = np.ones(len(numbers.kept), bool)
    return Tableau._make((t, alpha, sigma, mix(numbers, alpha, sigma, jnp), ends))


def _tabulate(numbers: Numbers, t: Any, alpha: Any, sigma: Any) -> Tableau:
    t, alpha, sigma = (np.asarray(column, np.float64) for column in (t, alpha, sigma))
    table = mix(numbers, alpha, sigma, np)
    return check(Tableau(t, alpha, sigma, table, np.ones(len(table), bool)))


def _times(spacing: Any, first: float, xp: ModuleType) -> Any:
    """Return the t of each level, from the lengths of the steps."""
    lengths = xp.exp(spacing - spacing.max())
    passed = xp.cumsum(lengths) / lengths.sum()
    return first * (1 - xp.concatenate([xp.zeros(1), passed[:-1]]))


def mix(numbers: Numbers, alpha: Any, sigma: Any, xp: ModuleType) -> Any:
    """Return the mix of a tableau, whose registers hold the last predictions of the image.

    xp: numpy, or jax.numpy for traced numbers.
    """
    n, registers = numbers.history.shape
    alpha, sigma = xp.append(alpha[1:], 1.0), xp.append(sigma[1:], 0.0)
    known = np.arange(n)[:, None] > np.arange(registers)  # predictions before the first are zero
    history = xp.where(known, numbers.history, 0)
    images = [1 - history.sum(1), sigma * numbers.kept, sigma * numbers.fresh]
    head = xp.stack([xp.zeros(n), alpha * images[0], *images[1:]], 1)
    state = xp.concatenate([head, alpha[:, None] * history], 1)
    shift = np.zeros((n, registers, Z + registers))
    shift[:, np.arange(registers), [X0, *range(Z, Z + registers - 1)][:registers]] = 1
    return xp.concatenate([state[:, None], xp.asarray(shift, state.dtype)], 1)
