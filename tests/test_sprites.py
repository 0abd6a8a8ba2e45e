"""Sprites: shapes, reproducibility, variety, statistics of classes, and a fixed digest."""

import hashlib
import math

import numpy as np
import pytest

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

each_class = pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)


def of_class(label: int, n: int) -> np.ndarray:
    return draw(np.full(n, label), np.arange(n))


def distinct(images: np.ndarray) -> int:
    return len({image.tobytes() for image in images})


def test_images_depend_only_on_seed_and_index():
    images, labels = sprites(500, seed=3)
    assert (images.shape, images.dtype) == ((500, 16, 16, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((500, 5), np.float32)
    assert set(np.unique(labels)) == {0, 1}
    assert (labels.sum(1) == 1).all()
    fewer, fewer_labels = sprites(70, seed=3)
    assert (images[:70] == fewer).all()
    assert (labels[:70] == fewer_labels).all()
    order = np.array([499, 3, 250, 3, 77])
    assert (draw(labels.argmax(1)[order], order, seed=3) == images[order]).all()
    others, other_labels = sprites(500, seed=4)
    assert (labels != other_labels).any()
    assert distinct(np.concatenate([images, others])) > 990


def test_a_far_index_and_a_large_seed():
    assert draw(np.array([0]), np.array([2**62]), seed=2**64 - 1).shape == (1, 16, 16, 3)
    assert draw(np.empty(0, int), np.empty(0, int)).shape == (0, 16, 16, 3)


def test_mix_is_splitmix64():
    state = np.array([0x9E3779B97F4A7C15], np.uint64)  # the reference's first outputs, with seed 0
    assert mix(state)[0] == 0xE220A8397B1DCDAF
    assert mix(state * np.uint64(2))[0] == 0x6E789E6AA1B965F4


@pytest.mark.parametrize("frequencies", [PUBLISHED_FREQUENCIES, (1, 1, 1, 1, 1), (0, 0.5, 0, 2, 0)])
def test_classes_come_in_proportion(frequencies):
    _, labels = sprites(4000, frequencies=frequencies)
    expected = np.array(frequencies) / sum(frequencies)
    error = np.abs(labels.mean(0) - expected)
    assert (error <= 4 * np.sqrt(expected * (1 - expected) / 4000)).all()
    assert sum(PUBLISHED_FREQUENCIES) == 89_400


@each_class
def test_images_are_centred_on_white_and_mirrored_half_the_time(label):
    images = of_class(label, 1000)
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    ink = (images < 255).any(-1)
    assert 0.2 < 1 - ink.mean() < 0.8
    mass = ink.sum((1, 2))
    assert (np.abs((ink.sum(2) * np.arange(16)).sum(1) / mass - 7.5) < 4).all()
    assert (np.abs((ink.sum(1) * np.arange(16)).sum(1) / mass - 7.5) < 4).all()
    left, right = ink[:, :, :8].sum((1, 2)), ink[:, :, 8:].sum((1, 2))
    assert 0.4 < (left > right)[left != right].mean() < 0.6


@each_class
def test_a_million_ways_to_draw_each_class(label):
    """Expect at least a million, and as few repetitions as the birthday bound then allows."""
    ways = 0
    for drawing in DRAWINGS[label]:
        options = (*drawing.layers, *drawing.palettes.values())
        ways += (combinations := 3 * math.prod(map(len, options)))  # times three shifts
        assert combinations >= 100_000
        for layer in drawing.layers:
            picture = layer.reshape(-1, SIZE, SIZE)
            assert (picture[:, [0, -1]] == 0).all(), "art stays within the frame"
            assert picture.max() <= 2 * len(SLOTS)
            shown = layer[(layer > 0).any(1)]  # a layer can contain several empty pictures
            assert distinct(shown) == len(shown)
        for palette in drawing.palettes.values():
            assert distinct(palette) > 0.9 * len(palette)
    assert ways >= 1_000_000
    n = 20_000
    assert n - distinct(of_class(label, n)) <= n * (n - 1) / 2 / 1_000_000


def test_classes_do_not_share_images():
    images = [of_class(label, 2000) for label in range(len(CLASS_NAMES))]
    assert distinct(np.concatenate(images)) == sum(map(distinct, images))


def test_a_linear_classifier_separates_the_classes():
    images, labels = sprites(4000, seed=1, frequencies=(1, 1, 1, 1, 1))
    x = np.concatenate([images.reshape(4000, -1) / 127.5 - 1, np.ones((4000, 1))], 1)
    train, test = slice(3000), slice(3000, None)
    gram = x[train].T @ x[train] + 30 * np.eye(x.shape[1])
    scores = x[test] @ np.linalg.solve(gram, x[train].T @ labels[train])
    assert (scores.argmax(1) == labels[test].argmax(1)).mean() > 0.8


def test_golden():
    images, labels = sprites(64)
    digest = hashlib.sha256(images.tobytes() + labels.argmax(1).astype("<i8").tobytes())
    assert digest.hexdigest() == "115df7f51e8aa033665e1860f4c4539ff866bd45b054305bfffa00eb5eb16294"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n=0: it must be a whole number in 1..10000000"),
        ({"n": 2.5}, r"n=2\.5: it must be|sprites"),  # under the tests' type checker: TypeError
        ({"n": 3, "seed": -1}, "seed=-1: it must be a whole number in 0..18446744073709551615"),
        ({"n": 3, "seed": 2**64}, "seed=18446744073709551616: it must be"),
        ({"n": 3, "seed": "1"}, "seed='1': it must be|sprites"),
        ({"n": 3, "frequencies": (1, 2)}, r"frequencies=\(1, 2\): give 5 numbers from 0 up"),
        ({"n": 3, "frequencies": (1, 1, 1, 1, -1)}, "frequencies=.*from 0 up"),
        ({"n": 3, "frequencies": (0, 0, 0, 0, 0)}, "frequencies=.*not all 0"),
        ({"n": 3, "frequencies": (1, 1, float("nan"), 1, 1)}, "frequencies=.*nan"),
        ({"n": 3, "frequencies": (1, 1, float("inf"), 1, 1)}, "frequencies=.*inf"),
        ({"n": 3, "frequencies": (1e308,) * 5}, "frequencies=.*of a finite sum"),
    ],
)
def test_wrong_arguments_of_sprites(arguments, message):
    with pytest.raises((InputError, TypeError), match=message):
        sprites(**arguments)


@pytest.mark.parametrize(
    ("labels", "indices", "message"),
    [
        ([5], [0], "labels: give 1 whole numbers in 0..4"),
        ([-1], [0], "labels: give 1"),
        ([0, 1], [0], "indices: give 2 whole numbers in 0..9223372036854775807"),
        ([0], [-7], "indices: give 1"),
        ([0.5], [0], "labels: give 1 whole numbers"),
        ([[0]], [0], "labels: give 1 whole numbers"),
    ],
)
def test_wrong_arguments_of_draw(labels, indices, message):
    with pytest.raises(InputError, match=message):
        draw(np.array(labels), np.array(indices))
