"""Sprites: 16x16 pixel art in five classes, drawn by integer arithmetic from (seed, index).

They replace the sprite file of the course "How Diffusion Models Work". Random choices determine an
image: a body plan of its class, one picture for each layer of the plan, a colour and a tint for
each slot of the plan's palette, a shift by at most one row, and whether the image is mirrored. The
pictures and the colours are in sprites.toml.

Independent choices multiply to 5e23 ways to draw a hero, 2e18 a non-hero, 1e10 a food, 2e11 a
spell and 6e18 a side-facing (mirror images not counted). Some choices hide others, and plans are
equally frequent but not equally rich, so 20,000 images of a class contain up to 100 repetitions.
"""

import tomllib
from collections.abc import Mapping, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.dataset import Dataset, Source
from diffusion_jax.typing import require

CLASS_NAMES = ("hero", "non-hero", "food", "spell", "side-facing")
PUBLISHED_FREQUENCIES = (8000.0, 32400.0, 6000.0, 35000.0, 8000.0)  # the course's
HELD_OUT = 2**40  # added to the seed of sets that no training draws
MOST_IMAGES = 10**7  # images in a data set: 8 GB
SIZE = 16
SLOTS = "kwshmgolrabc"
UNTINTED = "kw"
TINTS = tuple(product((256, 244, 232), repeat=3))  # factors of red, green, blue, in 256ths
SHADE = (160, 152, 176)  # factors of red, green, blue, in 256ths
LABEL, PLAN = 0, 1  # numbers of the first choices; a plan's own choices follow
SHIFTS = (0, 0, 1, -1)  # rows downwards


class Drawing(NamedTuple):
    """A plan as arrays: the pixels of its pictures are slot numbers, 0 where transparent."""

    layers: tuple[np.ndarray, ...]  # each (options, 256) uint8
    palettes: Mapping[int, np.ndarray]  # slot number -> (options, 3) uint8


def slot_number(letter: str) -> int:
    """Return 1, 3, 5, ... for a slot, one more for its shade, and 0 for transparent."""
    return 2 * SLOTS.index(letter.lower()) + 1 + letter.isupper() if letter != "." else 0


def pictures(lines: Sequence[str], top: int) -> np.ndarray:
    """Return pictures that stand side by side and begin in row `top`: (options, 256) uint8."""
    rows = [line.split() for line in lines]
    canvas = np.zeros((len(rows[0]), SIZE, SIZE), np.uint8)
    for y, row in enumerate(rows, top):
        for picture, line in zip(canvas, row, strict=True):
            whole = line + line[::-1] if 2 * len(line) == SIZE else line.rjust(SIZE, ".")
            picture[y] = [slot_number(letter) for letter in whole]
    return canvas.reshape(-1, SIZE * SIZE)


def layers(top: int, sheet: str) -> list[np.ndarray]:
    """Return the layers of a sheet, each (options, 256)."""
    columns = zip(*(line.split("|") for line in sheet.strip().split("\n")), strict=True)
    return [pictures(lines, top) for lines in columns]


