"""The report of a run: one HTML file that holds its pictures and fetches nothing.

A report is a title, a summary and sections. `picture`, `gallery`, `pair` and `table` make the
sections' bodies from the macros of parts.html. Their arguments are text, which is escaped; they
return HTML.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from diffusion_jax.files import write_atomically
from diffusion_jax.pictures import grid, png_bytes
from diffusion_jax.typing import InputError

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)
PARTS: Any = TEMPLATES.get_template("parts.html").module


class Section(NamedTuple):
    """A part of a report: a heading (text) and a body (HTML, as this module's functions make)."""

    heading: str
    body: str


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, object],
    sections: Sequence[Section],
) -> None:
    """Write a report with its title, its few figures (name to value) and its sections in order."""
    page = TEMPLATES.get_template("report.html")
    html = page.render(title=title, summary=summary, sections=sections)
    write_atomically(path, html.encode())


def picture(
    data: bytes, alt: str, caption: str = "", *, link: str = "", zoom: int = 1, smooth: bool = False
) -> str:
    """Embed a PNG or a GIF, with what it shows in words (alt), enlarged `zoom` times.

    link: a file beside the report, named after the caption. Pixels stay crisp unless `smooth`
    (for curves). Raise InputError if the data are neither PNG nor GIF.
    """
    return PARTS.picture(_image(data, alt, zoom, smooth), caption, link)


def gallery(rows: Mapping[str, ArrayLike], columns: int = 8, **options: Any) -> str:
    """Show groups of images, each (batch, height, width, channel), beside their names.

    options: as for `pictures.grid`. On a narrow screen the names stand above the images.
    """
    sheets = ((name, grid(images, columns=columns, **options)) for name, images in rows.items())
    return PARTS.gallery([_image(png_bytes(sheet), name) for name, sheet in sheets])


def pair(figures: Sequence[str], text: str) -> str:
    """Show figures that `picture` made side by side, below a text."""
    return PARTS.pair(figures, text)


def table(values: Mapping[str, object]) -> str:
    """Tabulate names and values; a mapping among the values becomes a table of its own."""
    groups = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in values.items() if name not in groups}
    return PARTS.table(({"": single} if single else {}) | groups)


def _image(data: bytes, alt: str, zoom: int = 1, smooth: bool = False) -> dict[str, Any]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "GIF")) as image:
            kind, (width, height) = str(image.format).lower(), image.size
    except UnidentifiedImageError:
        raise InputError(f"data: {data[:8]!r}...: give the bytes of a PNG or a GIF") from None
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    size = {"width": width * zoom, "height": height * zoom}
    return {"source": source, "alt": alt, "smooth": smooth} | size
