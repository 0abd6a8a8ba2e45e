"""Compare coefficients of DDPM and DDIM with the papers, and whole runs with NumPy loops."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.guidance import network_denoiser
from diffusion_jax.diffusion.predictions import PREDICTIONS
from diffusion_jax.samplers import Tableau, ddim, ddpm, solve
from diffusion_jax.tableau import check, pad, to_float32
from diffusion_jax.typing import InputError

T = 500
SHAPE = (3, 8, 8, 2)
WEIGHT = np.random.default_rng(1).normal(size=(2, 2))


def network(x, t, xp):
    """Compute a smooth function of image and time, for NumPy and JAX, like a trained network."""
    weight = xp.asarray(WEIGHT, dtype=x.dtype)
    return xp.tanh(x @ weight + 2 * t) + x / 4


def numpy_ddpm(schedule, x, noise) -> np.ndarray:
    """Run the course's loop in float64. Its table is (beta, alpha_bar)."""
    b, ab = schedule.beta, schedule.alpha**2
    for i in range(T, 0, -1):
        z = noise(T - i) if i > 1 else 0
        eps = network(x, i / T, np)
        mean = (x - eps * b[i] / np.sqrt(1 - ab[i])) / np.sqrt(1 - b[i])
        x = mean + np.sqrt(b[i]) * z
    return x


