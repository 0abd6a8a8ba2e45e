"""Which tableaus are the same map: equal in distribution for every denoiser.

A tableau is reduced to what the network sees and what comes out. eps is eliminated by x = alpha x0
+ sigma eps, and the registers are unrolled. The state before each call, and the last state, then
are linear in the initial state, in the x0 of the calls before, and in the noise of the rows before.
Two tableaus are the same map if their calls have the same levels, these coefficients are equal, and
the noises have the same covariance. Calls that nothing depends on are left out.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.tableau import Tableau

TOLERANCE = 1e-9  # the largest difference of equal coefficients
# Samplers that are the same map: pairs of a condition and their texts, separated by spaces.
EQUAL = tomllib.loads(Path(__file__).with_name("equal_samplers.toml").read_text())["equal"]


class Canonical(NamedTuple):
    """The canonical form of a tableau with C calls: equal for tableaus that are the same map.

    states: the coefficients of the initial state and of x0 of each call, in the state before each
    call and in the last state. covariance: that of the noise in these states.
    """

    alpha: Float64[ndarray, "C"]
    sigma: Float64[ndarray, "C"]
    states: Float64[ndarray, "C+1 1+C"]
    covariance: Float64[ndarray, "C+1 C+1"]


def canonical(tableau: Tableau) -> Canonical:
    """Return the canonical form of a tableau."""
    rows = tableau.rows
    start, x0, xi = np.split(np.eye(1 + 2 * rows), [1, 1 + rows])
    held = np.concatenate([start, np.zeros((tableau.registers, 1 + 2 * rows))])
    states = []
    for row, (alpha, sigma, mix) in enumerate(
        zip(tableau.alpha, tableau.sigma, tableau.mix, strict=True)
    ):
        states.append(held[0])
        eps = (held[0] - alpha * x0[row]) / sigma
        held = mix @ np.stack([held[0], x0[row], eps, xi[row], *held[1:]])
    unrolled = np.stack([*states, held[0]])
    linear, noise = unrolled[:, : 1 + rows], unrolled[:, 1 + rows :]
    used = [rows]
    for row in range(rows - 1, -1, -1):
        if np.abs(linear[used, 1 + row]).max() > TOLERANCE:
            used.insert(0, row)
    calls, noise = np.array(used[:-1], int), noise[used]
    needed = linear[used][:, np.append(0, calls + 1)]
    return Canonical(tableau.alpha[calls], tableau.sigma[calls], needed, noise @ noise.T)


def is_same(one: Canonical, other: Canonical, tolerance: float = TOLERANCE) -> bool:
    """Return whether two canonical forms are equal, up to rounding."""
    return len(one.alpha) == len(other.alpha) and all(
        np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(one, other, strict=True)
    )


def group(tableaus: Mapping[str, Tableau]) -> list[list[str]]:
    """Return the names of the tableaus, with those of the same map in one list."""
    groups: list[tuple[Canonical, list[str]]] = []
    for name, tableau in tableaus.items():
        form = canonical(tableau)
        names = next((names for known, names in groups if is_same(form, known)), None)
        if names is None:
            groups.append((form, [name]))
        else:
            names.append(name)
    return [names for _, names in groups]
