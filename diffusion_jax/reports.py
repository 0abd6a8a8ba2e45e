"""The report of a run: one HTML file that holds its pictures and fetches nothing.

A report is a title, a summary and sections; `picture`, `gallery` and `table` make the sections'
bodies. Their arguments are text, which is escaped; what they return is HTML.
"""

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from diffusion_jax.files import write_atomically
from diffusion_jax.pictures import grid, png_bytes
from diffusion_jax.typing import InputError

# The policy lets a browser load nothing and run nothing, whatever the content says.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head>
<body><main>
<header><h1>{title}</h1>
{summary}</header>
{sections}
</main></body></html>
"""
STYLE = """
:root { color-scheme: light dark;
  --ground: #fff; --ink: #2c2e34; --soft: #6a6d76; --line: #dcdcd6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17181b; --ink: #e4e4e0; --soft: #a0a3ab; --line: #36383e; } }
@media print {
  :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  h2 { break-after: avoid; } figure { break-inside: avoid; print-color-adjust: exact; } }
* { box-sizing: border-box; overflow-wrap: anywhere; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { margin: 0 0 1rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
a { color: inherit; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 0; padding: .75rem 0;
  border: solid var(--line); border-width: 1px 0; }
dt, figcaption { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
figure { display: flex; flex-flow: column; gap: .5rem; margin: 0 0 1rem; align-items: flex-start; }
img { min-width: 0; max-width: 100%; height: auto; border-radius: 4px; background: #eeeeea; }
.pixelated { image-rendering: pixelated; }
.gallery figure { flex-flow: column-reverse; gap: .2rem; margin: 0 0 .75rem; }
@media (min-width: 46rem) {
  .gallery figure { flex-flow: row-reverse; justify-content: flex-end; gap: .75rem;
    align-items: center; margin: 0 0 .25rem; }
  .gallery figcaption { flex: 0 0 6.5rem; text-align: right; } }
.tables { columns: 2 20rem; column-gap: 3rem; }
table { width: 100%; margin: 0 0 1.25rem; border-collapse: collapse; break-inside: avoid;
  font-size: .875rem; text-align: left; }
caption { padding: .25rem 0; font-weight: 600; text-align: left; }
tr { border-top: 1px solid var(--line); vertical-align: top; }
th { width: 45%; padding: .25rem 1rem .25rem 0; color: var(--soft); font-weight: 400; }
td { padding: .25rem 0; font: .8125rem/1.6 ui-monospace, Menlo, Consolas, monospace; }
"""


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
    pairs = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>\n" for k, v in summary.items())
    parts = (f"<section><h2>{_text(s.heading)}</h2>\n{s.body}</section>\n" for s in sections)
    figures = f"<dl>{''.join(pairs)}</dl>" if summary else ""
    page = PAGE.format(title=_text(title), style=STYLE, summary=figures, sections="".join(parts))
    write_atomically(path, page.encode())


def picture(
    data: bytes, alt: str, caption: str = "", *, link: str = "", zoom: int = 1, smooth: bool = False
) -> str:
    """Embed a PNG or a GIF, with what it shows in words (alt), enlarged `zoom` times.

    link: a file beside the report, named after the caption. Pixels stay crisp unless `smooth`
    (for curves). Raises InputError if the data are neither PNG nor GIF.
    """
    file = f' <a href="{_text(link)}">{_text(link)}</a>' if link else ""
    below = f"<figcaption>{_text(caption)}{file}</figcaption>" if caption or link else ""
    return f"<figure>{_image(data, alt, zoom, smooth)}{below}</figure>\n"


def gallery(rows: Mapping[str, ArrayLike], columns: int = 8, **options: Any) -> str:
    """Show groups of images, each (batch, height, width, channel), beside their names.

    options: as for `pictures.grid`. On a narrow screen the names stand above the images.
    """
    figures = (
        f"<figure>{_image(png_bytes(grid(images, columns=columns, **options)), name)}"
        f"<figcaption>{_text(name)}</figcaption></figure>\n"
        for name, images in rows.items()
    )
    return f'<div class="gallery">{"".join(figures)}</div>\n'


def table(values: Mapping[str, object]) -> str:
    """Tabulate names and values; a mapping among the values becomes a table of its own."""
    groups = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in values.items() if name not in groups}
    named = ({"": single} if single else {}) | groups
    return f'<div class="tables">{"".join(_group(*group) for group in named.items())}</div>\n'


def _group(name: str, values: Mapping[str, object]) -> str:
    rows = (
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>\n'
        for key, value in _flatten(values)
    )
    caption = f"<caption>{_text(name)}</caption>" if name else ""
    return f"<table>{caption}<tbody>{''.join(rows)}</tbody></table>\n"


def _flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _image(data: bytes, alt: str, zoom: int = 1, smooth: bool = False) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "GIF")) as image:
            kind, (width, height) = str(image.format).lower(), image.size
    except UnidentifiedImageError:
        raise InputError(f"data: {data[:8]!r}...; give the bytes of a PNG or a GIF") from None
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    look = "" if smooth else ' class="pixelated"'
    size = f'width="{width * zoom}" height="{height * zoom}"'
    return f'<img{look} alt="{_text(alt)}" {size} src="{source}">'


def _text(value: object) -> str:
    return escape(str(value))
