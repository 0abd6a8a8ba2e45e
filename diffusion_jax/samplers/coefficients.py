"""The coefficients that multistep and multi-stage methods share.

Let l = log(alpha / sigma) and h = l_j - l_i. The probability-flow ODE is solved by (DPM-Solver,
arXiv:2206.00927, eq. 3.4; DPM-Solver++, arXiv:2211.01095, eq. 8)

    x_j = (alpha_j / alpha_i) x_i - alpha_j int exp(-l) eps(l) dl
        = (sigma_j / sigma_i) x_i + sigma_j int exp(l) x0(l) dl

and the SDEs with the same marginals (SA-Solver, arXiv:2309.05019; eta = tau^2) by

    x_j = (sigma_j / sigma_i) exp(-eta h) x_i + sigma_j sqrt(1 - exp(-2 eta h)) xi
        + alpha_j (1 + eta) int exp(-(1 + eta) (l_j - l)) x0(l) dl.

All three integrals are  scale * int_0^1 kappa exp(-kappa (1 - s)) f(s) ds,  s = (l - l_i) / h:

    f = x0: scale = alpha_j, kappa = (1 + eta) h;        f = eps: scale = sigma_j, kappa = -h.

A constant f gives DDIM. Every method is therefore DDIM plus  scale * sum_k c_k (f_k - f_0),  where
the weights c integrate the polynomial through the known f_k exactly.
"""

import math

import numpy as np
from numpy import ndarray


def phi(order: int, z: float) -> float:
    """Return phi_k(z) = sum_n z^n / (n + k)!. So phi_0 = exp and phi_1 = (exp(z) - 1) / z.

    The recurrence z phi_{k+1} = phi_k - 1 / k! loses digits near zero, so the series is used there.
    """
    if abs(z) < 1:
        return sum(z**n / math.factorial(n + order) for n in range(20))
    value = math.exp(z)
    for k in range(order):
        value = (value - 1 / math.factorial(k)) / z
    return value


def exponential_moments(kappa: float, count: int) -> ndarray:
    """Return int_0^1 kappa exp(-kappa (1 - s)) s^p ds for p = 1 .. count.

    The integral equals kappa p! phi_{p+1}(-kappa).
    """
    return np.array([kappa * math.factorial(p) * phi(p + 1, -kappa) for p in range(1, count + 1)])


def difference_weights(nodes: ndarray, moments: ndarray) -> ndarray:
    """Return the c with sum_k c_k nodes_k^p = moments_p for p = 1 .. n: weights of f_k - f_0.

    f_0 is at 0 and f_k at nodes_k. Polynomials up to degree n are integrated exactly.
    """
    powers = np.arange(1, len(nodes) + 1)[:, None]
    return np.linalg.solve(nodes**powers, moments)


def exponential_weights(kappa: float, nodes: ndarray, rule: str = "exact") -> ndarray:
    """Return the difference_weights of the exponential integral.

    rule: how the weight of a single difference is chosen (UniPC, arXiv:2302.04867). It is "exact",
    or a_1 = 1/2 times B(h), where B(h) is kappa for "bh1" and 1 - exp(-kappa) for "bh2". All three
    agree to the order of the method.
    """
    if len(nodes) == 1 and rule != "exact":
        total = kappa if rule == "bh1" else -math.expm1(-kappa)
        return total / 2 / nodes
    return difference_weights(nodes, exponential_moments(kappa, len(nodes)))
