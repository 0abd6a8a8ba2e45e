"""preview.png in a run folder: samples of each class from the present weights."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from diffusion_jax import parallel, pictures, samplers
from diffusion_jax.data import contexts
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Variables

PREVIEW = "preview.png"
EACH = 8  # images of a class
CLASSES = 16  # the most that a picture shows
STEPS = 10
SHARE = 0.02  # the part of the time that previews take


class Preview:
    """The picture of a run, which all processes draw together and the first one writes."""

    def __init__(self, folder: Path, model: Model, devices: Sequence[jax.Device]) -> None:
        """Draw from this model, whose weights change."""
        self.path, self.model, self.devices = folder / PREVIEW, model, devices
        self.due: float | None = None

    def refresh(self, variables: Variables, now: bool = False) -> None:
        """Draw the picture again, always from the same noise, if it is due or must be drawn now.

        It is due so often that drawing takes SHARE of the time. The first drawing compiles, so its
        time does not count.
        """
        begin = time.perf_counter()
        if not parallel.agree(int(now or begin >= (self.due or 0))):
            return
        picture = self.draw(variables)
        if parallel.is_first():
            pictures.save_png(self.path, picture)
        end = time.perf_counter()
        self.due = end if self.due is None else end + (end - begin) / SHARE

    def draw(self, variables: Variables) -> UInt8[np.ndarray, "height width 3"]:
        """Return the picture: EACH samples of every class, in a few steps.

        Values that are not finite are shown as grey, black or white.
        """
        model = self.model._replace(variables=variables)
        names, vectors = class_contexts(model)
        tableau = samplers.build("sa_solver", model.schedule, min(STEPS, model.schedule.steps))
        context = np.repeat(vectors, EACH, axis=0)
        images = sample(model, tableau, len(context), context=context, devices=self.devices).images
        return pictures.grid(np.nan_to_num(images), columns=EACH, labels=names)


def class_contexts(model: Model) -> tuple[list[str], np.ndarray]:
    """Return the names and contexts of the first CLASSES classes.

    For a model trained without context, there is one row, "no context".
    """
    if not model.class_names:
        return ["no context"], np.zeros((1, model.n_cfeat), np.float32)
    classes = contexts.by_class(model.class_names)
    return list(classes)[:CLASSES], np.stack(list(classes.values())[:CLASSES])
