"""Test every sampler on every grid, identities between samplers, and properties of each one."""

import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.samplers import SAMPLERS, Tableau
from diffusion_jax.samplers.coefficients import exponential_moments, phi
from diffusion_jax.sampling.draw import REGISTERS
from diffusion_jax.tableau import XI, analysis, check, for_cfg_pp
from diffusion_jax.tableau.identity import canonical, is_same
from diffusion_jax.typing import InputError, RunWarning
from tests.interpreter import interpret, mixture

SCHEDULE = schedules.linear(1000)
TWO_CALLS = {"heun", "dpm2", "dpm2_ancestral", "dpm_solver", "dpmpp", "edm"}
TWO_CALLS |= {"dpmpp_2s_ancestral", "dpmpp_sde", "seeds", "res"}
THREE_CALLS = {"runge_kutta", "etdrk", "heunpp"}
STOCHASTIC = {
    "ddpm",
    "euler_ancestral",
    "dpm2_ancestral",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "seeds",
    "er_sde",
    "sa_solver",
    "edm",
    "restart",
    "consistency",
}


def as_map(tableau: Tableau) -> np.ndarray:
    """Return the weights of x, x0 and xi in x', where eps = (x - alpha x0) / sigma."""
    x, x0, eps, xi = tableau.mix[:, 0, :4].T
    return np.stack([x + eps / tableau.sigma, x0 - eps * tableau.alpha / tableau.sigma, xi], 1)


# --- every sampler -----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [name for name in grids.GRIDS if name != "levels"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_on_every_grid_and_number_of_steps(name: str, grid: str) -> None:
    schedule = schedules.course(40)
    for n in (1, 2, 3, 7, 40):
        tableau = check(samplers.build(name, schedule, n, grid))
        first = samplers.build("ddim", schedule, n, grid)
        assert tableau.registers <= REGISTERS
        assert tableau.ends_step.sum() == n or name == "restart"
        assert not np.any(tableau.mix[-1, 0, XI]), "the last step adds no noise"
        same = (tableau.t[0], tableau.alpha[0]) == (first.t[0], first.alpha[0])
        assert same or name == "edm"


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_evaluations(name: str) -> None:
    """Expect the same in each step, and one in the step to clean data. PLMS has one more.

    So has STORK. Heun++ has one less, because it looks ahead over two steps.
    """
    for n in (2, 9):
        tableau = samplers.build(name, SCHEDULE, n)
        if name == "restart":
            assert tableau.rows >= 2 * n - 1
        else:
            calls = 1 + (name in TWO_CALLS) + 2 * (name in THREE_CALLS)
            more = (name in ("pndm", "stork")) - (name == "heunpp")
            assert tableau.rows == calls * n - (calls - 1) + more


@pytest.mark.parametrize("name", SAMPLERS)
def test_which_samplers_are_stochastic(name: str) -> None:
    mix = samplers.build(name, SCHEDULE, 20).mix
    assert bool(np.any(mix[:, :, XI])) == (name in STOCHASTIC)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("family", ["vp", "ve", "flow"])
def test_moments_on_gaussian_data(name: str, family: str) -> None:
    """Take many steps. They must reach the data's mean and variance, however noise is added."""
    schedule = {
        "vp": SCHEDULE,
        "ve": schedules.karras(1000, 0.005, 20.0),
        "flow": schedules.flow(1000),
    }[family]
    data = analysis.Gaussian(np.array([0.4, -0.8]), np.array([0.25, 1.5]))
    grid = {"vp": "uniform_logsnr", "ve": "karras", "flow": "trailing"}[family]
    if name == "consistency":  # it is exact only for the exact consistency function
        pytest.skip("its denoiser is a consistency function, not a posterior mean")
    few, many = (analysis.error(samplers.build(name, schedule, n, grid), data) for n in (10, 400))
    assert many < 0.03
    assert many < few


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", ["flow", "rescaled"])
def test_pure_noise_and_clean_data_give_no_infinity(name: str, schedule: str) -> None:
    """Step from alpha = 0 to sigma = 0. The first row may use x only through x0."""
    made = schedules.flow(100)
    if schedule == "rescaled":
        made = schedules.rescale_zero_terminal_snr(schedules.linear(100))
    assert made.alpha[-1] == 0
    for n in (1, 2, 3, 10):
        tableau = samplers.build(name, made, n)
        x = np.linspace(-2, 2, 5)
        noise = np.random.default_rng(0).standard_normal((tableau.rows, 5))
        assert np.all(np.isfinite(interpret(tableau, mixture, x, noise)))
        assert np.abs(tableau.mix).max() < 1e3


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {}),
        ("lms", {"order": 1}),
        ("pndm", {"order": 1}),
        ("ipndm", {"order": 1}),
        ("ipndm_v", {"order": 1}),
        ("gradient_estimation", {"ge_gamma": 1.0}),
        ("deis", {"order": 1}),
        ("runge_kutta", {"order": 1}),
        ("dpm_solver", {"order": 1}),
        ("dpmpp", {"order": 1}),
        ("dpmpp_multistep", {"order": 1}),
        ("dpm_solver_multistep", {"order": 1}),
        ("unipc", {"order": 1, "corrector": False}),
        ("unipc", {"order": 1, "corrector": False, "predict": "eps"}),
        ("sa_solver", {"order": 1, "corrector_order": 0, "tau": 0.0}),
    ],
    ids=str,
)
def test_every_method_of_order_1_is_ddim(name: str, options: dict, n: int) -> None:
    ours = samplers.build(name, SCHEDULE, n, **options)
    ddim = samplers.build("ddim", SCHEDULE, n)
    assert np.allclose(as_map(ours), as_map(ddim), atol=1e-12, rtol=0)


