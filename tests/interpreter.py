"""Interpret tableaus in plain float64 NumPy, row by row, and define a nonlinear problem."""

import numpy as np

CENTRES, WEIGHTS, WIDTH = np.array([-1.2, 0.9]), np.array([0.35, 0.65]), 0.4


def interpret(tableau, denoise, x, noise=None):
    """Run a tableau as its definition reads. noise: (R, ...) for its rows, or None."""
    registers = [np.zeros_like(x)] * tableau.registers
    levels = zip(tableau.t, tableau.alpha, tableau.sigma, strict=True)
    for row, (level, mix) in enumerate(zip(levels, tableau.mix, strict=True)):
        xi = np.zeros_like(x) if noise is None else noise[row]
        held = np.stack([x, *denoise(x, *level), xi, *registers])
        x, *registers = np.tensordot(mix, held, 1)
    return x


def mixture(x, t, alpha, sigma):
    """Return the exact denoiser of two Gaussians on a line: the posterior mean by Bayes's rule."""
    variance = (alpha * WIDTH) ** 2 + sigma**2
    distance = x[:, None] - alpha * CENTRES
    logits = np.log(WEIGHTS) - distance**2 / (2 * variance)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    x0 = np.sum(weights * (CENTRES + alpha * WIDTH**2 / variance * distance), 1)
    score = np.sum(weights * -distance / variance, 1)
    return x0, -sigma * score
