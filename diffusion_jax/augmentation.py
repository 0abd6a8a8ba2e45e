"""Augmentation of training images: horizontal flips, of all of them or of some classes only."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from diffusion_jax.typing import Context, Images, require

NONE, ALL = ("none",), ("all",)
NUMBER = 3  # of this draw from an image's key: the step's own are 0, 1, 2

Augment = Callable[[Images, Context, Key[Array, "batch"]], Images]


def check(flips: Sequence[str], class_names: Sequence[str], null_context: bool = False) -> None:
    """Raise InputError unless flips is none, all, or some of the classes.

    Without class_names, which the data brings, the classes are not checked yet.
    """
    given = ",".join(flips)
    words = tuple(flips) in (NONE, ALL)
    alone = bool(flips) and (words or not {*NONE, *ALL} & set(flips))
    require(alone, f"flips={given}: it must be none, all, or the names of classes")
    require(
        words or not null_context,
        f"flips={given}: without context the classes are unknown: none or all",
    )
    unknown = [name for name in flips if name not in class_names]
    require(
        words or not class_names or not unknown,
        f"flips={given}: there is no class {', '.join(unknown)}: choose none, all, or some of "
        f"{', '.join(class_names)}",
    )


def horizontal_flips(flips: Sequence[str], class_names: Sequence[str]) -> Augment:
    """(images, context, keys) -> images, every second one of those in flips mirrored.

    Of a context that mixes classes, all must be in flips; an image without context is mirrored.
    Whether an image is mirrored depends on its key alone. Raises InputError as check does, and for
    classes where there are no names.
    """
    check(flips, class_names)
    if tuple(flips) == NONE:
        return lambda images, context, keys: images
    everything = tuple(flips) == ALL
    require(everything or class_names, f"flips={','.join(flips)}: the classes have no names")
    kept = np.array([not everything and name not in flips for name in class_names], bool)

    def augment(images: Images, context: Context, keys: Key[Array, "batch"]) -> Images:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, NUMBER)
        heads = jax.vmap(jax.random.bernoulli)(own)
        if kept.any():
            heads &= ~jnp.any((context != 0) & kept, axis=1)
        return jnp.where(heads[:, None, None, None], images[:, :, ::-1], images)

    return augment
