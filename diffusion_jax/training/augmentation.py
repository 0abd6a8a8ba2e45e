"""Augmentation of training images."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from diffusion_jax import spec
from diffusion_jax.typing import Context, Images

Augment: TypeAlias = Callable[[Images, Context, Key[Array, "batch"]], Images]
DRAW = 3  # the index of this draw from an image's key; the step's own draws are 0, 1 and 2


def none(class_names: Sequence[str]) -> Augment:
    """No augmentation."""
    return lambda images, context, keys: images


def flips(class_names: Sequence[str], classes: tuple[str, ...] = ()) -> Augment:
    """Random left-right flips of half of the images: of all classes, or of those named.

    If the context of an image mixes classes, the image is flipped only if all of them are named. An
    image without context can always be flipped. Whether an image is flipped depends only on its
    key. Raise InputError if a class is unknown.
    """
    for name in classes:
        spec.choose(dict.fromkeys(class_names), "augment=flips: classes", name)
    kept = np.array([bool(classes) and name not in classes for name in class_names], bool)

    def augment(images: Images, context: Context, keys: Key[Array, "batch"]) -> Images:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, DRAW)
        heads = jax.vmap(jax.random.bernoulli)(own)
        if kept.any():
            heads &= ~jnp.any((context != 0) & kept, axis=1)
        return jnp.where(heads[:, None, None, None], images[:, :, ::-1], images)

    return augment


AUGMENTATIONS: dict[str, Callable[..., Augment]] = {"none": none, "flips": flips}


def build(text: str, class_names: Sequence[str]) -> Augment:
    """Return the augmentation that a spec describes. Raise InputError as spec.parse does."""
    return spec.build(text, AUGMENTATIONS, "augment", class_names=class_names)
