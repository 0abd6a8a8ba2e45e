"""Which tableaus are the same map: equal in distribution for every denoiser.

A tableau is reduced to what the network sees and what comes out. eps is eliminated by x = alpha x0
+ sigma eps, and the registers are unrolled. The state before each call, and the last state, then
are linear in the initial state, in the x0 of the calls before, and in the noise of the rows before.
Two tableaus are the same map if their calls have the same levels, these coefficients are equal, and
the noises have the same covariance. Calls that nothing depends on are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax.tableau import Tableau

TOLERANCE = 1e-9  # the largest difference of equal coefficients
LAST = "where the grid ends at clean data"
ABOVE = "where the grid ends above clean data"
# Samplers that are the same map, and when. docs/samplers.md has this table.
EQUAL = (
    (
        "always",
        "ddim euler euler_ancestral:eta=0 lms:order=1 pndm:order=1 ipndm:order=1 ipndm_v:order=1 "
        "gradient_estimation:ge_gamma=1 deis:order=1 runge_kutta:order=1 dpm_solver:order=1 "
        "dpmpp:order=1 dpm_solver_multistep:order=1 dpmpp_multistep:order=1 "
        "edm:s_churn=0:base=euler er_sde:order=1:power=1 "
        "unipc:order=1:corrector=false sa_solver:tau=0:order=1:corrector_order=0",
    ),
    (
        "always",
        "ddim:eta=1 euler_ancestral ddpm:variance=posterior dpmpp_2m_sde:order=1 "
        "dpmpp_3m_sde:order=1 seeds:order=1 er_sde:order=1:power=2 "
        "sa_solver:order=1:corrector_order=0:largest=inf",
    ),
    ("always", "heun edm:s_churn=0 restart:repeats=0 runge_kutta:order=2"),
    ("where alpha is constant, as in the schedule karras", "heun heun:space=levels"),
    (
        "always",
        "dpm2 dpm2_ancestral:eta=0 dpm_solver edm:s_churn=0:base=dpm_solver "
        "restart:repeats=0:base=dpm_solver",
    ),
    ("always", "dpmpp dpm_solver:predict=x0 dpmpp_2s_ancestral:eta=0 dpmpp_sde:eta=0"),
    ("always", "dpmpp_multistep dpm_solver_multistep:predict=x0 dpmpp_2m_sde:eta=0"),
    ("always", "dpmpp_2m_sde dpmpp_multistep:eta=1"),
    ("always", "dpmpp_multistep:lower_order_final=true unipc:corrector=false"),
    (
        "always",
        "dpmpp_multistep:order=3:lower_order_final=true unipc:order=3:corrector=false",
    ),
    (
        "always",
        "dpmpp_3m_sde dpmpp_multistep:order=3:eta=1:rule=exact",
    ),
    ("in fewer than 10 steps", "dpmpp_multistep unipc:corrector=false"),
    (
        LAST,
        "dpmpp_multistep:lower_order_final=false "
        "sa_solver:tau=0:corrector_order=0:rule=bh2:largest=inf",
    ),
    (
        LAST,
        "dpmpp_2m_sde:rule=bh1:lower_order_final=false sa_solver:corrector_order=0:largest=inf",
    ),
    (
        "always",
        "deis:space=log_snr:order=3 "
        "dpm_solver_multistep:order=3:rule=exact:lower_order_final=false "
        "unipc:order=3:predict=eps:rule=exact:corrector=false:lower_order_final=false",
    ),
    ("always", "ipndm_v deis:space=ratio lms:to_clean=false"),
    (ABOVE, "lms ipndm_v"),
    ("always", "ipndm:order=2 gradient_estimation:ge_gamma=1.5"),
    ("always", "res dpmpp:rule=exact"),
    ("always", "res:predict=eps dpm_solver:rule=exact"),
    ("always", "res:order=3:c2=0.3:c3=0.6666666666666666 dpmpp:order=3:r1=0.3"),
    ("always", "etdrk:order=2 res:c2=1"),
    ("always", "unipc:order=1 sa_solver:tau=0:order=1:rule=bh2:largest=inf"),
    (
        LAST,
        "unipc:lower_order_final=false sa_solver:tau=0:corrector_order=3:rule=bh2:largest=inf",
    ),
)


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


def is_same(one: Canonical, other: Canonical) -> bool:
    """Return whether two canonical forms are equal, up to rounding."""
    return len(one.alpha) == len(other.alpha) and all(
        np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(one, other, strict=True)
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