def test_euler_is_the_step_in_sigma_over_alpha() -> None:
    """Write out EDM's y' = y + (r_j - r_i) eps."""
    grid = grids.trailing(SCHEDULE, 20)
    for row, weights in enumerate(as_map(samplers.ddim(SCHEDULE, grid))):
        y, eps = 0.3 / grid.alpha[row], (0.3 - grid.alpha[row] * 0.7) / grid.sigma[row]
        y += (grid.ratio[row + 1] - grid.ratio[row]) * eps
        assert weights @ [0.3, 0.7, 0] == pytest.approx(grid.alpha[row + 1] * y, abs=1e-12)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "sa_solver"])
def test_first_order_sdes_are_ddim_with_eta_1(name: str) -> None:
    options = {
        "euler_ancestral": {},
        "dpmpp_2m_sde": {"order": 1},
        "sa_solver": {"order": 1, "corrector_order": 0},
    }[name]
    ours = samplers.build(name, SCHEDULE, 25, **options)
    ddim = samplers.build("ddim", SCHEDULE, 25, eta=1.0)
    assert np.allclose(as_map(ours), as_map(ddim), atol=1e-12, rtol=0)


def test_ddim_with_eta_1_on_the_full_grid_is_ddpm() -> None:
    ddim = samplers.build("ddim", SCHEDULE, 1000, eta=1.0)
    ddpm = samplers.build("ddpm", SCHEDULE, 1000, variance="posterior")
    assert np.allclose(as_map(ddim), as_map(ddpm), atol=1e-12, rtol=0)


def test_unipc_2_without_corrector_is_2m() -> None:
    unipc = samplers.build("unipc", SCHEDULE, 10, corrector=False)
    multistep = samplers.build("dpmpp_multistep", SCHEDULE, 10, lower_order_final=True)
    assert np.allclose(unipc.mix, multistep.mix, atol=1e-12, rtol=0)


