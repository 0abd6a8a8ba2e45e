"""The report of a run, report.html: samples, the loss, the configuration and the versions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from diffusion_jax import pictures, samplers
from diffusion_jax.data import contexts
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.parallel import is_first
from diffusion_jax.runs import environment, metrics
from diffusion_jax.runs.models import load_config
from diffusion_jax.runs.reports import Section, gallery, picture, table, write_report
from diffusion_jax.sampling import frame_rows, sample

SAMPLERS = {"ddim": 25, "ddpm": 500}  # with at most that many steps
EACH = 8  # images of a class
CLASSES = 16  # the most that a report shows


def write_run_report(run: Path, model: Model, devices: Sequence[jax.Device]) -> Path:
    """Sample from a run's model by class, and write report.html into its folder."""
    path = run / "report.html"
    sections = [*sample_sections(model, devices)]  # on all processes
    if not is_first():
        return path
    records = metrics.read(run / metrics.METRICS)
    sections += [
        Section("Training loss", loss_curve(records)),
        Section("Configuration", table(load_config(run).to_dict())),
        Section("Versions", versions(run)),
    ]
    figures = summary(records, model)
    write_report(path, title=f"Run {run.name}", summary=figures, sections=sections)
    return path


def sample_sections(model: Model, devices: Sequence[jax.Device]) -> Iterator[Section]:
    """Yield images by class, and their denoising, for each of SAMPLERS."""
    names, vectors = class_contexts(model)
    context = np.repeat(vectors, EACH, axis=0)
    for name, most in SAMPLERS.items():
        steps = min(most, model.schedule.steps)
        tableau = samplers.build(name, model.schedule, steps)
        frames = frame_rows(tableau, model.schedule.steps)
        drawn = sample(
            model, tableau, len(context), context=context, frames=frames, devices=devices
        )
        title = f"{name.upper()}, {steps} steps"
        rows = dict(zip(names, np.split(drawn.images, len(names)), strict=True))
        yield Section(title, gallery(rows))
        moving = pictures.gif_bytes(np.asarray(drawn.frames), columns=EACH, scale=2)
        caption = "From noise to images; the last frame is the result."
        body = picture(moving, f"The denoising of these images by {name}", caption, zoom=2)
        yield Section(f"{title}: the denoising", body)


def preview(model: Model, devices: Sequence[jax.Device]) -> UInt8[np.ndarray, "height width 3"]:
    """Return a picture of EACH samples of every class, by ddim:25."""
    names, vectors = class_contexts(model)
    tableau = samplers.build("ddim", model.schedule, min(25, model.schedule.steps))
    context = np.repeat(vectors, EACH, axis=0)
    images = sample(model, tableau, len(context), context=context, devices=devices).images
    return pictures.grid(images, columns=EACH, labels=names)


def class_contexts(model: Model) -> tuple[list[str], np.ndarray]:
    """Return the names and contexts of the first CLASSES classes.

    For a model trained without context, there is one row, "no context".
    """
    if not model.class_names:
        return ["no context"], np.zeros((1, model.n_cfeat), np.float32)
    classes = contexts.by_class(model.class_names)
    return list(classes)[:CLASSES], np.stack(list(classes.values())[:CLASSES])


def versions(run: Path) -> str:
    """Tabulate the environment of a run's last start, or the present one without a record."""
    *_, last = environment.read(run) or [{"versions": environment.versions()}]
    for name, by in (("devices", ", "), ("command", " ")):
        if isinstance(last.get(name), list):
            last[name] = by.join(map(str, last[name]))
    return table(last)


def loss_curve(records: Sequence[dict[str, Any]]) -> str:
    """Show the losses of a run over its steps."""
    known = [(record["step"], record["loss"]) for record in records if record["loss"] is not None]
    if not known:
        return "<p>This run was not trained here.</p>"
    curve = pictures.loss_curve(None, *np.array(known, float).T)
    return picture(curve, "The loss over the steps", smooth=True)


def summary(records: Sequence[dict[str, Any]], model: Model) -> dict[str, object]:
    """Return the figures at the head of the report."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    last = [record["loss"] for record in records[-100:] if record["loss"] is not None]
    count = len(model.class_names)
    many: dict[str, object] = {"classes": f"{count}, of which the first {CLASSES} are shown"}
    return (many if count > CLASSES else {}) | {
        "parameters": f"{parameters:,}",
        "steps": f"{len(records):,}",
        "loss": f"{np.mean(last):.4f} (mean of the last {len(last)} steps)" if last else "unknown",
    }
