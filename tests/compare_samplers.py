"""Compare whole sampling runs of ours with those of diffusers, on the same network and noise.

  python -m tests.compare_samplers > docs/samplers.md

Both share the betas, the levels, the initial state, the noise of each step, and a small fixed
network of image and time. Ours are runs of the compiled loop in single precision. Theirs are
unchanged.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.diffusion.guidance import network_denoiser
from diffusion_jax.diffusion.predictions import build
from diffusion_jax.samplers import Tableau, coefficients
from diffusion_jax.samplers.adams import EVEN
from diffusion_jax.samplers.multistep import exponential_multistep, step_orders
from diffusion_jax.tableau import XI, Row, analysis, pad, symbols, tabulate, to_float32
from diffusion_jax.typing import Level, Prediction
from tests import test_authors, test_identity, test_sampler_orders

T = 1000
SHAPE = (3, 4, 4, 2)
WEIGHT = np.random.default_rng(1).normal(size=(2, 2)) / 2
ROWS, REGISTERS = 256, 3
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
SCHEDULE = schedules.scaled_linear(T)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012}
KEYS = samplers.sample_keys(jax.random.key(5), jnp.arange(SHAPE[0], dtype=jnp.uint32))


class Case(NamedTuple):
    """A scheduler of theirs with its options, and our tableau for its steps.

    ours: a function from their scheduler, after set_timesteps, to our tableau.
    why: the fault in theirs, or empty if the two should agree.
    as_theirs: our tableau with their fault, if it can be written.
    rounded: whether theirs rounds the times that the network gets; ours then gets the same times.
    """

    name: str
    theirs: str
    options: dict[str, Any]
    steps: int
    ours: Callable[[Any], Tableau]
    why: str = ""
    rounded: bool = False
    step_options: dict[str, Any] = {}  # noqa: RUF012
    predictions: tuple[str, ...] = ("eps", "v")
    as_theirs: Callable[[Any], Tableau] | None = None

    @property
    def label(self) -> str:
        """Return the name of the case in the table and in the tests."""
        return f"{self.name}, {self.steps} steps, {' and '.join(self.predictions)}"


def network(x: Any, t: Any, xp: Any) -> Any:
    """Compute a smooth function of image and time in [0, 1], for PyTorch and JAX."""
    weight = jnp.asarray(WEIGHT, x.dtype) if xp is jnp else torch.tensor(WEIGHT, dtype=x.dtype)
    return xp.tanh(x @ weight + 2 * t) + x / 4


def relative_error(case: Case, prediction: str) -> float:
    """Return |ours - theirs| / |theirs| of the final states. prediction: one of the case's."""
    options = {"num_train_timesteps": T, **case.options}
    if prediction in PREDICTIONS:
        options |= {**BETAS, "prediction_type": PREDICTIONS[prediction]}
    scheduler = getattr(diffusers, case.theirs)(**options)
    scheduler.set_timesteps(case.steps)
    tableau = case.ours(scheduler)
    if case.rounded:
        shown = scheduler.timesteps.numpy() + 1.0
        assert np.all(np.abs(shown - tableau.t) <= 1)
        tableau = tableau._replace(t=shown)
    x = samplers.row_noise(KEYS, jnp.uint32(2**32 - 1), SHAPE[1:])
    theirs = run_theirs(scheduler, np.asarray(x), float(tableau.alpha[0]), case.step_options)
    ours = run_ours(prediction)(to_float32(pad(tableau, ROWS, REGISTERS)), x, tableau.rows)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def edm_denoiser(x: jax.Array, level: Level) -> Prediction:
    """Call the network with the input and time of EDM's preconditioning (table 1)."""
    scaled = x / jnp.sqrt(level.sigma**2 + jnp.float32(0.25))
    time = jnp.log(level.sigma) / jnp.float32(4 * T)
    return build("edm").decode(network(scaled, time, jnp), x, level)


