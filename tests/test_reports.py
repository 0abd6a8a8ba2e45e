"""A report is one well-formed, escaped file that contains every picture and fetches nothing."""

import base64
import io
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import pictures
from diffusion_jax.runs import checkpoints, overview, reports
from diffusion_jax.typing import InputError
from tests.models import TINY, untrained

IMAGES = np.random.default_rng(0).standard_normal((6, 16, 16, 3))
EVIL = '<script>alert("&")</script>'


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text. Unbalanced tags fail."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [data.strip()] if data.strip() else []

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(tmp_path):
    rows = {"hero": IMAGES[:3], EVIL: IMAGES[3:]}
    gif = pictures.gif_bytes(IMAGES[:, None], scale=2)
    curve = pictures.loss_curve(None, [1, 2, 3], [3.0, 2.0, 1.0])
    config = {"seed": 7, "name": EVIL, "model": {"n_feat": 64, "ema": {"decay": 0.999}, EVIL: EVIL}}
    reports.write_report(
        tmp_path / "run" / "report.html",
        title=EVIL,
        summary={"steps": "20,000", EVIL: EVIL},
        sections=[
            reports.Section("Samples", reports.gallery(rows)),
            reports.Section(EVIL, reports.picture(gif, EVIL, EVIL, link='a"b.html', zoom=3)),
            reports.Section("Loss", reports.picture(curve, "loss", smooth=True)),
            reports.Section("Configuration", reports.table(config)),
        ],
    )
    return tmp_path / "run" / "report.html"


def test_every_picture_is_inside_and_nothing_is_fetched(report):
    html = report.read_text()
    images = Page(html).all("img")
    assert len(images) == 4
    for image in images:
        kind, data = re.fullmatch(r"data:image/(png|gif);base64,(.*)", image["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as decoded:
            assert decoded.format.lower() == kind
    assert not re.search(r"https?:|@import|url\(", html)
    assert "default-src 'none'" in html
    assert {tag for tag, _ in Page(html).tags}.isdisjoint({"script", "link", "iframe"})


def test_rows_of_the_gallery_are_the_images_exactly(report):
    source = Page(report.read_text()).all("img")[0]["src"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(source))) as decoded:
        np.testing.assert_array_equal(decoded, pictures.grid(IMAGES[:3], columns=8))


def test_everything_from_outside_is_escaped(report):
    page = Page(report.read_text())
    assert not page.all("script")
    assert page.words.count(EVIL) >= 9  # title twice, summary twice, gallery, section, table
    assert [image["alt"] for image in page.all("img")] == ["hero", EVIL, EVIL, "loss"]
    assert [link["href"] for link in page.all("a")] == ['a"b.html']


def test_pixels_stay_crisp_and_curves_smooth(report):
    images = Page(report.read_text()).all("img")
    assert [image.get("class") for image in images] == ["pixelated"] * 3 + [None]
    side = 16 * 2 + 2 * 6  # one image at scale 2 and two margins of 6
    assert (images[2]["width"], images[2]["height"]) == (str(3 * side), str(3 * side))
    assert (images[3]["width"], images[3]["height"]) == ("1280", "600")


def test_the_configuration_is_grouped_and_complete(report):
    words = Page(report.read_text()).words
    start = words.index("Configuration")
    assert words[start + 1 :] == [
        *("seed", "7", "name", EVIL),
        *("model", "n_feat", "64", "ema.decay", "0.999", EVIL, EVIL),
    ]


def test_a_report_without_summary_or_sections_is_still_a_page(tmp_path):
    reports.write_report(tmp_path / "r.html", title="empty", summary={}, sections=[])
    page = Page((tmp_path / "r.html").read_text())
    assert page.words.count("empty") == 2
    assert not page.all("dl")


def test_a_picture_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"data: b'<svg></s'.*: give the bytes of a PNG or a GIF"):
        reports.picture(b"<svg></svg>", "no")


def test_a_report_shows_some_of_many_classes(model):
    many = model._replace(class_names=tuple(f"class{number}" for number in range(300)))
    shown, vectors = overview.class_contexts(many)
    assert (len(shown), vectors.shape) == (16, (16, 300))
    assert overview.summary([], many)["classes"] == "300, of which the first 16 are shown"
    assert "classes" not in overview.summary([], model)


@pytest.mark.parametrize(("data", "figures"), [("sprites:n=9", 2), ("npy:images=a.npy", 0)])
def test_a_run_on_sprites_stands_beside_the_model_of_the_project(
    tmp_path, monkeypatch, data, figures
):
    checkpoints.write_config(tmp_path / "mine", TINY.override(data=data).to_dict())
    checkpoints.save(tmp_path / "mine", 7, {"x": IMAGES})
    monkeypatch.setattr(overview, "load_model", lambda: untrained(seed=1))
    sections = list(overview.beside_sections(tmp_path / "mine", untrained(), jax.devices()[:1]))
    page = Page("".join(section.body for section in sections))
    assert len({image["src"] for image in page.all("img")}) == figures
    if figures:
        assert {"Run mine: 7 steps of 8 images", overview.LONGER} <= set(page.words)
        assert "The model of the project: 21,875 steps of 64 images" in page.words