def numpy_ddim(schedule, x, n: int) -> np.ndarray:
    """Run the course's loop in float64."""
    ab = schedule.alpha**2
    for i in range(T, 0, -(T // n)):
        j = i - T // n
        eps = network(x, i / T, np)
        x0 = np.sqrt(ab[j] / ab[i]) * (x - np.sqrt(1 - ab[i]) * eps)
        x = x0 + np.sqrt(1 - ab[j]) * eps
    return x


def denoiser(parameterization: str = "eps") -> Callable:
    return network_denoiser(
        lambda x, t, context: network(x, t, jnp),
        PREDICTIONS[parameterization](),
        T,
        jnp.zeros((3, 1)),
    )


@pytest.fixture(scope="module")
def keys():
    return samplers.sample_keys(jax.random.key(5), jnp.arange(3, dtype=jnp.uint32))


@pytest.fixture(scope="module")
def start(keys) -> jax.Array:
    return samplers.row_noise(keys, jnp.uint32(2**32 - 1), SHAPE[1:])


run = jax.jit(lambda tableau, x, keys, rows: solve(denoiser(), tableau, x, keys, rows=rows)[0])


def sample(tableau: Tableau, x, keys) -> np.ndarray:
    return np.asarray(run(to_float32(pad(tableau, 512, 0)), x, keys, tableau.rows))


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name", ["course", "linear"])
def test_ddpm_500_is_the_courses_loop(name: str, start, keys) -> None:
    schedule = schedules.build(f"{name}:steps={T}")

    def noise(row: int) -> np.ndarray:
        return np.asarray(samplers.row_noise(keys, jnp.uint32(row), SHAPE[1:]), np.float64)

    ours = sample(ddpm(schedule, grids.course(schedule, T)), start, keys)
    assert relative_error(ours, numpy_ddpm(schedule, np.float64(start), noise)) < 1e-5


@pytest.mark.parametrize("n", [1, 5, 20, 25, 100, 500])
def test_ddim_is_the_courses_loop(n: int, start, keys) -> None:
    schedule = schedules.course(T)
    ours = sample(ddim(schedule, grids.course(schedule, n)), start, keys)
    assert relative_error(ours, numpy_ddim(schedule, np.float64(start), n)) < 1e-5


def test_ddpm_coefficients_are_the_posterior_of_the_forward_process() -> None:
    """Expect DDPM, eqs. 6 and 7: mean and variance of q(x_{t-1} | x_t, x_0), at predicted x_0."""
    schedule = schedules.linear(50)
    tableau = ddpm(schedule, grids.course(schedule, 50), variance="posterior")
    ab, b = schedule.alpha**2, schedule.beta
    x, x0 = 0.7, -0.4
    for row, t in enumerate(range(50, 0, -1)):
        eps = (x - np.sqrt(ab[t]) * x0) / np.sqrt(1 - ab[t])
        mean = (np.sqrt(ab[t - 1]) * b[t] * x0 + np.sqrt(1 - b[t]) * (1 - ab[t - 1]) * x) / (
            1 - ab[t]
        )
        variance = (1 - ab[t - 1]) / (1 - ab[t]) * b[t]
        columns = tableau.mix[row, 0]
        assert columns @ [x, x0, eps, 0] == pytest.approx(mean, abs=1e-12)
        assert columns[3] ** 2 == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("n", [7, 50])
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(n: int) -> None:
    """Compare them as maps of (x, x0), because they are written in different columns."""
    schedule = schedules.linear(50)
    grid = grids.trailing(schedule, n)

    def as_map(tableau: Tableau) -> np.ndarray:
        x, x0, eps, xi = tableau.mix[:, 0].T
        return np.stack(
            [x + eps / tableau.sigma, x0 - eps * tableau.alpha / tableau.sigma, xi], axis=1
        )

    ours = as_map(ddim(schedule, grid, eta=1.0))
    assert np.allclose(ours, as_map(ddpm(schedule, grid, "posterior")), atol=1e-12, rtol=0)


def test_padding_changes_no_bit(start, keys) -> None:
    schedule = schedules.course(T)
    tableau = ddim(schedule, grids.trailing(schedule, 10), eta=0.5)
    plain = run(to_float32(tableau), start, keys, 10)
    padded = run(to_float32(pad(tableau, 64, 0)), start, keys, 10)
    more_registers = run(to_float32(pad(tableau, 64, 3)), start, keys, 10)
    assert np.array_equal(plain, padded)
    assert np.allclose(plain, more_registers, atol=1e-6)


def test_frames_are_the_states_after_their_rows(start, keys) -> None:
    schedule = schedules.course(T)
    tableau = to_float32(ddpm(schedule, grids.course(schedule, 20)))
    last, kept = solve(denoiser(), tableau, start, keys, frames=jnp.array([0, 7, 19]))
    assert kept.shape == (3, *SHAPE)
    for frame, row in zip(kept, (0, 7, 19), strict=True):
        until, _ = solve(denoiser(), tableau, start, keys, rows=row + 1)
        assert np.allclose(frame, until, atol=1e-5)
    assert np.array_equal(kept[-1], last)


def test_a_run_resumes_in_the_middle(start, keys) -> None:
    schedule = schedules.course(T)
    tableau = to_float32(ddpm(schedule, grids.course(schedule, 20)))
    whole, _ = solve(denoiser(), tableau, start, keys)
    half, _ = solve(denoiser(), tableau, start, keys, rows=9)
    assert np.allclose(solve(denoiser(), tableau, half, keys, start=9)[0], whole, atol=1e-6)


def test_memory_does_not_grow_with_the_steps(start, keys) -> None:
    def temporary(steps: int) -> int:
        schedule = schedules.course(T)
        tableau = to_float32(ddim(schedule, grids.course(schedule, steps)))
        compiled = run.lower(tableau, start, keys, steps).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(500) == temporary(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: samplers.build("ddpn", s, 5), "sampler='ddpn' is unknown: did you mean ddpm"),
        (lambda s: samplers.build("ddim", s, 5, "diagonal"), "grid='diagonal' is unknown"),
        (lambda s: samplers.build("ddim", s, 0), r"steps=0: it must be in 1\.\.40"),
        (lambda s: samplers.build("ddim", s, 41), r"steps=41: it must be in 1\.\.40"),
        (lambda s: samplers.build("ddim", s, 5, eta=1.5), r"eta=1.5: it must be in \[0, 1\]"),
        (lambda s: samplers.build("ddim", s, 5, eta=float("nan")), "eta=nan"),
        (
            lambda s: samplers.build("ddpm", s, 5, eta=1.0),
            "has no option eta: choose from variance",
        ),
        (lambda s: samplers.build("ddpm", s, 5, variance="large"), "variance='large' is unknown"),
    ],
)
def test_what_cannot_be_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(schedules.course(40))


def test_check_names_the_part_that_is_wrong() -> None:
    schedule = schedules.course(40)
    good = ddim(schedule, grids.course(schedule, 4))
    broken = good.mix.copy()
    broken[2] = np.nan
    with pytest.raises(ValueError, match=r"mix is not finite in rows \[2\]"):
        check(good._replace(mix=broken))
    with pytest.raises(ValueError, match=r"alpha has shape \(3,\) where mix has 4 rows"):
        check(good._replace(alpha=good.alpha[:3]))
    with pytest.raises(ValueError, match="mix has shape"):
        check(good._replace(mix=good.mix[:, :, :3]))
    with pytest.raises(ValueError, match="the last row must end a step"):
        check(good._replace(ends_step=np.zeros(4, bool)))
    with pytest.raises(ValueError, match="does not fit into 3"):
        pad(good, 3, 0)
