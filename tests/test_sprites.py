import hashlib

import numpy as np
import pytest

from diffusion_jax.data.sprite_art import PLANS
from diffusion_jax.data.sprites import (
    CLASS_NAMES,
    DRAWINGS,
    PUBLISHED_FREQUENCIES,
    SIZE,
    SLOTS,
    draw,
    mix,
    sprites,
)
from diffusion_jax.typing import InputError

CLASSES = range(len(CLASS_NAMES))


def of_class(label: int, n: int, seed: int = 0) -> np.ndarray:
    return draw(np.full(n, label), np.arange(n), seed)


def distinct(images: np.ndarray) -> int:
    return len({image.tobytes() for image in images})


def test_shapes_types_and_ranges():
    images, labels = sprites(300)
    assert images.shape == (300, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (300, 5)
    assert labels.dtype == np.float32
    assert set(np.unique(labels)) == {0, 1}
    assert (labels.sum(1) == 1).all()
    assert images.min() < 50
    assert images.max() == 255


def test_an_image_depends_on_seed_and_index_alone():
    images, labels = sprites(500, seed=3)
    fewer, fewer_labels = sprites(70, seed=3)
    assert (images[:70] == fewer).all()
    assert (labels[:70] == fewer_labels).all()
    order = np.array([499, 3, 250, 3, 77])
    assert (draw(labels.argmax(1)[order], order, seed=3) == images[order]).all()


def test_seeds_and_indices_differ():
    images, labels = sprites(500, seed=3)
    others, other_labels = sprites(500, seed=4)
    assert (labels != other_labels).any()
    assert distinct(np.concatenate([images, others])) > 990


def test_a_far_index_and_a_large_seed():
    assert draw(np.array([0]), np.array([2**62]), seed=2**64 - 1).shape == (1, 16, 16, 3)
    assert draw(np.empty(0, int), np.empty(0, int)).shape == (0, 16, 16, 3)


def test_mix_is_splitmix64():
    state = np.array([0x9E3779B97F4A7C15], np.uint64)  # first outputs of the reference, seed 0
    assert mix(state)[0] == 0xE220A8397B1DCDAF
    assert mix(state * np.uint64(2))[0] == 0x6E789E6AA1B965F4


@pytest.mark.parametrize("frequencies", [PUBLISHED_FREQUENCIES, (1, 1, 1, 1, 1), (0, 0.5, 0, 2, 0)])
def test_classes_come_in_proportion(frequencies):
    n = 4000
    _, labels = sprites(n, frequencies=frequencies)
    expected = np.array(frequencies) / sum(frequencies)
    error = np.abs(labels.mean(0) - expected)
    assert (error <= 4 * np.sqrt(expected * (1 - expected) / n)).all()


def test_published_frequencies():
    assert sum(PUBLISHED_FREQUENCIES) == 89_400
    assert len(PUBLISHED_FREQUENCIES) == len(CLASS_NAMES) == len(PLANS)


@pytest.mark.parametrize("label", CLASSES)
def test_on_white(label):
    images = of_class(label, 500)
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert 0.2 < (images == 255).all(-1).mean() < 0.8


@pytest.mark.parametrize("label", CLASSES)
def test_centred(label):
    ink = (of_class(label, 500) < 255).any(-1)
    rows, columns = np.arange(16), np.arange(16)
    mass = ink.sum((1, 2))
    assert (np.abs((ink.sum(2) * rows).sum(1) / mass - 7.5) < 4).all()
    assert (np.abs((ink.sum(1) * columns).sum(1) / mass - 7.5) < 4).all()


@pytest.mark.parametrize("label", CLASSES)
def test_a_million_ways_to_draw_each_class(label):
    shifts = 3
    ways = 0
    for drawing in DRAWINGS[label]:
        options = [len(layer) for layer in drawing.layers]
        options += [len(palette) for palette in drawing.palettes.values()]
        ways += shifts * int(np.prod([float(n) for n in options]))
        assert drawing.combinations >= 100_000
    assert ways >= 1_000_000
    assert ways == pytest.approx(sum(drawing.combinations for drawing in DRAWINGS[label]))


@pytest.mark.parametrize("label", CLASSES)
def test_options_of_a_layer_and_colours_of_a_palette_differ(label):
    for drawing in DRAWINGS[label]:
        for layer in drawing.layers:
            shown = layer[(layer > 0).any(1)]  # a layer may hold several empty pictures
            assert distinct(shown) == len(shown)
        for palette in drawing.palettes.values():
            assert distinct(palette) > 0.9 * len(palette)


@pytest.mark.parametrize("label", CLASSES)
def test_repetitions_are_as_rare_as_among_a_million(label):
    n = 20_000
    repetitions = n - distinct(of_class(label, n))
    assert repetitions <= n * (n - 1) / 2 / 1_000_000  # the birthday bound


@pytest.mark.parametrize("label", CLASSES)
def test_mirrored_half_the_time(label):
    images = of_class(label, 1000)
    left = (images[:, :, :8] < 255).any(-1).sum((1, 2))
    right = (images[:, :, 8:] < 255).any(-1).sum((1, 2))
    lopsided = left != right
    assert 0.4 < (left > right)[lopsided].mean() < 0.6


def test_classes_do_not_share_images():
    images = [of_class(label, 2000) for label in CLASSES]
    assert distinct(np.concatenate(images)) == sum(map(distinct, images))


def test_classes_are_told_apart_by_a_linear_classifier():
    images, labels = sprites(4000, seed=1, frequencies=(1, 1, 1, 1, 1))
    x = np.concatenate([images.reshape(4000, -1) / 127.5 - 1, np.ones((4000, 1))], 1)
    train, test = slice(3000), slice(3000, None)
    gram = x[train].T @ x[train] + 30 * np.eye(x.shape[1])
    scores = x[test] @ np.linalg.solve(gram, x[train].T @ labels[train])
    assert (scores.argmax(1) == labels[test].argmax(1)).mean() > 0.8


def test_art_stays_within_the_frame():
    for drawings in DRAWINGS:
        for drawing in drawings:
            for layer in drawing.layers:
                picture = layer.reshape(-1, SIZE, SIZE)
                assert (picture[:, [0, -1]] == 0).all()
                assert picture.max() <= 2 * len(SLOTS)


def test_golden():
    images, labels = sprites(64)
    digest = hashlib.sha256(images.tobytes() + labels.argmax(1).astype("<i8").tobytes())
    assert digest.hexdigest() == "115df7f51e8aa033665e1860f4c4539ff866bd45b054305bfffa00eb5eb16294"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is 0; it must be an integer, from 1 to 10000000"),
        ({"n": -5}, "n is -5; it must be"),
        ({"n": 3, "seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"n": 3, "seed": 2**64}, "seed is 18446744073709551616; it must be"),
        ({"n": 3, "frequencies": (1, 2)}, r"frequencies is \(1, 2\); it must be 5 numbers"),
        ({"n": 3, "frequencies": (1, 1, 1, 1, -1)}, "frequencies is .*none negative"),
        ({"n": 3, "frequencies": (0, 0, 0, 0, 0)}, "frequencies is .*not all zero"),
        ({"n": 3, "frequencies": (1, 1, float("nan"), 1, 1)}, "frequencies is .*nan"),
        ({"n": 3, "frequencies": (1, 1, float("inf"), 1, 1)}, "frequencies is .*inf"),
        ({"n": 3, "frequencies": (1e308,) * 5}, "frequencies is .*of a finite sum"),
    ],
)
def test_wrong_arguments_of_sprites(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        sprites(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "indices", "seed", "message"),
    [
        ([5], [0], 0, "labels holds 5; its values must be from 0 to 4"),
        ([-1], [0], 0, "labels holds -1; its values"),
        ([0, 1], [0], 0, "labels has 2 entries and indices 1; there must be one label for each"),
        ([0], [-7], 0, "indices holds -7; its values"),
        ([0.5], [0], 0, "labels is float64 of shape .*; it must be integers"),
        ([[0]], [0], 0, r"labels is int64 of shape \(1, 1\); it must be"),
        ([0], [0], -2, "seed is -2; it must be"),
    ],
)
def test_wrong_arguments_of_draw(labels, indices, seed, message):
    with pytest.raises(InputError, match=message):
        draw(np.array(labels), np.array(indices), seed)


@pytest.mark.parametrize("arguments", [{"n": 3, "seed": 1.5}, {"n": 2.5}, {"n": 3, "seed": "1"}])
def test_no_integers(arguments):
    with pytest.raises((InputError, TypeError), match=r"n is 2\.5|seed is|sprites"):
        sprites(**arguments)  # under the type checker of the tests a TypeError
