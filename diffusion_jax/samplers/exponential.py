"""Exponential multistep methods: DPM-Solver(++), DEIS, UniPC and SA-Solver as one.

In the notation of coefficients.py, a step i -> j is

    x_j = alpha_j x0 + sigma_j d eps + scale sum_k c_k (f_k - f_0) + sigma_j sqrt(1 - d^2) xi

with d = exp(-eta h), f = x0 or eps, and f_k the prediction of k steps before. A corrector replaces
x_j, once f is known there, by the same formula with that f among the f_k.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.samplers.coefficients import RULES, exponential_weights
from diffusion_jax.samplers.tableau import EPS, X0, Row, Tableau, symbols, tabulate
from diffusion_jax.typing import InputError

PREDICTIONS = {"x0": X0, "eps": EPS}


class Multistep(NamedTuple):
    """An exponential multistep method on a grid; orders and eta are those of each step.

    corrector: 0 where a step is not corrected. rule: see exponential_weights.
    """

    grid: Grid
    predict: str
    predictor: ndarray
    corrector: ndarray
    eta: ndarray
    rule: str

    def tableau(self) -> Tableau:
        """One row a step: it corrects the step that it completes, and predicts the next."""
        corrected = self.corrector > 0
        held = np.where(corrected, np.maximum(self.predictor, self.corrector), self.predictor - 1)
        registers = int(held.max())
        x, x0, eps, xi, *z = symbols(registers)
        now = symbols(registers)[PREDICTIONS[self.predict]]
        known = [now, *z]
        rows = []
        for step, level in enumerate(self.grid.levels[:-1]):
            correction = self._correction(step - 1, known) if step else 0 * x
            alpha, sigma = self.grid.alpha[step + 1], self.grid.sigma[step + 1]
            decay = self._decay(step)
            x_next = alpha * x0 + sigma * decay * eps + self._transport(step) * correction
            x_next = x_next + self._history(step, known)
            x_next = x_next + sigma * np.sqrt(1 - decay**2) * xi
            rows.append(Row(level, [x_next, *known[:registers]]))
        return tabulate(rows)

    def _history(self, step: int, known: list[ndarray]) -> ndarray:
        """scale sum_k c_k (f_k - f_0) of the predictor; known: f_0, f_1, ..."""
        weights = self._weights(step, list(range(step - 1, step - self.predictor[step], -1)))
        return _differences(weights, known[0], known[1:])

    def _correction(self, step: int, known: list[ndarray]) -> ndarray:
        """What the corrector adds to the end of a step, where known[0] was just predicted."""
        order = self.corrector[step]
        if not order:
            return 0 * known[0]
        now, base, *earlier = known
        weights = self._weights(step, [step + 1, *range(step - 1, step - order, -1)])
        return _differences(weights, base, [now, *earlier]) - self._history(step, known[1:])

    def _weights(self, step: int, at: list[int]) -> ndarray:
        """scale c_k of a step for predictions taken at other levels of the grid."""
        if not at:
            return np.zeros(0)
        log_snr = self.grid.log_snr
        h = log_snr[step + 1] - log_snr[step]
        nodes = (log_snr[at] - log_snr[step]) / h
        if self.predict == "eps":
            return self.grid.sigma[step + 1] * exponential_weights(-h, nodes, self.rule)
        kappa = (1 + self.eta[step]) * h
        return self.grid.alpha[step + 1] * exponential_weights(kappa, nodes, self.rule)

    def _decay(self, step: int) -> float:
        """exp(-eta h)."""
        ratio = self.grid.ratio
        shrink = 0.0 if ratio[step] == np.inf else ratio[step + 1] / ratio[step]
        return shrink ** self.eta[step]

    def _transport(self, step: int) -> float:
        """What a change of x at the start of a step becomes at its end, where f stays."""
        if self.predict == "eps":
            start, end = self.grid.alpha[step], self.grid.alpha[step + 1]
            return end / start if start else 0.0
        return self.grid.sigma[step + 1] / self.grid.sigma[step] * self._decay(step)


def multistep(
    grid: Grid,
    predict: str,
    predictor: ndarray,
    corrector: ndarray | None = None,
    eta: float | ndarray = 0.0,
    rule: str = "exact",
) -> Tableau:
    """The tableau of a Multistep. Raises InputError for what is unknown, or noise without x0."""
    if predict not in PREDICTIONS:
        raise InputError(f"predict={predict!r} is unknown: choose from x0, eps")
    if rule not in RULES:
        raise InputError(f"rule={rule!r} is unknown: choose from {', '.join(RULES)}")
    etas = np.broadcast_to(np.asarray(eta, np.float64), predictor.shape)
    if not np.all((etas >= 0) & (etas < np.inf)):
        raise InputError(f"eta={eta}: it must be 0 or more")
    if predict == "eps" and np.any(etas):
        raise InputError(f"eta={eta} with predict='eps': noise needs predict='x0'")
    if corrector is None:
        corrector = np.zeros_like(predictor)
    return Multistep(grid, predict, predictor, corrector, etas, rule).tableau()


def _differences(weights: ndarray, base: ndarray, others: list[ndarray]) -> ndarray:
    parts = [c * (f - base) for c, f in zip(weights, others, strict=False)]
    return sum(parts, 0 * base)
