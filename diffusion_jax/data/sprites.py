"""Sprites: 16x16 pixel art in five classes, drawn by integer arithmetic from (seed, index).

They stand in for the sprite file of the course "How Diffusion Models Work". An image is a body
plan of its class; for each layer of the plan one of the layer's pictures; for each slot of the
plan's palette a colour and a tint; and a move by at most one row, perhaps mirrored.

Independent choices multiply to 5e23 ways to draw a hero, 2e18 a non-hero, 1e10 a food, 2e11 a
spell and 6e18 a side-facing (mirror images not counted). Some choices hide others, and plans are
equally frequent but not equally rich, so 20,000 images of a class hold up to 100 repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count, product
from typing import NamedTuple

import numpy as np

from diffusion_jax.data.sprite_art import COMMON, PLANS, Plan
from diffusion_jax.typing import InputError

CLASS_NAMES = ("hero", "non-hero", "food", "spell", "side-facing")
PUBLISHED_FREQUENCIES = (8000, 32400, 6000, 35000, 8000)  # of the course's label file, 89,400

LARGEST = 10**7  # images of a data set: 8 GB
SIZE = 16
SLOTS = "kwshmgolrabc"
UNTINTED = "kw"
TINTS = tuple(product((256, 244, 232), repeat=3))  # of red, green, blue, in 256ths
SHADE = (160, 152, 176)  # of red, green, blue, in 256ths
LABEL, PLAN = 0, 1  # numbers of choices; a plan's own come after
SHIFTS = (0, 0, 1, -1)  # rows downwards


class Drawing(NamedTuple):
    """A plan made ready: pictures are slot numbers, 0 where transparent."""

    layers: tuple[np.ndarray, ...]  # of (options, 256) uint8
    palettes: Mapping[int, np.ndarray]  # slot number -> (options, 3) uint8

    @property
    def combinations(self) -> int:
        """How many ways there are to draw it, mirror images not counted."""
        options = [len(choice) for choice in (*self.layers, *self.palettes.values())]
        return math.prod(options) * len(set(SHIFTS))


def slot_number(letter: str) -> int:
    """1, 3, 5, ... for the slots, one more for their shades, 0 for transparent."""
    return 2 * SLOTS.index(letter.lower()) + 1 + letter.isupper() if letter != "." else 0


def pictures(lines: Sequence[str], top: int) -> np.ndarray:
    """(options, 256) uint8: pictures side by side, whose first row is row `top`."""
    rows = [line.split() for line in lines]
    canvas = np.zeros((len(rows[0]), SIZE, SIZE), np.uint8)
    for y, row in enumerate(rows, top):
        for picture, line in zip(canvas, row, strict=True):
            whole = line + line[::-1] if 2 * len(line) == SIZE else line.rjust(SIZE, ".")
            picture[y] = [slot_number(letter) for letter in whole]
    return canvas.reshape(-1, SIZE * SIZE)


def layers(top: int, sheet: str) -> list[np.ndarray]:
    """The layers of a sheet, each (options, 256)."""
    columns = zip(*(line.split("|") for line in sheet.strip().split("\n")), strict=True)
    return [pictures(lines, top) for lines in columns]


def palette(slot: str, colours: Sequence[int]) -> np.ndarray:
    """(options, 3) uint8: each colour 0xRRGGBB in each tint."""
    rgb = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in colours])
    tints = TINTS[:1] if slot in UNTINTED else TINTS
    return np.concatenate([rgb * tint // 256 for tint in tints]).astype(np.uint8)


def drawing(plan: Plan) -> Drawing:
    """A plan made ready, with the slots that it shows and no other."""
    shown = set("".join(sheet for _, sheet in plan.sheets).lower()) & set(SLOTS)
    colours = {**COMMON, **plan.colours}
    return Drawing(
        tuple(layer for sheet in plan.sheets for layer in layers(*sheet)),
        {slot_number(slot): palette(slot, colours[slot]) for slot in sorted(shown)},
    )


def moves() -> np.ndarray:
    """(2 len(SHIFTS), 256): for each pixel, where it comes from."""
    pixel = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
    shifted = [np.roll(pixel, shift, 0) for shift in SHIFTS]
    return np.stack([move.ravel() for s in shifted for move in (s, s[:, ::-1])])


DRAWINGS = tuple(tuple(drawing(plan) for plan in plans.values()) for plans in PLANS)
MOVES = moves()


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit words (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(keys: np.ndarray, number: int) -> np.ndarray:
    """(N,) uint64: the random word of choice `number` under each key."""
    return mix(keys + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64))


def keys_of(indices: np.ndarray, seed: int) -> np.ndarray:
    """(N,) uint64: the key of each image, from which all its choices follow."""
    return mix(random_bits(np.array([seed], np.uint64), 0) + indices.astype(np.uint64))


def choose(keys: np.ndarray, number: int, options: int | np.ndarray) -> np.ndarray:
    """(N,) in 0 .. options - 1."""
    word = random_bits(keys, number) >> np.uint64(32)
    return (word * np.asarray(options, np.uint64) >> np.uint64(32)).astype(np.intp)


def paint(plan: Drawing, keys: np.ndarray) -> np.ndarray:
    """(N, 256, 3) uint8: one image of the plan for each key."""
    number = count(PLAN + 1)
    canvas = np.zeros((len(keys), SIZE * SIZE), np.uint8)
    for options in plan.layers:
        layer = options[choose(keys, next(number), len(options))]
        np.copyto(canvas, layer, where=layer > 0)
    colours = np.full((len(keys), 2 * len(SLOTS) + 1, 3), 255, np.uint8)
    for slot, options in plan.palettes.items():
        colours[:, slot] = options[choose(keys, next(number), len(options))]
        colours[:, slot + 1] = colours[:, slot].astype(np.uint16) * SHADE // 256
    source = MOVES[choose(keys, next(number), len(MOVES))]
    image = np.arange(len(keys))[:, None]
    return colours[image, canvas[image, source]]


def checked_seed(seed: int) -> int:
    """The seed, if it is one."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed!r}; it must be an integer from 0 to 2**64 - 1")
    return int(seed)


