"""Editing: RePaint's tableau, inpainting against exact conditionals, starts, masks, slerp."""

import jax
import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.guidance import Guidance
from diffusion_jax.sampling import Start, editing, initial_noise, sample
from diffusion_jax.tableau import XI, analysis
from diffusion_jax.typing import InputError
from tests.interpreter import interpret, mixture

SCHEDULE = schedules.linear(1000)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


# --- tables ------------------------------------------------------------------------------------


def test_repaint_without_repeats_is_ddpm_with_the_posterior_variance() -> None:
    grid = grids.trailing(SCHEDULE, 25)
    ours, plain = editing.repaint(SCHEDULE, grid, 5, 1), samplers.ddim(SCHEDULE, grid, eta=1.0)
    assert np.array_equal(ours.mix, plain.mix)
    assert np.array_equal(ours.t, plain.t)


def test_repaint_walks_as_the_paper_says() -> None:
    grid = grids.at(SCHEDULE, np.array([900.0, 700, 500, 300, 0]))
    table = editing.repaint(SCHEDULE, grid, jump=2, repeats=3)
    assert table.t.tolist() == [900, 700] * 3 + [500, 300] * 3
    assert table.ends_step.tolist() == [True, False, True, False, True, True] * 2
    assert not table.mix[-1, 0, XI]


@pytest.mark.parametrize("make", [schedules.linear, schedules.flow])
def test_jumps_keep_the_marginals(make) -> None:
    """Expect DDPM's error on Gaussian data, of order 1: a jump adds exactly the noise of a level.

    If a jump added slightly more noise, the error would not fall.
    """
    schedule = make(1000)
    data = analysis.Gaussian(np.array([0.4, -0.8]), np.array([0.25, 1.5]))
    errors, wrong = [], []
    for n in (200, 400, 800):
        table = editing.repaint(schedule, grids.trailing(schedule, n), 10, 5)
        errors.append(analysis.error(table, data))
        table.mix[:, 0, XI] *= 1.05
        wrong.append(analysis.error(table, data))
    assert errors[2] < 0.65 * errors[1] < 0.65**2 * errors[0]
    assert wrong[2] > wrong[0] > 0.02


def test_jumps_bring_inpainting_to_the_exact_conditional() -> None:
    """Inpaint one of two correlated Gaussians. Given the other, its mean and variance are known."""
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    value = 1.3
    grid = grids.trailing(SCHEDULE, 250)
    rng = np.random.default_rng(0)

    def denoise(x, t, alpha, sigma):
        gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(2))
        x0 = gain @ x
        x0[0] = value
        return x0, (x - alpha * x0) / sigma

    found = {}
    for repeats in (1, 10):
        table = editing.repaint(SCHEDULE, grid, 10, repeats)
        noise = rng.standard_normal((table.rows, 2, 2000))
        x = rng.standard_normal((2, 2000))
        known, filled = interpret(table, denoise, x, noise)
        assert np.allclose(known, value, atol=1e-9)
        found[repeats] = abs(filled.mean() - 0.9 * value), abs(filled.var() - (1 - 0.9**2))
    assert found[10][0] < 0.06
    assert found[10][1] < 0.03
    assert found[1][0] > 0.25


def test_more_iterations_invert_more_exactly() -> None:
    image = np.linspace(-1.8, 1.5, 9)
    grid = grids.linspace(SCHEDULE, 50)
    errors = []
    for iterations in (1, 3, 6):
        table = samplers.ddim_inversion(SCHEDULE, grid, iterations)
        assert table.rows == 50 * iterations
        noise = interpret(table, mixture, image)
        back = interpret(samplers.ddim(SCHEDULE, grid), mixture, noise)
        errors.append(np.abs(back - image).max())
    assert errors[2] < 0.1 * errors[1] < 0.01 * errors[0]


def test_the_tail_of_a_grid() -> None:
    grid = grids.trailing(SCHEDULE, 10)
    tail = editing.tail(SCHEDULE, grid, 0.35)
    assert tail.t.tolist() == [300, 200, 100, 0]
    assert editing.tail(SCHEDULE, grid, 1.0).t.tolist() == grid.t.tolist()
    hundred = grids.trailing(schedules.linear(100), 100)
    for strength in np.arange(1, 101) / 100:  # because 0.29 * 100 < 29
        assert editing.tail(schedules.linear(100), hundred, strength).t[0] == round(100 * strength)
    thirds = grids.trailing(schedules.linear(300), 3)
    with pytest.raises(InputError, match=r"starts at 0.333333:"):
        editing.tail(schedules.linear(300), thirds, 0.3)
    assert editing.tail(schedules.linear(300), thirds, 0.333333).steps == 1
    with pytest.raises(
        InputError, match=r"strength=0.05: on this grid the last step starts at 0.1"
    ):
        editing.tail(SCHEDULE, grid, 0.05)
    with pytest.raises(InputError, match=r"strength=1\.5: it must be above 0"):
        editing.tail(SCHEDULE, grid, 1.5)


@pytest.mark.parametrize(("jump", "repeats"), [(0, 1), (1, 0)])
def test_walks_that_cannot_be(jump: int, repeats: int) -> None:
    with pytest.raises(InputError, match="=0: it must be at least 1"):
        editing.repaint(SCHEDULE, grids.trailing(SCHEDULE, 4), jump, repeats)


