"""The real images that samples are compared with."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax import data
from diffusion_jax.data import CLASS_NAMES, Dataset, Source, digests
from diffusion_jax.data.sprites import HELD_OUT
from diffusion_jax.typing import require

LEAST = 100  # the fewest images in a set: ten blocks of ten
MOST = 100_000
TEACHING = 20_000  # sprites to train a classifier on, the same for every run


class RealImages(NamedTuple):
    """Two disjoint sets of real images, and the training images of the model and the classifier.

    reference: the set that everything is measured against. other: it is measured like samples.
    seen: training images of the model, or None if they are unknown. teaching: training images of
    the classifier. Neither contains images of other. origin: a text about the source of the sets,
    and how many images of other are copies of training images.
    """

    reference: Dataset
    other: Dataset
    seen: Dataset | None
    teaching: Dataset
    origin: str


def real_images(text: str, n: int, seed: int = 0, known: Sequence[str] = ()) -> RealImages:
    """Return sets of at most n real images of the data that a spec describes.

    Data that can be drawn are drawn anew. Images in files are split into two halves: the held-out
    images if there are any, otherwise all; training has then seen the reference. Labels are the
    classes, even for a run without context. known: as in data.source.
    Raise InputError if n is too small, or if there are too few images.
    """
    require(LEAST <= n <= MOST, f"real_n={n}: it must be in {LEAST}..{MOST}")
    source = data.source(text, known)
    real = _halves(text, source, n, seed) if source.fresh is None else _drawn(source, n)
    if real.seen is None:
        return real
    seen = set(digests(real.seen.images))
    copies = sum(digest in seen for digest in digests(real.other.images))
    of = f"; {copies} of the {len(real.other.images)} compared have copies among training images"
    return real._replace(origin=real.origin + of) if copies else real


def check_shape(real: RealImages, image_shape: tuple[int, ...], n_cfeat: int) -> None:
    """Raise InputError unless the real images fit the run's network."""
    found = real.reference.images.shape[1:], real.reference.labels.shape[1]
    require(
        found == (image_shape, n_cfeat),
        f"data: images of shape {found[0]} with {found[1]} context features; this run was trained "
        f"on {image_shape} with {n_cfeat}",
    )


def _drawn(source: Source, n: int) -> RealImages:
    assert source.fresh is not None
    teaching = Dataset(*data.sprites(TEACHING, 3 * HELD_OUT, (1.0,) * 5), CLASS_NAMES)
    origin = f"2 x {n} sprites drawn with other seeds than the training images"
    if source.dataset is None:
        origin = f"2 x {n} drawn sprites; what these weights were trained on is not known"
    return RealImages(source.fresh(n, 1), source.fresh(n, 2), source.dataset, teaching, origin)


def _halves(text: str, source: Source, n: int, seed: int) -> RealImages:
    """Return halves of the held-out images, or of all images if none are held out."""
    assert source.dataset is not None
    dataset, what = source.dataset, f"data={text} holds {len(source.dataset.images)} images"
    if source.held_out:
        seen, dataset = data.split(dataset, source.held_out)
        what = f"{len(dataset.images)} images are held out"
    total = len(dataset.images)
    least = f"measuring takes two sets of {LEAST}, at least {2 * LEAST}"
    require(total >= 2 * LEAST, f"{what}: {least}")
    n = min(n, total // 2)
    order = np.random.default_rng(seed).permutation(total)
    first, second = dataset.part(order[:n]), dataset.part(order[n : 2 * n])
    if source.held_out:
        origin = f"2 x {n} of {total} images that training did not see"
        return RealImages(first, second, seen, seen, origin)
    seen = dataset.part(np.sort(order[n:]))
    origin = f"2 x {n} of the {total} training images: none is held out"
    return RealImages(second, first, seen, seen, origin)