def checked_integers(name: str, values: np.ndarray, end: int) -> np.ndarray:
    """The values, if all of them are integers in 0 .. end - 1."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(
            f"{name} is {values.dtype} of shape {values.shape}; it must be integers of shape (N,)"
        )
    wrong = values[(values < 0) | (values >= end)]
    if len(wrong):
        raise InputError(f"{name} holds {wrong[0]}; its values must be from 0 to {end - 1}")
    return values


def cumulative(frequencies: Sequence[int | float]) -> np.ndarray:
    """(5,) float64: the distribution function of the classes, ending at exactly 1."""
    weights = np.asarray(frequencies, np.float64)
    with np.errstate(over="ignore"):
        good = weights.shape == (len(CLASS_NAMES),) and np.isfinite(weights.sum())
    if not good or (weights < 0).any() or not weights.any():
        raise InputError(
            f"frequencies is {frequencies!r}; it must be {len(CLASS_NAMES)} numbers, "
            "none negative, not all zero, and of a finite sum"
        )
    return np.cumsum(weights) / np.cumsum(weights)[-1]


def draw(labels: np.ndarray, indices: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw images of given classes; each depends on its own label and index and the seed alone.

    labels: (N,) integers from 0 to 4, see CLASS_NAMES. indices: (N,) integers from 0.
    Returns (N, 16, 16, 3) uint8 in 0..255, on white.
    Raises InputError for labels, indices or a seed out of range, or of unequal lengths.
    """
    labels = checked_integers("labels", labels, len(CLASS_NAMES))
    indices = checked_integers("indices", indices, 2**63)
    if len(labels) != len(indices):
        raise InputError(
            f"labels has {len(labels)} entries and indices {len(indices)}; "
            "there must be one label for each index"
        )
    keys = keys_of(indices, checked_seed(seed))
    plans = choose(keys, PLAN, np.array([len(drawings) for drawings in DRAWINGS])[labels])
    images = np.empty((len(labels), SIZE * SIZE, 3), np.uint8)
    for label, drawings in enumerate(DRAWINGS):
        for number, plan in enumerate(drawings):
            chosen = np.flatnonzero((labels == label) & (plans == number))
            images[chosen] = paint(plan, keys[chosen])
    return images.reshape(-1, SIZE, SIZE, 3)


def sprites(
    n: int, seed: int = 0, frequencies: Sequence[int | float] = PUBLISHED_FREQUENCIES
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the data set of n images; the first m of them are the data set of m.

    Returns images (n, 16, 16, 3) uint8 in 0..255 and labels (n, 5) float32, one-hot, with
    classes drawn in proportion to `frequencies`.
    Raises InputError for n < 1, a seed out of range, or frequencies that are no distribution.
    """
    if not isinstance(n, int | np.integer) or not 1 <= n <= LARGEST:
        raise InputError(f"n is {n!r}; it must be an integer, from 1 to {LARGEST}")
    indices = np.arange(n)
    uniform = random_bits(keys_of(indices, checked_seed(seed)), LABEL) >> np.uint64(11)
    labels = np.searchsorted(cumulative(frequencies), uniform * 2.0**-53, side="right")
    return draw(labels, indices, seed), np.eye(len(CLASS_NAMES), dtype=np.float32)[labels]