# --- coefficients ------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-30.0, -1.0001, -0.9999, -1e-9, 0.0, 1e-5, 0.3, 2.0])
def test_phi_is_its_integral(z: float) -> None:
    """Integrate phi_k(z) = int_0^1 exp((1 - s) z) s^(k-1) / (k-1)! ds by Gauss's method."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    s, factorial = (nodes + 1) / 2, 1
    for k in range(1, 5):
        integral = np.sum(weights / 2 * np.exp((1 - s) * z) * s ** (k - 1)) / factorial
        assert phi(k, z) == pytest.approx(integral, rel=1e-12)
        factorial *= k
    moments = [np.sum(weights / 2 * z * np.exp(-z * (1 - s)) * s**p) for p in (1, 2, 3)]
    assert np.allclose(exponential_moments(z, 3), moments, rtol=1e-11, atol=1e-15)


# --- single samplers ---------------------------------------------------------------------------


def test_edm_is_algorithm_2() -> None:
    """Write out Karras et al., algorithm 2, for x = y, with its noise before each step."""
    schedule = schedules.karras(1000)
    grid = grids.at(schedule, np.append(np.arange(900.0, 0, -90), 0.0))
    options = {"s_churn": 5.0, "s_min": 0.1, "s_max": 30.0, "s_noise": 1.05}
    tableau = samplers.edm(schedule, grid, **options)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((tableau.rows, 5))
    y = start = rng.standard_normal(5) * grid.sigma[0]
    row, sigmas = 0, grid.sigma
    for i in range(grid.steps):
        gamma = min(5.0 / grid.steps, np.sqrt(2) - 1) if 0.1 <= sigmas[i] <= 30 else 0
        hat = sigmas[i] * (1 + gamma)
        if gamma:
            y = y + np.sqrt(hat**2 - sigmas[i] ** 2) * 1.05 * noise[row - 1]
        slope = mixture(y, 0, 1.0, hat)[1]
        following = y + (sigmas[i + 1] - hat) * slope
        row += 1
        if sigmas[i + 1]:
            other = mixture(following, 0, 1.0, sigmas[i + 1])[1]
            following = y + (sigmas[i + 1] - hat) * (slope + other) / 2
            row += 1
        y = following
    assert np.allclose(interpret(tableau, mixture, start, noise), y, atol=1e-12)


def test_restart_without_repeats_is_heun_and_each_repeat_walks_the_interval_again() -> None:
    grid = grids.karras(SCHEDULE, 12)
    heun = samplers.heun(SCHEDULE, grid)
    none = samplers.restart(SCHEDULE, grid, repeats=0)
    assert all(np.array_equal(a, b) for a, b in zip(heun, none, strict=True))
    inside = (grid.ratio >= 0.1) & (grid.ratio <= 2.0)
    twice = samplers.restart(SCHEDULE, grid, repeats=2, restart_min=0.1, restart_max=2.0)
    assert twice.rows == heun.rows + 2 * 2 * (inside.sum() - 1)
    noisy = np.flatnonzero(twice.mix[:, 0, XI])
    low, high = grid.ratio[inside][[-1, 0]]
    alpha = grid.alpha[inside][0]
    assert len(noisy) == 2
    assert np.allclose(twice.mix[noisy, 0, XI], alpha * np.sqrt(high**2 - low**2), atol=1e-12)


def test_ddpm_with_given_variances() -> None:
    grid = grids.trailing(SCHEDULE, 4)
    given = np.array([0.3, 0.2, 0.1, 0.0])
    tableau = samplers.ddpm(SCHEDULE, grid, variance=given)
    assert np.allclose(tableau.mix[:, 0, XI] ** 2, given, atol=1e-15)
    plain = samplers.ddpm(SCHEDULE, grid)
    assert np.array_equal(tableau.mix[:, 0, :XI], plain.mix[:, 0, :XI])


def test_inversion_undoes_ddim() -> None:
    """Go there and back on a nonlinear problem. The error must fall as 1 / N."""
    image = np.linspace(-1.8, 1.5, 9)
    errors = []
    for n in (100, 200, 400):
        grid = grids.linspace(SCHEDULE, n)
        noise = interpret(samplers.ddim_inversion(SCHEDULE, grid), mixture, image)
        errors.append(
            np.abs(interpret(samplers.ddim(SCHEDULE, grid), mixture, noise) - image).max()
        )
    assert errors[0] < 0.05
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def test_inversion_never_calls_the_network_on_clean_data() -> None:
    tableau = samplers.ddim_inversion(SCHEDULE, grids.trailing(SCHEDULE, 5))
    assert tableau.t.tolist() == [200, 400, 600, 800, 1000]
    assert np.all(tableau.sigma > 0)


def test_consistency_starts_again_from_the_image_in_each_step() -> None:
    tableau = samplers.build("consistency", SCHEDULE, 4)
    grid = grids.trailing(SCHEDULE, 4)
    assert np.array_equal(tableau.mix[:, 0, 1], grid.alpha[1:])
    least = grid.alpha[1:] * SCHEDULE.ratio[1]  # algorithm 1: sqrt(t^2 - epsilon^2)
    noise = np.sqrt(grid.sigma[1:-1] ** 2 - least[:-1] ** 2)
    assert np.allclose(tableau.mix[:, 0, XI], [*noise, 0], rtol=1e-12)
    assert not np.any(tableau.mix[:, 0, [0, 2]])


def test_sa_solvers_noise_is_in_force_where_it_is_asked_for() -> None:
    tableau = samplers.build("sa_solver", SCHEDULE, 10, tau_from=0.25, tau_to=0.75)
    end = np.append(tableau.t[1:], 0)  # where the authors' code evaluates tau
    assert np.array_equal(tableau.mix[:, 0, XI] > 0, (end >= 250) & (end <= 750))


@pytest.mark.parametrize("grid", [name for name in grids.GRIDS if name not in ("levels", "ays")])
@pytest.mark.parametrize("make", [schedules.course, schedules.linear, schedules.cosine])
def test_sa_solver_does_not_overshoot_on_any_grid_but_ays(make, grid: str) -> None:
    """Bound the deviation over the data's: at most 1.31 (of 0.5) and 1.61 (of 1) seen; once 7."""
    for n in (3, 5, 10, 25, 50):
        tableau = samplers.build("sa_solver", make(500), n, grid)
        data = analysis.Gaussian(np.zeros(3), np.array([0.2, 0.5, 1.0]) ** 2)
        ratio = np.sqrt(analysis.push(tableau, data).variance / data.variance)
        assert ratio[1] < 1.35, (n, ratio)
        assert ratio.max() < 1.7, (n, ratio)