def test_walks_are_bounded() -> None:
    with pytest.raises(InputError, match="repeats=100000000: it must be at most 25000 for 4 steps"):
        editing.repaint(SCHEDULE, grids.trailing(SCHEDULE, 4), 10, 10**8)


@pytest.mark.parametrize(
    "make",
    [
        lambda grid: samplers.ddim_inversion(SCHEDULE, grid, 10**9),
        lambda grid: samplers.restart(SCHEDULE, grid, repeats=10**9),
    ],
    ids=["inversion", "restart"],
)
def test_tables_have_at_most_a_million_rows(make) -> None:
    with pytest.raises(InputError, match="network evaluations for each image: they must be at"):
        make(grids.karras(SCHEDULE, 20))


def test_slerp_keeps_the_length_of_noise() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    path = editing.slerp(a, b, np.linspace(0, 1, 5))
    assert np.allclose(path[[0, -1]], [a, b], atol=1e-6)
    lengths = np.linalg.norm(path.reshape(5, -1), axis=1)
    assert lengths.min() >= 0.99 * min(lengths[0], lengths[-1])
    unit = np.stack([np.array([1.0, 0, 0]), np.array([0, 1.0, 0])]).reshape(2, 1, 1, 3)
    middle = editing.slerp(unit[0].astype(np.float32), unit[1].astype(np.float32), np.array([0.5]))
    assert np.allclose(middle.ravel(), [np.sqrt(0.5), np.sqrt(0.5), 0])
    assert np.allclose(editing.slerp(a, a, np.array([0.5]))[0], a)


def test_psnr_by_hand(images) -> None:
    assert np.allclose(editing.psnr(images, images + 0.2), 20.0, atol=1e-4)


# --- on a network ------------------------------------------------------------------------------


def test_a_start_is_signal_and_noise(model, images) -> None:
    table = samplers.build("ddim", model.schedule, 4)
    given = sample(model, table, 3, start=Start(images, 0.25, 0.5), rows=0, seed=5).images
    assert np.allclose(given, 0.25 * images + 0.5 * initial_noise(model, 3, 5), atol=1e-6)
    plain = sample(model, table, 3, seed=5).images
    noise = Start(initial_noise(model, 3, 5) * np.float32(table.noise_scale))
    assert np.allclose(sample(model, table, 3, start=noise).images, plain, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 3])
def test_known_pixels_stay_exactly(model, images, devices: int) -> None:
    mask = np.zeros((3, 8, 8, 1), np.float32)
    mask[:, :, :4] = 1
    grid = grids.trailing(model.schedule, 10)
    table = editing.repaint(model.schedule, grid, 2, 2)
    filled = sample(
        model,
        table,
        3,
        start=editing.noised(images * mask, table),
        mask=mask,
        devices=jax.devices()[:devices],
    ).images
    assert np.array_equal(filled[:, :, :4], images[:, :, :4])
    assert np.abs(filled[:, :, 4:] - images[:, :, 4:]).max() > 0.1


def test_guiding_away_from_itself_changes_nothing(model) -> None:
    table = samplers.build("ddim", model.schedule, 3)
    plain = sample(model, table, 2).images
    assert np.allclose(
        sample(model, table, 2, guidance=3.0, guide_model=model).images, plain, atol=1e-5
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": Start(np.zeros((2, 8, 8, 3), np.float32))}, r"they must be \(3, 8, 8, 3\)"),
        ({"start": Start(np.full((3, 8, 8, 3), np.nan, np.float32))}, "finite"),
        ({"mask": np.ones((3, 8, 8, 1), np.float32)}, "a mask without start images"),
        ({"threshold": "soft"}, "threshold='soft' is unknown: choose from none, clip, dynamic"),
    ],
)
def test_what_sampling_refuses(model, given: dict, message: str) -> None:
    table = samplers.build("ddim", model.schedule, 3)
    with pytest.raises(InputError, match=message):
        sample(model, table, 3, **given)


@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_cfg_plus_plus_is_refused_where_it_is_not_defined(model, name: str) -> None:
    plus = Guidance(0.5, renoise_bad=1)
    with pytest.raises(InputError, match=r"CFG\+\+ with this sampler: its steps do not end"):
        sample(model, samplers.build(name, model.schedule, 3), 2, guidance=plus)
    sample(model, samplers.build("ddim", model.schedule, 3), 2, guidance=plus, rows=0)


@pytest.mark.parametrize("mask", [np.ones((3, 8, 7, 1)), np.full((3, 8, 8, 1), 0.5)])
def test_masks_that_do_not_fit(model, images, mask: np.ndarray) -> None:
    table = samplers.build("ddim", model.schedule, 3)
    with pytest.raises(InputError, match=r"it must be \(3, 8, 8, 1\), of 0 and 1"):
        sample(model, table, 3, start=Start(images), mask=mask.astype(np.float32))


def test_a_worse_model_must_be_alike(model) -> None:
    table = samplers.build("ddim", model.schedule, 3)
    other = model._replace(schedule=schedules.course(50))
    with pytest.raises(InputError, match="the guide model was trained with a different schedule"):
        sample(model, table, 2, guidance=2.0, guide_model=other)
    with pytest.raises(InputError, match="a guide_model without guidance"):
        sample(model, table, 2, guide_model=model)