def _compiled() -> Callable[[str], Callable]:
    def make(prediction: str) -> Callable:
        shift = jnp.float32(0 if prediction == "flow" else 1 / T)  # the time of their index 0
        denoise = network_denoiser(
            lambda x, t, context: network(x, t - shift, jnp),
            build(prediction),
            T,
            jnp.zeros((SHAPE[0], 0), jnp.float32),
        )
        if prediction == "edm":
            denoise = edm_denoiser
        return jax.jit(
            lambda tableau, x, rows: samplers.solve(denoise, tableau, x, KEYS, rows=rows)[0]
        )

    runs = {prediction: make(prediction) for prediction in (*PREDICTIONS, "flow", "edm")}
    return runs.__getitem__


run_ours = _compiled()


def run_theirs(scheduler: Any, x: np.ndarray, alpha: float, step_options: dict) -> np.ndarray:
    """Run their loop as in their pipelines. The noise of step r is that of our row r."""
    row = 0

    def noise(shape: tuple, **_: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(samplers.row_noise(KEYS, jnp.uint32(row), SHAPE[1:])))

    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    module.randn_tensor = noise
    x = torch.tensor(x)
    if getattr(scheduler, "init_noise_sigma", 1) != 1:  # theirs is x / alpha
        x = x / alpha
    try:
        for row, t in enumerate(scheduler.timesteps):  # noqa: B007
            scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
            output = network(scale(x, t), t / T, torch)
            x = scheduler.step(output, t, x, **step_options).prev_sample
    finally:
        module.randn_tensor = original
    return x.numpy()


def at_their_times(end: float = 0.0) -> Callable[[Any], Grid]:
    """Return our grid through the times of their scheduler, whose index 0 is our step 1."""

    def grid(scheduler: Any) -> Grid:
        times = np.unique(scheduler.timesteps.numpy())[::-1] + 1.0
        return grids.at(SCHEDULE, np.append(times, end), end=end)

    return grid


def named(name: str, steps: int, **options: Any) -> Callable[[Any], Grid]:
    """Return one of our grids, whatever theirs is."""
    return lambda scheduler: grids.GRIDS[name](SCHEDULE, steps, **options)


def tableau_of(
    sampler: str, grid: Callable[[Any], Grid], **options: Any
) -> Callable[[Any], Tableau]:
    """Return our sampler over a grid."""
    return lambda scheduler: samplers.SAMPLERS[sampler](SCHEDULE, grid(scheduler), **options)


def every(grid: Callable[[Any], Grid], stride: int) -> Callable[[Any], Grid]:
    """Return each stride-th level of a grid, and its end: the steps of their single-step method."""

    def coarse(scheduler: Any) -> Grid:
        columns = grid(scheduler)
        return Grid(*(np.append(column[:-1:stride], column[-1]) for column in columns))

    return coarse


def _cases() -> list[Case]:
    return [*_ancestral(), *_in_ratio(), *_multistep(), *_singlestep(), *_others()]


def _ancestral() -> list[Case]:
    plain = {"clip_sample": False}
    leading, trailing = named("leading", 100), named("trailing", 50)
    make = tableau_of("ddpm", leading, variance="posterior")
    small, large = {"variance_type": "fixed_small"}, {"variance_type": "fixed_large"}
    cases = [
        Case("DDPM, posterior variance", "DDPMScheduler", plain | small, 100, make),
        Case(
            "DDPM, variance beta", "DDPMScheduler", plain | large, 100, tableau_of("ddpm", leading)
        ),
    ]
    options = plain | {"timestep_spacing": "trailing"}
    for eta in (0.0, 0.5, 1.0):
        ours, step = tableau_of("ddim", trailing, eta=eta), {"eta": eta}
        name = f"DDIM, eta {eta:g}"
        cases.append(Case(name, "DDIMScheduler", options, 50, ours, step_options=step))
    return cases


