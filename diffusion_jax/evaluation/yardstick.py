"""What many sets of samples are measured by in turn: real images and their features, found once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from diffusion_jax.config import Config
from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.distances import kernel_distance
from diffusion_jax.evaluation.estimate import Estimate
from diffusion_jax.evaluation.measure import Pixels, recognised
from diffusion_jax.evaluation.real import Real, check_shape, real_images
from diffusion_jax.evaluation.spaces import Space, first_space


class Yardstick(NamedTuple):
    """Real images, the weights of their classifier, if they have classes, and their features."""

    real: Real
    params: Any | None
    space: Space
    rows: Float[np.ndarray, "n feature"]
    devices: tuple[jax.Device, ...]

    def measure(
        self, samples: Pixels, labels: Float[np.ndarray, "n class"] | None
    ) -> dict[str, Estimate]:
        """KID and, for samples with labels of data with classes, class accuracy."""
        found = {"KID": kernel_distance(self.rows, self.space.rows(samples, self.devices))}
        if self.params is not None and labels is not None:
            drawn = self.real.reference._replace(images=samples, labels=labels)
            found["class accuracy"] = recognised(self.params, drawn, self.devices)
        return found

    def real_against_real(self, n: int) -> dict[str, Estimate]:
        """The same of n other real images, or of as many as there are."""
        return self.measure(self.real.other.images[:n], self.real.other.labels[:n])


def yardstick(
    config: Config,
    n: int,
    path: Path,
    devices: Sequence[jax.Device],
    tell: Callable[[str], object],
) -> Yardstick:
    """The yardstick of n real images of a run; path: where the classifier is, or will be, stored.

    Raises InputError if the images are too few, or not as the run's network expects.
    """
    real = real_images(config.data, n)
    check_shape(config, real)
    params = classifier.obtain(path, real.teaching, devices, tell)
    space = first_space(real.teaching, params, devices)
    rows = space.rows(real.reference.images, devices)
    return Yardstick(real, params, space, rows, tuple(devices))
