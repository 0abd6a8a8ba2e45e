"""The report of a run, report.html: samples, the loss, the configuration and the versions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax import pictures, samplers
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.parallel import is_first
from diffusion_jax.runs import environment, metrics
from diffusion_jax.runs.checkpoints import latest
from diffusion_jax.runs.models import SHIPPED, find_run, load_config, load_model
from diffusion_jax.runs.previews import CLASSES, EACH, class_contexts
from diffusion_jax.runs.reports import Section, gallery, pair, picture, table, write_report
from diffusion_jax.sampling import frame_rows, sample
from diffusion_jax.typing import InputError

LONGER = (
    "Both pictures start from the same noise. Longer training makes outlines whole, colours even, "
    "and things that can be named: try --preset=best --minutes=30."
)
SAMPLERS = {"ddim": 25, "ddpm": 500}  # with at most that many steps


def write_run_report(run: Path, model: Model, devices: Sequence[jax.Device]) -> Path:
    """Sample from a run's model by class, and write report.html into its folder."""
    path = run / "report.html"
    # All processes draw.
    sections = [*beside_sections(run, model, devices), *sample_sections(model, devices)]
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


def beside_sections(run: Path, model: Model, devices: Sequence[jax.Device]) -> Iterator[Section]:
    """Yield samples beside those of the project's model, if the run learned such images too."""
    try:
        kinds = {load_config(folder).specs()["data"].name for folder in (run, SHIPPED)}
    except InputError:  # it was removed
        return
    if len(kinds) > 1 or not model.class_names:
        return
    names, vectors = class_contexts(model)
    context, figures = np.repeat(vectors, EACH // 2, axis=0), []
    for title, folder, one in (
        (f"Run {run.name}", run, model),
        ("The model of the project", find_run(SHIPPED), load_model()),
    ):
        tableau = samplers.build("sa_solver", one.schedule, min(10, one.schedule.steps))
        images = sample(one, tableau, len(context), context=context, devices=devices).images
        sheet = pictures.grid(images, columns=EACH // 2, labels=names)
        steps, size = latest(folder) or 0, load_config(folder).batch_size
        caption = f"{title}: {steps:,} steps of {size} images"
        figures.append(picture(pictures.png_bytes(sheet), title, caption))
    yield Section("Beside the model of the project", pair(figures, LONGER))


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


def versions(run: Path) -> str:
    """Tabulate the environment of a run's last start, or today's if there is no record."""
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
