"""The real images that samples are held against."""

import dataclasses
from typing import NamedTuple

import numpy as np

from diffusion_jax import data
from diffusion_jax.config import Config, DataConfig, at_least, at_most
from diffusion_jax.data import CLASS_NAMES, UNKNOWN, Dataset, digests
from diffusion_jax.typing import InputError, require

LEAST = 100  # images in a set: ten blocks of ten
MOST = 100_000  # images in a set
HELD_OUT = 2**40  # added to the seed of drawn sprites, for sets that no training draws
TEACHING = 20_000  # sprites that a classifier is trained on, the same ones for every run


class Real(NamedTuple):
    """Two disjoint sets of real images, and what was to be learnt.

    reference: what everything is measured against. other: held against it as samples are. seen:
    training images, none of them in other, or None where they are not known. teaching: what a
    classifier is trained on, none of it in other. origin: where the sets come from, in words, and
    how many of other are copies of training images.
    """

    reference: Dataset
    other: Dataset
    seen: Dataset | None
    teaching: Dataset
    origin: str


def real_images(config: DataConfig, n: int, seed: int = 0) -> Real:
    """Sets of n real images: sprites drawn anew, or parts of the user's files, n or half of them.

    Of the user's files, those that were held out, if any were; the halves of all, otherwise.

    Labels are the classes also for a run without context. Raises InputError if n, or the files,
    are too small, or not those that the run was trained on.
    """
    at_least("real_n", n, LEAST)
    at_most("real_n", n, MOST)
    config = dataclasses.replace(config, null_context=False)
    if config.fingerprint == UNKNOWN and not config.images:
        return _drawn(config, None, n)
    dataset = data.everything(config)
    if not config.images:
        real = _drawn(config, dataset, n)
    elif config.held_out:
        real = _halves(*data.split(dataset, config.held_out), n, seed)
    else:
        real = _parts(config, dataset, n, seed)
    assert real.seen is not None
    known = set(digests(real.seen.images))
    copies = sum(digest in known for digest in digests(real.other.images))
    of = f"; {copies} of the {len(real.other.images)} compared have copies among training images"
    return real._replace(origin=real.origin + of) if copies else real


def check_shape(config: Config, real: Real) -> None:
    """Raise InputError unless the data set is as the run's network expects."""
    found = real.reference.images.shape[1:], real.reference.labels.shape[1]
    want = config.network.image_shape, config.network.n_cfeat
    require(
        found == want,
        f"{config.data.images or 'drawn sprites'}: images of shape {found[0]} with {found[1]} "
        f"context features; this run was trained on {want[0]} with {want[1]}",
    )


def _drawn(config: DataConfig, seen: Dataset | None, n: int) -> Real:
    def draw(n: int, seed: int, frequencies: tuple[float, ...]) -> Dataset:
        return Dataset(*data.sprites(n, seed, frequencies), CLASS_NAMES)

    origin = f"2 x {n} sprites drawn with other seeds than the training images"
    if seen is None:
        origin = f"2 x {n} drawn sprites; what these weights were trained on is not known"
    return Real(
        draw(n, config.data_seed + HELD_OUT, config.class_frequencies),
        draw(n, config.data_seed + 2 * HELD_OUT, config.class_frequencies),
        seen,
        draw(TEACHING, 3 * HELD_OUT, (1.0,) * len(CLASS_NAMES)),
        origin,
    )


def _parts(config: DataConfig, dataset: Dataset, n: int, seed: int) -> Real:
    total = len(dataset.images)
    n = _half(total, n, f"images={config.images!r} holds {total} images")
    order = np.random.default_rng(seed).permutation(total)
    seen = _part(dataset, np.sort(order[n:]))
    origin = f"2 x {n} of the {total} training images: none is held out"
    return Real(_part(dataset, order[n : 2 * n]), _part(dataset, order[:n]), seen, seen, origin)


def _halves(seen: Dataset, held_out: Dataset, n: int, seed: int) -> Real:
    total = len(held_out.images)
    n = _half(total, n, f"{total} images are held out")
    order = np.random.default_rng(seed).permutation(total)
    origin = f"2 x {n} of {total} images that training did not see"
    return Real(_part(held_out, order[:n]), _part(held_out, order[n : 2 * n]), seen, seen, origin)


def _half(total: int, n: int, what: str) -> int:
    """How large a set is: n or half of all. Raises InputError if that is too few."""
    if total < 2 * LEAST:
        raise InputError(f"{what}: measuring takes two sets of {LEAST}, at least {2 * LEAST}")
    return min(n, total // 2)


def _part(dataset: Dataset, chosen: np.ndarray) -> Dataset:
    return dataset._replace(images=dataset.images[chosen], labels=dataset.labels[chosen])