@pytest.mark.parametrize("grid", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("name", ["dpmpp_multistep", "dpm_solver_multistep", "unipc"])
def test_the_last_step_between_finite_log_snrs_is_lowered(name: str, grid: str) -> None:
    """Expect order 1, which is DDIM, also for methods of order 2."""
    more = {"corrector": False} if name == "unipc" else {}
    ddim = as_map(samplers.build("ddim", SCHEDULE, 12, grid))
    for lower in (False, True):
        options = {"order": 2, "lower_order_final": lower, **more}
        tableau = samplers.build(name, SCHEDULE, 12, grid, **options)
        same = np.isclose(as_map(tableau), ddim, atol=1e-12, rtol=0).all(1)
        remembers = tableau.mix[:, 0, 4:].any(1)
        assert (same & ~remembers).tolist() == [True, *[False] * 9, lower, True]


def test_dpm_solver_lowers_the_last_steps_of_fewer_than_10() -> None:
    for n in (9, 10):
        ours = samplers.build("dpmpp_multistep", SCHEDULE, n)
        lowered = samplers.build("dpmpp_multistep", SCHEDULE, n, lower_order_final=True)
        assert np.array_equal(ours.mix, lowered.mix) == (n < 10)


def test_tables_that_are_unstable_on_gaussian_data_are_named() -> None:
    cosine = schedules.cosine(500)
    with pytest.warns(RunWarning, match="pndm with 5 steps on this grid is unstable"):
        samplers.build("pndm", cosine, 5)
    samplers.build("pndm", cosine, 50)
    samplers.build("ddim", cosine, 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_which_samplers_cfg_pp_takes_and_that_they_stay_the_same_without_it(name: str) -> None:
    tableau = samplers.build(name, SCHEDULE, 9)
    without = {"ddpm", "heun", "dpm2", "dpm2_ancestral", "pndm", "dpm_solver", "edm", "restart"}
    if name in without | {"runge_kutta", "heunpp", "stork"}:
        with pytest.raises(InputError, match="its steps do not end in a predicted image"):
            for_cfg_pp(tableau)
        return
    assert is_same(canonical(tableau), canonical(for_cfg_pp(tableau)))


def test_lower_order_final_lowers_only_the_last_steps() -> None:
    """Use that order 1 needs no earlier prediction, order 2 needs one, and order 3 needs two."""
    used = {}
    for lower in (False, True):
        mix = samplers.build("dpmpp_multistep", SCHEDULE, 20, order=3, lower_order_final=lower).mix
        used[lower] = (mix[:, 0, 4:] != 0).sum(axis=1).tolist()
    assert used[False] == [0, 1, *[2] * 17, 0]
    assert used[True] == [0, 1, *[2] * 15, 1, 0, 0]


# --- input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "options", "message"),
    [
        ("lms", 2, {"order": 4}, "order=4: 2 steps hold at most 2"),
        ("unipc", 9, {"order": 4}, r"order=4: it must be in 1\.\.3"),
        ("stork", 9, {"stages": 1}, r"stages=1: it must be in 2\.\.200"),
        ("stork", 9, {"derivatives": 4}, r"derivatives=4: it must be in 1\.\.3"),
        ("deis", 9, {"order": 0}, r"order=0: it must be in 1\.\.4"),
        ("deis", 9, {"space": "rho"}, "space='rho' is unknown: choose from t, ratio, log_snr"),
        ("lms", 9, {"space": "log_snr"}, "to_clean=true: log_snr is infinite there"),
        ("gradient_estimation", 9, {"ge_gamma": 0.5}, "ge_gamma=0.5: it must be at least 1"),
        ("runge_kutta", 9, {"order": 5}, r"order=5: it must be in 1\.\.4"),
        ("etdrk", 9, {"order": 1}, r"order=1: it must be in 2\.\.4"),
        ("res", 9, {"order": 4}, "order=4: it must be 2 or 3"),
        ("res", 9, {"predict": "v"}, "predict='v': it must be x0 or eps"),
        ("res", 9, {"order": 3, "c2": 2 / 3}, "c2=2/3 needs order=2"),
        ("dpm_solver", 9, {"order": 5}, r"order=5: it must be in 1\.\.3"),
        ("seeds", 9, {"eta": 0.0}, "eta=0.0: it must be above 0 and at most 10"),
        ("seeds", 9, {"order": 3, "r1": 1.0}, "r1=1 needs order=2"),
        ("dpmpp_sde", 9, {"eta": 1.5}, r"eta=1.5: it must be in \[0, 1\]"),
        ("er_sde", 9, {"power": 0.5}, "power=0.5: it must be from 1 to 10"),
        ("edm", 9, {"churn": (0.1, 0.2)}, "it must be 9 numbers, one a step, 0 or more"),
        ("dpm_solver", 9, {"r1": 1.5}, "they must obey 0 < r1 < r2 < 1"),
        ("dpm_solver", 9, {"predict": "v"}, "predict='v': it must be x0 or eps"),
        ("unipc", 9, {"rule": "bh3"}, "rule='bh3': it must be exact, bh1 or bh2"),
        ("dpmpp_2m_sde", 9, {"eta": -1.0}, "it must be 0 or more"),
        ("dpm_solver_multistep", 9, {"eta": 1.0}, "noise needs predict='x0'"),
        ("euler_ancestral", 9, {"eta": 2.0}, r"eta=2.0: it must be in \[0, 1\]"),
        ("sa_solver", 9, {"tau": -0.5}, "tau=-0.5: it must be 0 or more"),
        ("sa_solver", 9, {"tau_from": 0.9, "tau_to": 0.1}, "tau_from <= tau_to"),
        ("sa_solver", 9, {"corrector_order": 1}, "corrector_order=1: it must be 0, 2, 3 or 4"),
        ("edm", 9, {"s_churn": float("nan")}, "s_churn=nan: it must be 0 or more"),
        ("edm", 9, {"s_max": 0.01}, "s_max=0.01: it must be at least s_min, 0.05"),
        ("restart", 9, {"repeats": -1}, "repeats=-1: it must be 0 or more"),
        ("sa_solver", 9, {"largest": 0.0}, "largest=0.0: it must be above 0"),
        ("restart", 9, {"restart_min": 3.0}, "they must obey 0 < min < max"),
        ("heun", 9, {"space": "time"}, "space='time': it must be ratio or levels"),
        ("ddpm", 3, {"variance": [0.1, 0.1]}, "it must be 3 numbers, one a step"),
        ("ddpm", 2, {"variance": [0.1, -0.1]}, "it must be 2 numbers, one a step"),
        ("ddim", 9, {"rho": 3.0}, "ddim has no option rho: choose from eta"),
        ("heun", 9, {"eta": 0.5}, "heun has no option eta: choose from space"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(name: str, n: int, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        samplers.build(name, SCHEDULE, n, **options)
    assert "\n" not in str(error.value)


def test_options_of_the_grid_and_grids_that_are_given() -> None:
    steep = samplers.build("heun", SCHEDULE, 5, "karras:rho=3")
    assert np.array_equal(steep.t, samplers.heun(SCHEDULE, grids.karras(SCHEDULE, 5, rho=3.0)).t)
    grid = grids.at(SCHEDULE, np.array([900.0, 400.0, 0.0]))
    assert samplers.build("ddim", SCHEDULE, 2, grid).t.tolist() == [900, 400]
    with pytest.raises(InputError, match="steps=3: the grid given has 2"):
        samplers.build("ddim", SCHEDULE, 3, grid)
    upwards = grids.Grid(*(column[::-1] for column in grid))
    with pytest.raises(InputError, match="must fall strictly"):
        samplers.build("ddim", SCHEDULE, 2, upwards)