def palette(slot: str, colours: Sequence[int]) -> np.ndarray:
    """Return each colour 0xRRGGBB in each tint: (options, 3) uint8."""
    rgb = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in colours])
    tints = TINTS[:1] if slot in UNTINTED else TINTS
    return np.concatenate([rgb * tint // 256 for tint in tints]).astype(np.uint8)


def read_drawings(path: Path) -> tuple[tuple[Drawing, ...], ...]:
    """Return the plans of each class, with only the slots that they show."""
    art: dict[str, Any] = tomllib.loads(path.read_text())
    sheets = {name: sheet for kind in CLASS_NAMES for name, sheet in art[kind]["sheets"].items()}

    def drawing(plan: Mapping[str, Any]) -> Drawing:
        parts = [(top, sheets[name]) for top, name in plan["sheets"]]
        shown = set("".join(sheet for _, sheet in parts).lower()) & set(SLOTS)
        colours = {k: art["colours"][v] for k, v in (art["slots"] | plan["colours"]).items()}
        return Drawing(
            tuple(layer for part in parts for layer in layers(*part)),
            {slot_number(slot): palette(slot, colours[slot]) for slot in sorted(shown)},
        )

    return tuple(tuple(map(drawing, art[kind]["plans"].values())) for kind in CLASS_NAMES)


def moves() -> np.ndarray:
    """Return which pixel each move puts at each place: (2 len(SHIFTS), 256)."""
    pixel = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
    shifted = [np.roll(pixel, shift, 0) for shift in SHIFTS]
    return np.stack([move.ravel() for s in shifted for move in (s, s[:, ::-1])])


DRAWINGS = read_drawings(Path(__file__).with_suffix(".toml"))
MOVES = moves()


def mix(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64, a bijection of 64-bit words (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(keys: np.ndarray, number: int) -> np.ndarray:
    """Return the random word of choice `number` under each key: (N,) uint64."""
    return mix(keys + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64))


def keys_of(indices: np.ndarray, seed: int) -> np.ndarray:
    """Return the key of each image, which determines all its choices: (N,) uint64."""
    return mix(random_bits(np.array([seed], np.uint64), 0) + indices.astype(np.uint64))


def choose(keys: np.ndarray, number: int, options: int | np.ndarray) -> np.ndarray:
    """Return the outcome of choice `number` under each key: (N,) in 0 .. options - 1."""
    word = random_bits(keys, number) >> np.uint64(32)
    return (word * np.asarray(options, np.uint64) >> np.uint64(32)).astype(np.intp)


def paint(plan: Drawing, keys: np.ndarray) -> np.ndarray:
    """Draw one image of the plan for each key: (N, 256, 3) uint8."""
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


def check_seed(seed: int) -> None:
    """Raise InputError unless a seed is a whole number in 0 .. 2^64 - 1."""
    fits = isinstance(seed, int | np.integer) and 0 <= seed < 2**64
    require(fits, f"seed={seed!r}: it must be a whole number in 0..{2**64 - 1}")


def draw(labels: np.ndarray, indices: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw images of given classes; each depends only on the seed and its own label and index.

    labels: (N,) integers from 0 to 4, see CLASS_NAMES. indices: (N,) integers from 0.
    Return (N, 16, 16, 3) uint8 in 0..255, on white.
    Raise InputError if labels, indices or the seed are out of range, or if lengths differ.
    """
    check_seed(seed)
    for name, values, end in (("labels", labels, len(CLASS_NAMES)), ("indices", indices, 2**63)):
        fits = values.ndim == 1 and values.dtype.kind in "iu"
        require(
            fits and np.all((values >= 0) & (values < end)) and len(values) == len(labels),
            f"{name}: give {len(labels)} whole numbers in 0..{end - 1}",
        )
    keys = keys_of(indices, seed)
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
    """Draw the data set of n images, which begins with every smaller one.

    Return images (n, 16, 16, 3) uint8 in 0..255 and labels (n, 5) float32, one-hot, with
    classes drawn in proportion to `frequencies`.
    Raise InputError unless n is in 1 .. MOST_IMAGES, the seed in 0 .. 2^64 - 1, and frequencies are
    five numbers from 0 up, not all 0, with a finite sum.
    """
    fits = isinstance(n, int | np.integer) and 1 <= n <= MOST_IMAGES
    require(fits, f"n={n!r}: it must be a whole number in 1..{MOST_IMAGES}")
    check_seed(seed)
    with np.errstate(over="ignore"):
        total = np.cumsum(np.asarray(frequencies, np.float64))
    fits = total.shape == (5,) and np.min(frequencies) >= 0 and 0 < total[-1] < np.inf
    require(
        fits, f"frequencies={frequencies}: give 5 numbers from 0 up, not all 0, of a finite sum"
    )
    indices = np.arange(n)
    uniform = random_bits(keys_of(indices, seed), LABEL) >> np.uint64(11)
    labels = np.searchsorted(total / total[-1], uniform * 2.0**-53, side="right")
    return draw(labels, indices, seed), np.eye(len(CLASS_NAMES), dtype=np.float32)[labels]


def drawn(
    n: int = 89_400, seed: int = 0, frequencies: tuple[float, ...] = PUBLISHED_FREQUENCIES
) -> Source:
    """Draw n sprites of 16x16 pixels in five classes, which occur in proportion to frequencies."""

    def fresh(n: int, number: int) -> Dataset:
        return Dataset(*sprites(n, seed + number * HELD_OUT, frequencies), CLASS_NAMES)

    return Source(Dataset(*sprites(n, seed, frequencies), CLASS_NAMES), fresh=fresh)
