"""Fit orders of convergence by regression, in float64, on problems with exact denoisers.

The levels go smoothly from sigma / alpha = 4 to 0.2, so no step starts or ends at infinite log-SNR,
where every method is of order 1. Their log-SNR is quadratic in the place, so the first step is only
1 / N^2 long. Multistep methods start with low orders, of local error O(h^2). The short first step
keeps this error small, and orders up to 4 stay visible. Levels come from sigma / alpha itself, so
the schedule's table and its interpolation have no effect, except on DEIS in t. Its table is fine,
because sigma / alpha has a kink in t at every step of the schedule.
"""

import sys
from functools import partial

import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.samplers import coefficients
from diffusion_jax.tableau import analysis
from tests.interpreter import interpret, mixture

SCHEDULE = schedules.linear(10_000)
START, END = 4.0, 0.2
STEPS = np.array([60, 120, 240])
X = np.linspace(-2.5, 2.5, 21)  # use many points, because the error at a few can change sign
FAR = {"lower_order_final": False}
THIRD = partial(samplers.SAMPLERS["dpmpp"], order=3)
CASES = {
    "ddim": ("ddim", {}, 1),
    "euler": ("euler", {}, 1),
    "heun": ("heun", {}, 2),
    "heun in levels": ("heun", {"space": "levels"}, 2),
    "dpm2": ("dpm2", {}, 2),
    "edm without churn": ("edm", {"s_churn": 0.0}, 2),
    **{f"lms-{p}": ("lms", {"order": p}, p) for p in (1, 2, 3, 4)},
    **{f"ipndm-{p}": ("ipndm", {"order": p}, min(p, 2)) for p in (1, 2, 4)},
    "gradient_estimation": ("gradient_estimation", {}, 1),
    "stork 1": ("stork", {"derivatives": 1}, 2),
    "stork 3 with 10 stages": ("stork", {"derivatives": 3, "stages": 10}, 2),
    **{
        f"deis-{p} in {space}": ("deis", {"order": p, "space": space}, p)
        for space in ("t", "ratio", "log_snr")
        for p in (1, 2, 3, 4)
    },
    **{f"runge_kutta-{p}": ("runge_kutta", {"order": p}, p) for p in (1, 2, 3, 4)},
    "heunpp": ("heunpp", {}, 1),
    **{
        f"res-{p} {f}": ("res", {"order": p, "predict": f}, p)
        for p in (2, 3)
        for f in ("x0", "eps")
    },
    "res-3 c2 1 c3 1/2": ("res", {"order": 3, "c2": 1.0, "c3": 0.5}, 3),
    **{
        f"etdrk-{p} {f}": ("etdrk", {"order": p, "predict": f}, p)
        for p in (2, 3, 4)
        for f in ("x0", "eps")
    },
    **{
        f"{name} {p}S": (name, {"order": p}, p)
        for name in ("dpm_solver", "dpmpp")
        for p in (1, 2, 3)
    },
    **{
        f"{name} {p}M {rule}": (name, {"order": p, "rule": rule, **FAR}, p)
        for name in ("dpm_solver_multistep", "dpmpp_multistep")
        for p in (1, 2, 3)
        for rule in ("exact", "bh2")
    },
    **{
        f"unipc-{p} {rule} {predict}{' corrected' * corrected}": (
            "unipc",
            {"order": p, "rule": rule, "predict": predict, "corrector": corrected, **FAR},
            p + corrected,
        )
        for p in (1, 2)
        for rule in ("bh1", "bh2")
        for predict in ("x0", "eps")
        for corrected in (False, True)
    },
    "unipc-3 predictor": ("unipc", {"order": 3, "corrector": False, **FAR}, 3),
    "sa_solver 2 and 0": ("sa_solver", {"tau": 0.0, "corrector_order": 0, **FAR}, 2),
    "sa_solver 2 and 3": ("sa_solver", {"tau": 0.0, "corrector_order": 3, **FAR}, 3),
    "sa_solver 2 and 3 PECE": (
        "sa_solver",
        {"tau": 0.0, "corrector_order": 3, "pece": True, **FAR},
        3,
    ),
    "dpmpp_3m_sde without noise": ("dpmpp_3m_sde", {"eta": 0.0}, 3),
    "er_sde-1 without noise": ("er_sde", {"order": 1, "power": 1.0}, 1),
    "er_sde-2 without noise": ("er_sde", {"order": 2, "power": 1.0}, 2),
    "er_sde-3 without noise": ("er_sde", {"power": 1.0}, 2),
}
WEAK_STEPS = np.array([160, 320, 640])
WEAK = {  # with noise: the order of mean and deviation on Gaussian data
    "euler_ancestral": ("euler_ancestral", {}, 1),
    "dpm2_ancestral": ("dpm2_ancestral", {}, 2),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, 2),
    "dpmpp_sde": ("dpmpp_sde", {}, 2),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", FAR, 2),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, 2),
    **{f"seeds-{p}": ("seeds", {"order": p}, min(p, 2)) for p in (1, 2, 3)},
    **{f"er_sde-{p}": ("er_sde", {"order": p}, min(p, 2)) for p in (1, 2, 3)},
    "er_sde-3, the reverse SDE": ("er_sde", {"power": 2.0}, 2),
    "sa_solver": ("sa_solver", FAR, 2),
    "sa_solver PECE": ("sa_solver", {"pece": True, **FAR}, 2),
    "edm": ("edm", {"s_churn": 5.0}, 2),
    "edm, dpmpp 3S": ("edm", {"s_churn": 5.0, "base": THIRD}, 3),
    "restart": ("restart", {"restart_min": 0.3, "restart_max": 3.0}, 2),
}
FINER = {"deis-4 in log_snr", "etdrk-3 eps"}  # they need twice the steps


