"""Flips mirror the named classes at the right rate, and depend only on the image's key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.runs.config import Config
from diffusion_jax.training.augmentation import build
from diffusion_jax.typing import InputError

N, NAMES = 600, ("hero", "food", "side-facing")
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(N, 4, 4, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(1), N)
# Contexts of one class, of two classes at once, and of none.
CONTEXTS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.4, 0], [0.6, 0, 0.4], [0, 0, 0]], np.float32
)
KINDS = np.arange(N) % len(CONTEXTS)


def mirrored(flips: str, chosen=slice(None)) -> np.ndarray:
    """Return which images came out mirrored. The others must be unchanged."""
    augment = jax.jit(build(flips, NAMES))
    images = np.asarray(augment(IMAGES[chosen], jnp.asarray(CONTEXTS[KINDS[chosen]]), KEYS[chosen]))
    before = np.asarray(IMAGES[chosen])
    flipped = np.all(images == np.flip(before, 2), axis=(1, 2, 3))
    assert np.all(flipped | np.all(images == before, axis=(1, 2, 3)))
    return flipped


def parts(flips: str) -> list[float]:
    """Return the mirrored fraction for each kind of context."""
    flipped = mirrored(flips)
    return [flipped[kind == KINDS].mean() for kind in range(len(CONTEXTS))]


def test_none_mirrors_nothing_and_all_every_second_image() -> None:
    assert parts("none") == [0] * 6
    assert np.all(np.abs(np.array(parts("flips")) - 0.5) < 0.2)  # four standard errors
    assert abs(mirrored("flips").mean() - 0.5) < 0.08


def test_classes_that_are_not_named_stay_as_they_are_also_in_mixtures() -> None:
    found = np.array(parts("flips:classes=hero,food"))
    assert found[[2, 4]].tolist() == [0, 0]
    assert np.all(np.abs(found[[0, 1, 3, 5]] - 0.5) < 0.2)
    assert np.array_equal(np.array(parts("flips:classes=hero"))[1:5], [0, 0, 0, 0])


def test_it_depends_only_on_the_images_key() -> None:
    whole = mirrored("flips")
    assert np.array_equal(mirrored("flips", slice(100, 200)), whole[100:200])
    free = np.isin(KINDS, [0, 1, 3, 5])
    assert np.array_equal(mirrored("flips:classes=hero,food"), whole & free)


def test_unknown_classes_are_refused() -> None:
    with pytest.raises(InputError, match="classes='heroes' is unknown: did you mean hero"):
        build("flips:classes=heroes", NAMES)
    with pytest.raises(InputError, match="classes='hero' is unknown"):
        Config(augment="flips:classes=hero", null_context=True)
    Config(augment="flips", null_context=True)
