"""Learn samplers: the numbers of tables, the objectives, their gradients, and the app."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import learning, parallel, samplers
from diffusion_jax.data import Dataset
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.guidance import Guidance
from diffusion_jax.evaluation import classifier
from diffusion_jax.learning import Numbers, from_tableau, objectives, to_tableau
from diffusion_jax.learning.fit import CHECKS
from diffusion_jax.learning.numbers import traced_tableau
from diffusion_jax.runs.models import save_model
from diffusion_jax.sampling import sample
from diffusion_jax.tableau import solve
from diffusion_jax.tableau.identity import canonical, is_same
from diffusion_jax.typing import InputError
from tests.apps import call, output_of
from tests.interpreter import interpret
from tests.models import TINY, untrained

SCHEDULE = schedules.build("cosine:offset=0.008")
FORMS = (
    "ddim:5 ddim:8:eta=0.5 ddpm:6 unipc:7:order=3 sa_solver:5 dpmpp_2m_sde:6 dpmpp_3m_sde:5 "
    "lms:5 ipndm:6 deis:6 er_sde:6 dpm_solver:4 seeds:3 ddim:5:grid=karras"
)
N = 96
OBJECTIVE = {"energy": objectives.energy(), "solution": objectives.solution(steps=20)}


def random_numbers(calls: int = 5, registers: int = 3) -> Numbers:
    rng = np.random.default_rng(0)
    shapes = (calls,), (calls, registers), (calls,), (calls,)
    return Numbers(*(rng.normal(size=shape) for shape in shapes))


@pytest.mark.parametrize("text", FORMS.split())
def test_numbers_stand_for_the_sampler_that_they_are_from(text: str) -> None:
    tableau = samplers.build(text, SCHEDULE)
    again = to_tableau(from_tableau(tableau), SCHEDULE, tableau.t[0])
    np.testing.assert_allclose(again.t, tableau.t, rtol=1e-12)
    assert is_same(canonical(again), canonical(tableau))


@pytest.mark.filterwarnings("ignore::diffusion_jax.typing.RunWarning")
@pytest.mark.parametrize(
    ("text", "message"),
    {
        "heun:4": "does not go down step by step: take a multistep method",
        "restart:6": "does not go down step by step",
        "dpmpp_sde:4": "have a different form: take a multistep method",
        "ddim:60": "60 network evaluations: a sampler to learn from has at most 50",
        "lms:15": "remembers 13 predictions: it may remember at most 8",
        "ddim:4:grid=uniform_logsnr:to_zero=false": "have a different form",
    }.items(),
)
def test_a_sampler_of_a_different_form_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_tableau(samplers.build(text, SCHEDULE))


def test_a_constant_denoiser_gives_its_image_whatever_the_numbers_are() -> None:
    image, rng = np.array([0.3, -0.8]), np.random.default_rng(1)
    tableau = to_tableau(random_numbers(), SCHEDULE, 500.0)
    x, noise = rng.normal(size=2), rng.normal(size=(tableau.rows, 2))
    found = interpret(tableau, lambda x, t, a, s: (image, (x - a * image) / s), x, noise)
    np.testing.assert_allclose(found, image, rtol=1e-12)


def test_traced_tableaus_are_those_of_the_host() -> None:
    numbers = random_numbers()
    traced = traced_tableau(jax.tree.map(jnp.float32, numbers), SCHEDULE, 500.0)
    for ours, theirs in zip(traced, to_tableau(numbers, SCHEDULE, 500.0), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_gradients_through_the_loop_are_those_of_finite_differences() -> None:
    """Differentiate in float64 the plain interpreter, on a problem that is not linear.

    The levels lie between the schedule's steps, because the schedule has kinks there.
    """
    numbers = from_tableau(samplers.build("unipc:4:grid=karras:sigma_min=0.05", SCHEDULE))
    x = np.linspace(-1.5, 1.5, 12)

    def denoise(x, level, xp=jnp):
        x0 = xp.tanh(2 * x + level.t / 500)
        return x0, (x - level.alpha * x0) / level.sigma

    def by_host(values: Numbers) -> float:
        tableau = to_tableau(values, SCHEDULE, 500.0)
        level = solve.Level
        return np.sum(interpret(tableau, lambda x, *at: denoise(x, level(*at), np), x) ** 3)

    def by_loop(values: Numbers):
        tableau = traced_tableau(values, SCHEDULE, 500.0)
        keys = solve.sample_keys(jax.random.key(0), jnp.arange(1, dtype=jnp.uint32))
        state = jnp.float32(x).reshape(1, 2, 2, 3)
        return jnp.sum(solve.solve(denoise, tableau, state, keys)[0] ** 3)

    found = jax.jit(jax.grad(by_loop))(jax.tree.map(jnp.float32, numbers))
    for name in ("spacing", "history", "kept"):
        values, gradient = getattr(numbers, name), np.zeros_like(getattr(numbers, name))
        for at in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[at] = 1e-5
            ends = (numbers._replace(**{name: values + sign * step}) for sign in (1, -1))
            gradient[at] = np.subtract(*map(by_host, ends)) / 2e-5
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(getattr(found, name) / scale, gradient / scale, atol=5e-3)


def on_devices(count: int, objective, x, y, context, features=objectives.random_features):
    """Return an objective and its gradient in x, computed on this many devices."""

    def run(x, y, context):
        layers = partial(features, jax.random.key(3))
        value, gradient = jax.value_and_grad(objective.loss)(x, y, context, layers)
        return jax.lax.psum(value, parallel.AXIS), gradient

    devices = jax.devices()[:count]
    program = parallel.data_parallel(run, (0, 0, 0), (None, 0), devices=devices)
    value, gradient = program(*parallel.split((x, y, context), count))
    return float(value), parallel.merge(np.asarray(gradient))


def sets():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 16, 8, 8, 3)).astype(np.float32)
    return x, 0.5 * y + 0.3, np.eye(4, dtype=np.float32)[np.arange(16) % 4]


@pytest.mark.parametrize("name", ["energy", "mmd"])
def test_objectives_and_gradients_do_not_depend_on_the_devices(name: str) -> None:
    objective = objectives.OBJECTIVES[name]()
    one, four = (on_devices(count, objective, *sets()) for count in (1, 4))
    np.testing.assert_allclose(one[0], four[0], rtol=1e-4)
    np.testing.assert_allclose(one[1], four[1], rtol=1e-4, atol=1e-5 * np.abs(one[1]).max())


def test_the_energy_distance_is_that_of_all_pairs() -> None:
    """Compare with loops over pairs in float64, in pixels only; and the gradient by differences."""
    x, y, context = sets()
    objective = objectives.energy(context=0.7)

    def by_loops(x) -> float:
        flat = [v.reshape(16, -1).astype(np.float64) for v in (x, y)]
        scale = np.sqrt(flat[1].var(0).sum())
        ours, theirs = (np.concatenate([v / scale, 0.7 * context], 1) for v in flat)
        total = 0.0
        for i in range(16):
            for j in range(16):
                if i != j:
                    pairs = (ours[i], theirs[j]), (ours[i], ours[j]), (theirs[i], theirs[j])
                    across, one, other = (np.linalg.norm(a - b) for a, b in pairs)
                    total += 2 * across - one - other
        return total / (16 * 15)

    value, gradient = on_devices(2, objective, x, y, context, lambda key, x: [])
    assert value == pytest.approx(by_loops(x), rel=1e-4)
    step = np.zeros_like(x, np.float64)
    step[3, 4, 5, 1] = 1e-4
    slope = (by_loops(x + step) - by_loops(x - step)) / 2e-4
    assert gradient[3, 4, 5, 1] == pytest.approx(slope, rel=1e-2)


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 128, (N, 8, 8, 3), np.uint8)
    labels = rng.normal(size=(N, 3)).astype(np.float32)  # not classes, so no classifier is trained
    return Dataset(images, labels, ("a", "b", "c"))


def learn(start: str = "sa_solver:3", objective: str = "energy", **options) -> learning.Learned:
    model = untrained()
    options = {"steps": 12, "batch_size": 32, "devices": jax.devices()[:2]} | options
    return learning.fit(
        model,
        samplers.build(start, model.schedule),
        dataset(),
        dataset(),
        OBJECTIVE[objective],
        **options,
    )


@pytest.mark.slow
def test_learning_improves_the_objective_and_repeats_bit_for_bit() -> None:
    first, again = learn(), learn()
    held_out = [value for _, value in first.curve]
    assert min(held_out) < held_out[0]
    assert first.best > 0
    assert all(map(np.array_equal, first.tableau, again.tableau))


@pytest.mark.slow
def test_minutes_lay_out_the_steps_that_fit() -> None:
    learned = learn(steps=None, minutes=1.0)
    assert learned.steps >= CHECKS
    again = learn(steps=learned.steps)
    assert all(map(np.array_equal, learned.tableau, again.tableau))


def test_only_what_is_free_changes() -> None:
    start = samplers.build("sa_solver:3", untrained().schedule)
    learned = learn(free=["noise", "guidance"], guidance=Guidance(1.5), registers=2)
    ours, before = from_tableau(learned.tableau), from_tableau(start, 2)
    assert learned.scale != 1.5
    assert not np.allclose(ours.fresh, before.fresh)
    for name in ("spacing", "history", "kept"):
        values = (getattr(each, name) for each in (ours, before))
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_coarse_sampler_learns_the_fine_solution() -> None:
    """Expect the images of unipc:20 from noise that learning did not see to be nearer."""
    model = untrained()
    learned = learn("ddim:2", "solution", free=["levels", "mixing"], steps=24)
    tables = (samplers.build("unipc:20", model.schedule), learned.tableau)
    fine, ours, before = (
        sample(model, tableau, 32, seed=9).images
        for tableau in (*tables, samplers.build("ddim:2", model.schedule))
    )
    assert np.mean((ours - fine) ** 2) < 0.8 * np.mean((before - fine) ** 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free": ["levels", "all"]}, "free=levels,all: choose from levels, mixing"),
        ({"free": ["guidance"]}, "free=guidance: give the scale to begin with"),
        ({"guidance": Guidance(0.6, renoise_bad=1)}, "guidance=cfg_pp: samplers are learned with"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: it must be above 0, and finite"),
        ({"batch_size": 33}, "batch_size=33: it must be at least 16, and divisible by 2"),
        ({"objective": "solution"}, "needs a sampler without noise: start from unipc"),
        ({"steps": None, "minutes": 0.001}, r"minutes=0\.001: compilation took .*give at least"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        learn(**options)


REFUSED = {
    "--start=heun:4": "does not go down step by step",
    "--start=lms:15": "remembers 14 predictions",
    "--start=euler_a:4": "unknown",
    "--objective=kid": "unknown: choose from energy, mmd, solution",
    "--objective=energy:pixels=-1": "pixels=-1",
    "--free=all": "free=all: choose from",
    "--learning_rate=nan": "learning_rate=nan: it must be above 0",
    "--guidance=cfg:scale=nan": "scale=nan: it must be a number",
    "--minutes=3": "--minutes: learning with --steps does not read it",
    "--devices=3": "batch_size=16: it must be at least 16, and divisible by 3",
}


def test_the_app_writes_a_sampler_that_samples(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(classifier, "STEPS", 5)
    np.save(tmp_path / "images.npy", dataset().images)
    np.save(tmp_path / "labels.npy", np.arange(N) % 3)
    data = f"npy:images={tmp_path}/images.npy:labels={tmp_path}/labels.npy:class_names=a,b,c"
    config = TINY.override(data=data)
    save_model(tmp_path / "run", config, untrained(config).variables)
    out = tmp_path / "new.json"
    flags = f"--run={tmp_path}/run", f"--out={out}", "--batch_size=16", "--devices=2", "--steps=3"
    for wrong, message in REFUSED.items():
        with pytest.raises(InputError, match=message):
            call("learn_sampler", *flags, wrong)
        assert not out.exists()
    save_model(
        tmp_path / "without", config.override(keep_probability=0.0), untrained(config).variables
    )
    with pytest.raises(
        InputError, match="guidance=2: this run was trained only with or only without"
    ):
        call("learn_sampler", f"--run={tmp_path}/without", *flags[1:], "--guidance=2")
    text = output_of("learn_sampler", *flags, "--start=ddim:2")
    assert "of --steps=3 is the best" in text
    assert out.with_suffix(".png").exists()
    with pytest.raises(InputError, match="it must be a new file"):
        call("learn_sampler", *flags)
    drawn = flags[0], f"--sampler=file:path={out}", f"--out={tmp_path}/drawn"
    assert "2 network evaluations" in output_of("sample", *drawn)
