"""Sampling: a sample depends only on its id; one compilation; contexts; frames."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.runs.config import Config
from diffusion_jax.sampling import Samples, frame_rows, initial_noise, sample
from diffusion_jax.sampling.draw import images_at_once
from diffusion_jax.typing import InputError
from experiments import timing


@pytest.fixture(scope="module")
def contexts() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 3), scale=100).astype(np.float32)


def tableau(model: Model, name: str = "ddpm", steps: int = 10) -> samplers.Tableau:
    return samplers.build(name, model.schedule, steps)


@pytest.fixture(scope="module")
def drawn(model, contexts) -> np.ndarray:
    return sample(model, tableau(model), 8, context=contexts, devices=jax.devices()[:1]).images


def test_fewer_images_are_the_first_ones(model, contexts, drawn) -> None:
    images = sample(model, tableau(model), 3, context=contexts[:3]).images
    assert images.shape == (3, 8, 8, 3)
    assert np.allclose(images, drawn[:3], atol=1e-4)


def test_seeds_contexts_and_images_differ(model, contexts, drawn) -> None:
    other = sample(model, tableau(model), 8, context=contexts, seed=1).images
    none = sample(model, tableau(model), 8).images
    assert np.abs(other - drawn).max() > 0.1
    assert np.abs(none - drawn).max() > 1e-3
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


def test_no_context_is_a_context_of_zeros(model) -> None:
    zeros = sample(model, tableau(model), 2, context=np.zeros((2, 3), np.float32)).images
    assert np.array_equal(sample(model, tableau(model), 2).images, zeros)


def test_everything_runs_in_one_compilation(model) -> None:
    devices = jax.devices()[:2]
    sample(model, tableau(model), 4, devices=devices)
    with timing.counting() as compilations:
        for name in samplers.SAMPLERS:
            for steps in (1, 5, 20, 40):
                sample(model, tableau(model, name, steps), 4, devices=devices)
    assert compilations.count == 0
    with timing.counting() as compilations:
        sample(model, tableau(model), 6, devices=devices)
    assert compilations.count > 0, "other batch sizes need a program of their own"


def test_frames(model) -> None:
    table = tableau(model, "ddim", 10)
    samples = sample(model, table, 5, frames=[0, 4, 9], devices=jax.devices()[:2], batch_size=4)
    assert samples.frames is not None
    assert samples.frames.shape == (3, 5, 8, 8, 3)
    assert np.array_equal(samples.frames[-1], samples.images)
    assert np.abs(samples.frames[0] - samples.images).max() > 0.1


def test_frame_rows_are_the_courses_choice() -> None:
    config = Config()
    ddpm = samplers.build("ddpm", config.build_schedule(), 500)
    kept = [i for i in range(500, 0, -1) if i % 20 == 0 or i == 500 or i < 8]
    assert [500 - row for row in frame_rows(ddpm, 500)] == kept
    ddim = samplers.build("ddim", config.build_schedule(), 20)
    assert frame_rows(ddim, 500) == list(range(20))
    assert frame_rows(ddpm, 500, "all") == list(range(500))
    with pytest.raises(InputError, match="frames='some' is unknown"):
        frame_rows(ddpm, 500, "some")


@pytest.mark.parametrize("context", [np.zeros((2, 3)), np.zeros((4, 2)), np.full((4, 3), np.nan)])
def test_contexts_that_do_not_fit_are_named(model, context: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"it must be \(4, 3\), finite numbers"):
        sample(model, tableau(model), 4, context=context.astype(np.float32))


def test_guidance_mixes_the_outputs_with_and_without_context(model, contexts) -> None:
    """Expect no effect of the context at 0, no guidance at 1, and outputs linear in the scale."""

    def draw(guidance: float | None, context: np.ndarray | None = contexts[:4]) -> np.ndarray:
        table = tableau(model, "ddim", 1)  # in one step, the image is linear in the output
        return sample(model, table, 4, context=context, guidance=guidance).images

    assert np.allclose(draw(0.0), draw(None, None), atol=1e-4)
    assert np.allclose(draw(1.0), draw(None), atol=1e-4)
    far = draw(1000.0) - draw(0.0)  # the context changes an untrained network little
    assert np.abs(far).max() > 1
    assert np.allclose(draw(500.0) - draw(0.0), far / 2, atol=1e-2)
    assert np.corrcoef(far.ravel(), (draw(1.0) - draw(0.0)).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("number", [np.float32(2), np.int64(2), jnp.float32(2)])
def test_numbers_of_numpy_and_jax_are_numbers(model, contexts, number) -> None:
    def draw(**given) -> np.ndarray:
        return sample(model, tableau(model, "ddim", 2), 2, context=contexts[:2], **given).images

    expected = draw(guidance=2.0, seed=3)
    assert np.array_equal(draw(guidance=number, seed=jnp.int32(3)), expected)
    assert np.array_equal(draw(guidance=number, seed=np.uint8(3)), expected)


@pytest.mark.parametrize(
    ("seed", "message"),
    [(3.7, "seed=3.7: it must be a whole number")]
    + [(seed, f"seed={seed}: it must be in 0..4294967295") for seed in (-1, 2**32)],
)
def test_seeds_that_are_refused(model, seed, message: str) -> None:
    for draw in (
        lambda: sample(model, tableau(model), 1, seed=seed),
        lambda: initial_noise(model, 1, seed),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            draw()


@pytest.mark.parametrize(("n", "at_once"), [(8, 8), (4096, 4096), (5000, 2500), (10**6, 4082)])
def test_many_images_are_drawn_in_even_batches(model, n: int, at_once: int) -> None:
    """Draw up to 4096 images of 8x8 at once."""
    assert images_at_once(n, model) == at_once
    assert -(-n // at_once) * at_once - n < -(-n // at_once)
    with pytest.raises(InputError, match="batch_size=0: it must be at least 1"):
        images_at_once(n, model, 0)


def test_what_is_kept_of_batches_is_what_is_returned(model) -> None:
    table, seen = tableau(model, "ddim", 2), []

    def keep(batch: Samples) -> Samples:
        seen.append(batch.images)
        return batch.take(np.array([1]))

    given = {"frames": [0, 1], "batch_size": 3, "devices": jax.devices()[:1]}
    whole = sample(model, table, 5, **given)
    kept = sample(model, table, 5, **given, keep=keep)
    assert np.array_equal(np.concatenate(seen), whole.images)
    assert np.array_equal(kept.images, whole.images[[1, 4]])
    assert np.array_equal(kept.frames, whole.frames[:, [1, 4]])


def test_no_images_are_no_sample(model) -> None:
    with pytest.raises(InputError, match="n=0: it must be at least 1"):
        sample(model, tableau(model), 0)