def _in_ratio() -> list[Case]:
    """Return the methods in sigma / alpha, on their even times and on Karras's levels."""
    cases = []
    for name, theirs, ours in (
        ("Euler", "EulerDiscreteScheduler", "euler"),
        ("Euler ancestral", "EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("Heun", "HeunDiscreteScheduler", "heun"),
        ("DPM2", "KDPM2DiscreteScheduler", "dpm2"),
        ("DPM2 ancestral", "KDPM2AncestralDiscreteScheduler", "dpm2_ancestral"),
        ("LMS, order 4", "LMSDiscreteScheduler", "lms"),
    ):
        even, options = tableau_of(ours, named("leading", 25)), {"timestep_spacing": "leading"}
        cases.append(Case(name, theirs, options, 25, even))
        if theirs == "EulerAncestralDiscreteScheduler":
            continue
        karras = tableau_of(ours, named("karras", 20))
        options = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
        cases.append(Case(f"{name}, Karras", theirs, options, 20, karras, rounded=True))
    return cases


def _multistep() -> list[Case]:
    dpm = "DPMSolverMultistepScheduler"
    zero, least = at_their_times(), at_their_times(1.0)
    to_least = {"final_sigmas_type": "sigma_min"}
    cases = []
    for steps in (10, 25):
        for order in (1, 2):
            ours, options = (
                tableau_of("dpmpp_multistep", zero, order=order),
                {"solver_order": order},
            )
            cases.append(Case(f"DPM-Solver++ {order}M", dpm, options, steps, ours))
        ours = tableau_of("dpmpp_multistep", zero, order=2, rule="exact")
        cases.append(Case("DPM-Solver++ 2M, heun", dpm, {"solver_type": "heun"}, steps, ours))
        ours = tableau_of("dpmpp_multistep", zero, order=3)
        options = {"solver_order": 3, "lower_order_final": False}
        cases.append(
            Case("DPM-Solver++ 3M", dpm, options, steps, ours, HALVED, as_theirs=halved(ours))
        )
    karras = tableau_of("dpmpp_multistep", named("karras", 20))
    options = {"use_karras_sigmas": True}
    cases.append(Case("DPM-Solver++ 2M, Karras", dpm, options, 20, karras, rounded=True))
    for order in (1, 2, 3):
        options = {"solver_order": order, "algorithm_type": "dpmsolver", **to_least}
        ours = tableau_of("dpm_solver_multistep", least, order=order)
        case = Case(f"DPM-Solver {order}M, to step 1", dpm, options, 25, ours)
        if order == 3:
            case = case._replace(why=HALVED, as_theirs=halved(ours))
        cases.append(case)
    for order in (1, 2):
        options = {"solver_order": order, "algorithm_type": "sde-dpmsolver++"}
        ours = tableau_of("dpmpp_2m_sde", zero, order=order)
        cases.append(Case(f"SDE-DPM-Solver++ {order}M", dpm, options, 25, ours))
    for order in (1, 2, 3):
        options = {"solver_order": order}
        ours = tableau_of("deis", least, order=order, space="log_snr")
        cases.append(
            Case(f"DEIS, order {order}, to step 1", "DEISMultistepScheduler", options, 25, ours)
        )
    return cases


def _singlestep() -> list[Case]:
    """Return methods on even log-SNR, where their intermediate levels are those of the papers."""
    cases = []
    for order in (2, 3):
        steps = 7 * order + 1
        grid = every(named("uniform_logsnr", steps), order)
        options = {"use_exponential_sigmas": True, "lower_order_final": True, "solver_order": order}
        ours = tableau_of("dpmpp", grid, order=order, rule="bh2")
        name = f"DPM-Solver++ {order}S"
        cases.append(Case(name, "DPMSolverSinglestepScheduler", options, steps, ours, rounded=True))
    return cases


def _others() -> list[Case]:
    zero, least = at_their_times(), at_their_times(1.0)
    cases = []
    for order in (1, 2, 3):
        for rule in ("bh1", "bh2"):
            options = {"solver_order": order, "solver_type": rule}
            ours = partial(unipc_to_zero, zero, order, rule)
            name = f"UniPC-{order}, {rule}"
            why = INFINITE if rule == "bh1" else ""
            cases.append(Case(name, "UniPCMultistepScheduler", options, 20, ours, why))
            options = options | {"final_sigmas_type": "sigma_min"}
            ours = tableau_of("unipc", least, order=order, rule=rule)
            name = f"UniPC-{order}, {rule}, to step 1"
            cases.append(Case(name, "UniPCMultistepScheduler", options, 20, ours))
            options = options | {"predict_x0": False}
            ours = tableau_of("unipc", least, order=order, rule=rule, predict="eps")
            name = f"UniPC-{order}, {rule}, in eps, to step 1"
            cases.append(Case(name, "UniPCMultistepScheduler", options, 20, ours))
    options = {"disable_corrector": list(range(20))}
    ours = tableau_of("unipc", zero, corrector=False, lower_order_final=False)
    cases.append(Case("UniPC-2, predictor", "UniPCMultistepScheduler", options, 20, ours))
    for order, corrector in ((1, 2), (2, 2), (3, 3), (2, 3)):
        options = {"predictor_order": order, "corrector_order": corrector, "tau_func": lambda t: 1}
        more = {"corrector_order": corrector, "largest": np.inf}
        ours = tableau_of("sa_solver", least, order=order, **more)
        name = f"SA-Solver, orders {order} and {corrector}, tau 1, to step 1"
        cases.append(Case(name, "SASolverScheduler", options, 25, ours))
    # They evaluate tau at the start of a step, and the authors at its end, which is 40 lower.
    ours = tableau_of("sa_solver", least, tau_from=0.161, tau_to=0.761, largest=np.inf)
    cases.append(Case("SA-Solver, their tau, to step 1", "SASolverScheduler", {}, 25, ours))
    options = {"skip_prk_steps": True, "set_alpha_to_one": True}
    ours = tableau_of("pndm", named("leading", 25))
    cases.append(Case("PLMS", "PNDMScheduler", options, 25, ours, predictions=("eps",)))
    case = Case("PLMS", "PNDMScheduler", options, 25, ours, MIXED_V, predictions=("v",))
    cases.append(case._replace(as_theirs=plms_of_v))
    options = {"timestep_scaling": 1e9, "original_inference_steps": T, "clip_sample": False}
    ours = tableau_of("consistency", zero)
    case = Case("Consistency, multistep (LCM)", "LCMScheduler", options, 4, ours, ALL_NOISE)
    cases.append(case._replace(as_theirs=with_all_noise(ours)))
    for name, ours in (("Euler", flow("euler")), ("Heun", flow("heun", space="levels"))):
        theirs = f"FlowMatch{name}DiscreteScheduler"
        cases.append(Case(f"{name}, flow", theirs, {}, 20, ours, predictions=("flow",)))
    ve = schedules.karras(T)
    for name, theirs, ours in (
        ("Euler, EDM", "EDMEulerScheduler", samplers.ddim),
        ("DPM-Solver++ 2M, EDM", "EDMDPMSolverMultistepScheduler", samplers.dpm_multistep),
    ):
        options = {"sigma_min": 0.002, "sigma_max": 80.0}
        make = partial(edm, ve, ours)
        cases.append(Case(name, theirs, options, 20, make, predictions=("edm",)))
    inverse, options = "DDIMInverseScheduler", {"clip_sample": False}
    ours = inversion
    cases.append(Case("DDIM inversion", inverse, options, 25, ours, predictions=("eps",)))
    case = Case("DDIM inversion", inverse, options, 25, ours, MISREAD, predictions=("v",))
    cases.append(case._replace(as_theirs=inversion_of_v))
    return cases


def unipc_to_zero(grid: Callable[[Any], Grid], order: int, rule: str, scheduler: Any) -> Tableau:
    """Return UniPC with orders lowered as in diffusers, which counts the step to clean data."""
    levels = grid(scheduler)
    orders = np.minimum(step_orders(levels, order, False), np.arange(levels.steps, 0, -1))
    return exponential_multistep(levels, "x0", orders, orders, rule=rule)


def with_all_noise(ours: Callable[[Any], Tableau]) -> Callable[[Any], Tableau]:
    """Return our tableau with the fault ALL_NOISE."""

    def noisier(scheduler: Any) -> Tableau:
        tableau = ours(scheduler)
        mix = tableau.mix.copy()
        mix[:-1, 0, XI] = tableau.sigma[1:]
        return tableau._replace(mix=mix)

    return noisier


def edm(schedule: schedules.NoiseSchedule, sampler: Callable, scheduler: Any) -> Tableau:
    """Return our sampler on EDM's levels."""
    return sampler(schedule, grids.karras(schedule, 20))


def inversion(scheduler: Any) -> Tableau:
    """Return DDIM backwards through their times."""
    return samplers.ddim_inversion(SCHEDULE, grids.leading(SCHEDULE, 25))


def inversion_of_v(scheduler: Any) -> Tableau:
    """Return DDIM inversion with the fault MISREAD: it reads v at the step's start."""
    s, rows = symbols(0), []
    walk = grids.leading(SCHEDULE, 25).levels[::-1]
    for start, end in pairwise(walk):
        v = end.alpha * s.eps - end.sigma * s.x0
        x0, eps = start.alpha * s.x - start.sigma * v, start.sigma * s.x + start.alpha * v
        rows.append(Row(end, [end.alpha * x0 + end.sigma * eps]))
    return tabulate(rows)


def flow(sampler: str, **options: Any) -> Callable[[Any], Tableau]:
    """Return our sampler on rectified flow, through their times, with sigma = t / T."""
    schedule = schedules.flow(T)

    def tableau(scheduler: Any) -> Tableau:
        times = np.unique(np.float64(scheduler.timesteps.numpy()))[::-1]
        grid = grids.at(schedule, np.append(times, 0))
        return samplers.SAMPLERS[sampler](schedule, grid, **options)

    return tableau


def halved(ours: Callable[[Any], Tableau]) -> Callable[[Any], Tableau]:
    """Return a method with the fault HALVED: its second derivative is halved."""

    def moments(kappa: float, count: int) -> np.ndarray:
        return exact(kappa, count) / np.array([1.0, 2.0])[:count]

    exact = coefficients.exponential_moments

    def tableau(scheduler: Any) -> Tableau:
        coefficients.exponential_moments = moments
        try:
            return ours(scheduler)
        finally:
            coefficients.exponential_moments = exact

    return tableau


def plms_of_v(scheduler: Any) -> Tableau:
    """Return PLMS with the fault MIXED_V: its registers hold v."""
    grid, s, rows = named("leading", 25)(scheduler), symbols(3), []
    span = grid.sigma[1:] - grid.alpha[1:] / grid.alpha[:-1] * grid.sigma[:-1]
    velocity = [level.alpha * s.eps - level.sigma * s.x0 for level in grid.levels]
    for step, level in enumerate(grid.levels[:-1]):
        v, count = velocity[step], min(step, 3)
        mean = v.copy()
        if count:
            mean += EVEN[count - 1] @ (np.stack(s.z[:count]) - v)
        eps = level.alpha * mean + level.sigma * s.x
        x_next = grid.alpha[step + 1] / level.alpha * s.x + span[step] * eps
        rows.append(Row(level, [x_next, v, *s.z[:2]], ends_step=step > 0))
        if step == 0:
            change = span[0] * level.alpha / 2 * (velocity[1] - s.z[0])
            rows.append(Row(grid.levels[1], [s.x + change, s.z[0]]))
    return tabulate(rows)


HALVED = (
    "Their D2 = (D1_0 - D1_1) / (r_0 + r_1) is a second divided difference, which is half of the "
    "second derivative, but they weight it as the whole derivative. The method therefore falls to"
    " order 2. The code of the paper's authors and k-diffusion do the same."
)
MIXED_V = (
    "They sum predictions of v from different levels, as if these were eps, and decode the sum at "
    "one level. But v = alpha eps - sigma x0 has a different meaning at each level."
)
MISREAD = (
    "They call the network at the level where a step ends, but interpret its v at the level where"
    " the step starts. The same v stands for a different x0 at each level; an eps does not depend "
    "on the level in this way."
)
ALL_NOISE = (
    "LCM adds noise with the whole sigma of the level. Ours is algorithm 1 of consistency models,"
    " which subtracts the variance of the schedule's first step."
)
INFINITE = "Their B(h) = h is infinite in the step to sigma = 0, so their result is not a number."
CASES = {case.label: case for case in _cases()}


def document() -> str:
    """Return the Markdown of docs/samplers.md."""
    same = [SAME, "", *test_identity.lines(), ""]
    lines = [
        INTRODUCTION,
        *orders(),
        "",
        *same,
        *differences(),
        "",
        AUTHORS,
        "",
        *test_authors.lines(),
    ]
    return "\n".join(lines)


def orders() -> list[str]:
    """Return rows of the fitted orders of convergence, as test_sampler_orders.py asserts them."""
    steps = test_sampler_orders.STEPS
    exact = test_sampler_orders.exact_end()
    lines = [ORDERS.format(steps=", ".join(map(str, steps))), "", "| method | order | fitted |"]
    lines.append("|---|---|---|")
    for label, (_, _, order) in test_sampler_orders.CASES.items():
        fitted = test_sampler_orders.fitted_order(label, exact)
        lines.append(f"| {label} | {order} | {fitted:.2f} |")
    steps = test_sampler_orders.WEAK_STEPS
    lines += ["", WEAK.format(steps=", ".join(map(str, steps))), ""]
    lines += ["| method with noise | order | fitted |", "|---|---|---|"]
    for label, (name, options, order) in test_sampler_orders.WEAK.items():
        fitted = analysis.fit_order(steps, test_sampler_orders.weak_errors(name, options, steps))
        lines.append(f"| {label} | {order} | {fitted:.2f} |")
    return lines


def differences() -> list[str]:
    """Return a row for each case."""
    lines = [DIFFERENCES.format(version=diffusers.__version__), ""]
    lines += ["| case | scheduler | predicts | relative error | remark |", "|---|---|---|---|---|"]
    reasons: dict[str, int] = {}
    for case in CASES.values():
        for prediction in case.predictions:
            remark = ""
            if case.why:
                remark = f"differs [{reasons.setdefault(case.why, len(reasons) + 1)}]"
            if case.as_theirs:
                wrong = relative_error(case._replace(ours=case.as_theirs), prediction)
                remark += f"; with their fault in ours: {wrong:.1e}"
            error = relative_error(case, prediction)
            name = f"{case.name}, {case.steps} steps"
            lines.append(f"| {name} | {case.theirs} | {prediction} | {error:.1e} | {remark} |")
    return [*lines, "", *(f"{number}. {why}" for why, number in reasons.items())]


INTRODUCTION = """# The samplers, measured

`python -m tests.compare_samplers > docs/samplers.md` writes this page. `make test-peers` tests
its figures.
"""
ORDERS = """## Orders of convergence

The data are two Gaussians on a line, whose exact denoiser is known. Every method runs in float64
from sigma / alpha = 4 to 0.2, in {steps} steps. The fitted order is minus the slope of the error
against the number of steps, both in logarithms."""
SAME = """## Samplers that are the same map

Samplers are the same map if their samples have the same distribution for every network.
The comparison eliminates eps by x = alpha x0 + sigma eps, unrolls the registers, and compares
noise by its covariance. `python -m experiments.analyse --identify --steps=10` finds such samplers
on any schedule and grid, and the tests assert this table. Methods of orders 2 and 3 need at least
that many steps. There is one exception: on the schedule `course`, `ddpm:500` differs, because the
course's beta of step 1 does not fit its alphas."""
DIFFERENCES = """## Whole runs against diffusers {version}

Both have the same betas, levels, network, initial state and noise. Ours run in the compiled loop,
in single precision. The relative error of the final images is |ours - theirs| / |theirs|.

Churn is not compared. EulerDiscreteScheduler adds the noise after it calls the network, so the
network does not see the noisy state, as it does in algorithm 2 of EDM. HeunDiscreteScheduler has
no churn. A test compares our churn with a loop written from the paper."""

WEAK = """For methods that add noise, the data are Gaussian, and the error is the exact error of
the mean and the standard deviation after {steps} steps on the same levels. The fitted order is
that of weak convergence."""
AUTHORS = """## Whole runs against the authors' code

Both run in float64 with the same levels, denoiser and noise, in nine to eleven steps. The
authors' unchanged code computed the figures in tests/fixtures/authors.json once."""

if __name__ == "__main__":
    print(document())