def levels(n: int) -> grids.Grid:
    place = (np.arange(n + 1) / n) ** 2
    return grids.at_ratio(SCHEDULE, np.append(START * (END / START) ** place[:-1], END))


def mixture_error(name: str, options: dict, n: int, exact: np.ndarray) -> float:
    tableau = samplers.SAMPLERS[name](SCHEDULE, levels(n), **options)
    return float(np.linalg.norm(interpret(tableau, mixture, X) - exact))


def fitted_order(case: str, exact: np.ndarray) -> float:
    name, options, _ = CASES[case]
    steps = STEPS * (2 if case in FINER else 1)
    errors = [mixture_error(name, options, n, exact) for n in steps]
    return analysis.fit_order(steps, np.array(errors))


def exact_end() -> np.ndarray:
    """Return the end of the flow, by the classical Runge-Kutta method in y = x / alpha, log(r)."""

    def slope(y: np.ndarray, log_ratio: float) -> np.ndarray:
        ratio = np.exp(log_ratio)
        return ratio * mixture(y, 0.0, 1.0, ratio)[1]

    start, end = levels(1).levels
    y, log_ratio = X / start.alpha, np.log(START)
    h = np.log(END / START) / 2000
    for _ in range(2000):
        k1 = slope(y, log_ratio)
        k2 = slope(y + h / 2 * k1, log_ratio + h / 2)
        k3 = slope(y + h / 2 * k2, log_ratio + h / 2)
        k4 = slope(y + h * k3, log_ratio + h)
        y, log_ratio = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), log_ratio + h
    return end.alpha * y


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return exact_end()


@pytest.mark.parametrize("case", CASES)
def test_order_on_a_mixture_of_gaussians(case: str, exact: np.ndarray) -> None:
    assert fitted_order(case, exact) == pytest.approx(CASES[case][-1], abs=0.15)


def test_unipc_3_with_its_corrector_is_of_order_3_at_least(exact: np.ndarray) -> None:
    for predict in ("x0", "eps"):
        options = {"order": 3, "predict": predict, **FAR}
        errors = np.array([mixture_error("unipc", options, n, exact) for n in STEPS])
        assert analysis.fit_order(STEPS, errors) > 3


def test_stork_has_order_2_and_needs_the_places_of_its_stages(
    exact: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move the stages towards the start of the step. The method is then of order 1."""

    def order() -> float:
        errors = np.array([mixture_error("stork", {"stages": 10}, n, exact) for n in STEPS])
        return analysis.fit_order(STEPS, errors)

    assert 2 < order() < 3
    module = sys.modules["diffusion_jax.samplers.stork"]
    places = module.abscissae
    monkeypatch.setattr(module, "abscissae", lambda stages: 0.8 * places(stages))
    assert order() == pytest.approx(1, abs=0.15)


def test_3m_needs_the_whole_second_derivative(
    exact: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halve the second derivative, as widespread code does. The method is then of order 2."""
    exact_moments = coefficients.exponential_moments

    def halved(kappa: float, count: int) -> np.ndarray:
        return exact_moments(kappa, count) / np.array([1.0, 2.0])[:count]

    monkeypatch.setattr(coefficients, "exponential_moments", halved)
    options = {"order": 3, **FAR}
    errors = np.array([mixture_error("dpmpp_multistep", options, n, exact) for n in STEPS])
    assert analysis.fit_order(STEPS, errors) == pytest.approx(2, abs=0.15)


def weak_errors(name: str, options: dict, steps: np.ndarray) -> np.ndarray:
    data = analysis.Gaussian(np.array([0.5, -1.0, 0.0]), np.array([0.3, 0.02, 2.0]))
    tableaus = [samplers.SAMPLERS[name](SCHEDULE, levels(n), **options) for n in steps]
    return np.array([analysis.error(each, data, SCHEDULE.at_ratio(END)) for each in tableaus])


@pytest.mark.parametrize("case", WEAK)
def test_weak_order_on_gaussian_data(case: str) -> None:
    name, options, order = WEAK[case]
    fitted = analysis.fit_order(WEAK_STEPS, weak_errors(name, options, WEAK_STEPS))
    assert fitted == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm2", "dpm_solver", "dpmpp", "dpmpp_multistep"])
def test_order_on_gaussian_data_without_sampling(name: str) -> None:
    order = 1 if name == "ddim" else 2
    errors = weak_errors(name, {}, STEPS)
    assert analysis.fit_order(STEPS, errors) == pytest.approx(order, abs=0.15)
