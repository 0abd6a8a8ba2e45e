"""report.html of a run: what a person opens to see how it went."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from diffusion_jax import contexts, environment, metrics, pictures, samplers
from diffusion_jax.parallel import is_first
from diffusion_jax.reports import Section, gallery, picture, table, write_report
from diffusion_jax.runs import Model
from diffusion_jax.sampling import frame_rows, sample

SAMPLERS = (("ddim", 25), ("ddpm", 500))
EACH = 8  # images of a class
CLASSES = 16  # the most that a report shows


def write_run_report(run: Path, model: Model, devices: Sequence[jax.Device]) -> Path:
    """Sample from a run's model by class, and write report.html into its folder."""
    names, vectors = class_contexts(model)
    context = np.repeat(vectors, EACH, axis=0)
    sections = []
    for sampler, steps in SAMPLERS:
        steps = min(steps, model.schedule.steps)
        tableau = samplers.build(sampler, model.schedule, steps)
        frames = frame_rows(tableau, model.schedule.steps)
        drawn = sample(
            model, tableau, len(context), context=context, frames=frames, devices=devices
        )
        rows = dict(zip(names, np.split(drawn.images, len(names)), strict=True))
        title = f"{sampler.upper()}, {steps} steps"
        sections.append(Section(title, gallery(rows)))
        moving = pictures.gif_bytes(np.asarray(drawn.frames), columns=EACH, scale=2)
        caption = "From noise to images; the last frame is the result."
        body = picture(moving, f"The denoising of these images by {sampler}", caption, zoom=2)
        sections.append(Section(f"{title}: the denoising", body))
    sections += [loss_section(run), Section("Configuration", table(model.config.to_dict()))]
    sections.append(Section("Versions", versions(run)))
    path = run / "report.html"
    if is_first():
        write_report(path, title=f"Run {run.name}", summary=summary(run, model), sections=sections)
    return path


def class_contexts(model: Model) -> tuple[list[str], np.ndarray]:
    """A context for each class, with its name; none alone, for a model trained without.

    Of many classes, the first CLASSES.
    """
    config = model.config
    if config.data.null_context:
        return ["no context"], np.zeros((1, config.network.n_cfeat), np.float32)
    classes = contexts.by_class(config.data.class_names)
    return list(classes)[:CLASSES], np.stack(list(classes.values())[:CLASSES])


def versions(run: Path) -> str:
    """What a run was last started with; for one that was not trained here, what is here."""
    *_, last = environment.read(run) or [{"versions": environment.versions()}]
    words = {"devices": ", ", "command": " "}
    lists = {
        name: by.join(map(str, last[name]))
        for name, by in words.items()
        if isinstance(last.get(name), list)
    }
    return table(last | lists)


def loss_section(run: Path) -> Section:
    """The curve of a run's losses."""
    records = metrics.read(run / "metrics.jsonl")
    known = [(record["step"], record["loss"]) for record in records if record["loss"] is not None]
    if not known:
        return Section("Training loss", "<p>This run was not trained here.</p>")
    steps, losses = zip(*known, strict=True)
    curve = pictures.loss_curve(None, steps, losses)
    return Section("Training loss", picture(curve, "The loss over the steps", smooth=True))


def summary(run: Path, model: Model) -> dict[str, object]:
    """What the head of the report says."""
    records = metrics.read(run / "metrics.jsonl")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    last = [record["loss"] for record in records[-100:] if record["loss"] is not None]
    count = len(model.config.data.class_names)
    many: dict[str, object] = {"classes": f"{count}, of which the first {CLASSES} are shown"}
    return (many if count > CLASSES else {}) | {
        "parameters": f"{parameters:,}",
        "steps": f"{len(records):,}",
        "loss": f"{np.mean(last):.4f} (mean of the last {len(last)} steps)" if last else "unknown",
    }
