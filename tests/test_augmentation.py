"""Flips: whom they mirror, how often, and that it hangs on the image's key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.augmentation import horizontal_flips
from diffusion_jax.config import Config
from diffusion_jax.typing import InputError

N, NAMES = 600, ("hero", "food", "side-facing")
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(N, 4, 4, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(1), N)
# One class each, two at once, and none.
CONTEXTS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.4, 0], [0.6, 0, 0.4], [0, 0, 0]], np.float32
)
KINDS = np.arange(N) % len(CONTEXTS)


def mirrored(flips: tuple[str, ...], chosen=slice(None)) -> np.ndarray:
    """Which images came out mirrored; the others must be as they went in."""
    augment = jax.jit(horizontal_flips(flips, NAMES))
    images = np.asarray(augment(IMAGES[chosen], jnp.asarray(CONTEXTS[KINDS[chosen]]), KEYS[chosen]))
    before = np.asarray(IMAGES[chosen])
    flipped = np.all(images == np.flip(before, 2), axis=(1, 2, 3))
    assert np.all(flipped | np.all(images == before, axis=(1, 2, 3)))
    return flipped


def parts(flips: tuple[str, ...]) -> list[float]:
    """The mirrored part of each kind of context."""
    return [mirrored(flips)[kind == KINDS].mean() for kind in range(len(CONTEXTS))]


def test_none_mirrors_nothing_and_all_every_second_image() -> None:
    assert parts(("none",)) == [0] * 6
    assert np.all(np.abs(np.array(parts(("all",))) - 0.5) < 0.2)  # four standard errors
    assert abs(mirrored(("all",)).mean() - 0.5) < 0.08


def test_classes_that_are_not_named_stay_as_they_are_also_in_mixtures() -> None:
    found = np.array(parts(("hero", "food")))
    assert found[[2, 4]].tolist() == [0, 0]
    assert np.all(np.abs(found[[0, 1, 3, 5]] - 0.5) < 0.2)
    assert np.array_equal(np.array(parts(("hero",)))[1:5], [0, 0, 0, 0])


def test_it_hangs_on_the_images_key_alone() -> None:
    whole = mirrored(("all",))
    assert np.array_equal(mirrored(("all",), slice(100, 200)), whole[100:200])
    free = np.isin(KINDS, [0, 1, 3, 5])
    assert np.array_equal(mirrored(("hero", "food")), whole & free)


@pytest.mark.parametrize(
    ("flips", "message"),
    [
        (("heroes",), "flips=heroes: there is no class heroes: choose none, all, or some of hero"),
        (("hero", "all"), "flips=hero,all: it must be none, all, or the names of classes"),
        ((), "flips=: it must be none, all, or"),
    ],
)
def test_other_flips_are_refused(flips: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        horizontal_flips(flips, NAMES)
    with pytest.raises(InputError, match=message):
        Config().override(flips=flips, class_names=NAMES)


def test_classes_need_names_and_a_context() -> None:
    with pytest.raises(InputError, match="flips=hero: the classes have no names"):
        horizontal_flips(("hero",), ())
    with pytest.raises(InputError, match="flips=hero: without context the classes are unknown"):
        Config().override(flips=("hero",), null_context=True)
    Config().override(flips=("all",), null_context=True)
    Config().override(flips=("hero",))  # the data brings the names
