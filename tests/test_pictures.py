"""Pictures are exact to the pixel, animations keep every frame, and files are whole or absent."""

import base64
import errno
import io
import os
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import pictures
from diffusion_jax.typing import InputError

GROUND = (238, 238, 234)
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((3, 4, 5, 6, 3)).astype(np.float32)  # (frame, batch, h, w, channel)


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def gif_frames(data: bytes) -> tuple[list[np.ndarray], list[int], dict]:
    with Image.open(io.BytesIO(data)) as gif:
        frames, durations = [], []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")))
            durations.append(gif.info["duration"])
        return frames, durations, gif.info


def html_frames(html: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=\\\n]+)\"", html)
    return [decode(base64.b64decode(data.replace("\\\n", ""))) for data in found]


@pytest.mark.parametrize(
    ("values", "scaling", "expected"),
    [
        ([[-9, -1, -0.5, 0, 0.5, 1, 9]], "clip", [[0, 0, 64, 128, 191, 255, 255]]),  # 63.75, 191.25
        (
            [[0, 1, 4], [-20, 0, 20], [7, 7, 7]],  # each image by itself
            "per_image",
            [[0, 64, 255], [0, 128, 255], [128] * 3],
        ),
    ],
)
def test_values_become_grey_levels(values, scaling, expected):
    images = np.array(values, np.float64)[:, None, :, None]
    got = pictures.to_uint8(images, scaling)
    np.testing.assert_array_equal(got, np.repeat(np.array(expected)[:, None, :, None], 3, -1))


def test_per_image_scales_the_channels_together():
    image = np.array([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(pictures.to_uint8(image, "per_image"), [[[[0, 128, 255]]]])


def test_uint8_comes_back_unchanged_also_through_floats():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    for same in (pixels, pixels / 127.5 - 1, np.float32(pixels) / np.float32(255) * 2 - 1):
        np.testing.assert_array_equal(pictures.to_uint8(same)[..., 2], pixels[..., 0])


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_every_pixel_of_a_sheet_is_a_block_or_ground(scale):
    images = NOISE[0]
    sheet = pictures.grid(images, columns=3, scale=scale)
    expected = pictures.to_uint8(images)
    gap = max(1, scale // 2)
    edge = 2 * gap + 4
    rest = np.ones(sheet.shape[:2], bool)
    for index, image in enumerate(expected):
        top = edge + index // 3 * (5 * scale + gap)
        left = edge + index % 3 * (6 * scale + gap)
        area = np.s_[top : top + 5 * scale, left : left + 6 * scale]
        np.testing.assert_array_equal(sheet[area], np.kron(image, np.ones((scale, scale, 1))))
        rest[area] = False
    assert (sheet[rest] == GROUND).all()
    assert sheet.shape == (2 * edge + 10 * scale + gap, 2 * edge + 18 * scale + 2 * gap, 3)


def test_sprites_are_six_times_as_large_by_default():
    assert pictures.grid(np.zeros((1, 16, 16, 1))).shape == (96 + 20, 96 + 20, 3)
    assert pictures.grid(np.zeros((1, 256, 256, 1))).shape == (256 + 12, 256 + 12, 3)


@pytest.mark.parametrize(
    ("count", "labels", "columns", "rows"),
    [(3, 0, 3, 1), (32, 0, 8, 4), (33, 0, 8, 5), (100, 0, 10, 10), (10, 5, 2, 5), (9, 2, 5, 2)],
)
def test_columns_are_chosen_for_the_images_and_labels(count, labels, columns, rows):
    images = np.zeros((count, 4, 4, 3))
    chosen = pictures.grid(images, labels=["a"] * labels or None)
    given = pictures.grid(images, labels=["a"] * labels or None, columns=columns)
    np.testing.assert_array_equal(chosen, given)
    assert (chosen.shape[0] - 28) == rows * (4 * 24 + 12) + 16  # two margins of 28, minus a gap


def test_labels_and_titles_are_drawn_beside_the_images_and_never_cut():
    plain = pictures.grid(NOISE[0], columns=2, scale=4)
    long = "a class with quite a long name, and then some more of it"
    sheet = pictures.grid(NOISE[0], columns=2, scale=4, labels=[long, "b"], title=2 * long)
    height, width = plain.shape[0] - 16, plain.shape[1] - 16
    body = plain[8:-8, 8:-8]
    left = next(
        x
        for x in range(sheet.shape[1] - width)
        if (sheet[-8 - height : -8, x : x + width] == body).all()
    )
    ink = (sheet != GROUND).any(-1)
    ink[-8 - height : -8, left : left + width] = False
    assert ink[:, :left].any()
    assert ink[: -8 - height, left:].any()
    edges = (ink[:4], ink[-4:], ink[:, :4], ink[:, -4:])
    assert not any(edge.any() for edge in edges)


def test_png_is_exact(tmp_path):
    picture = pictures.grid(NOISE[0])
    pictures.save_png(tmp_path / "new" / "folder" / "a.png", picture)
    np.testing.assert_array_equal(
        decode((tmp_path / "new" / "folder" / "a.png").read_bytes()), picture
    )


@pytest.mark.parametrize("fps", [5, 12.5])
def test_gif_of_few_colours_is_exact_in_every_frame(tmp_path, fps):
    palette = RNG.integers(0, 256, (240, 3), np.uint8)
    frames = palette[RNG.integers(0, 240, (6, 4, 8, 8))]
    pictures.save_gif(tmp_path / "a.gif", frames, fps=fps, columns=2, scale=3)
    got, durations, info = gif_frames((tmp_path / "a.gif").read_bytes())
    assert durations == [1000 / fps] * 5 + [2000]
    assert info["loop"] == 0
    for shown, frame in zip(got, frames, strict=True):
        np.testing.assert_array_equal(shown, pictures.grid(frame, columns=2, scale=3))


def test_gif_of_many_colours_is_near_without_dithering_and_nearest_in_the_last_frame():
    frames = np.linspace(-1, 1, 4 * 8 * 16 * 16 * 3).reshape(4, 8, 16, 16, 3)
    frames[-1] = RNG.choice([-0.9, -0.2, 0.4, 0.95], frames[-1].shape)
    got, _, _ = gif_frames(pictures.gif_bytes(frames, scale=2))
    sheets = [pictures.grid(frame, scale=2).astype(int) for frame in frames]
    errors = [np.abs(shown - sheet) for shown, sheet in zip(got, sheets, strict=True)]
    assert max(error.max() for error in errors) <= 8
    assert errors[-1].mean() < 0.5
    flat, _, _ = gif_frames(pictures.gif_bytes(np.concatenate([frames[:-1], 0 * frames[:1]])))
    assert len(np.unique(flat[-1].reshape(-1, 3), axis=0)) == 2  # the image and the background


def test_gif_draws_the_same_labels_as_the_sheet():
    got, _, _ = gif_frames(pictures.gif_bytes(NOISE[:1] * 0, labels=["hero", "food"], title="T"))
    sheet = pictures.grid(NOISE[0] * 0, labels=["hero", "food"], title="T")
    assert np.abs(got[0] - sheet.astype(int)).max() <= 13  # text in 16 levels instead of 256


def test_html_holds_every_frame_exactly_and_fetches_nothing(tmp_path):
    settings = {"animation.embed_limit": 0.001, "savefig.dpi": 300, "savefig.bbox": "tight"}
    with matplotlib.rc_context(settings):
        pictures.save_html(tmp_path / "a.html", NOISE, columns=4, labels=["noise"])
    page = (tmp_path / "a.html").read_text()
    for shown, frame in zip(html_frames(page), NOISE, strict=True):
        np.testing.assert_array_equal(shown, pictures.grid(frame, columns=4, labels=["noise"]))
    assert "http" not in page
    assert not re.search(r"<link|@import|src=\"(?!data:)", page)


def test_html_of_a_course_sized_animation_is_small():
    frames = RNG.standard_normal((32, 32, 16, 16, 3))
    html = pictures.animation_html(frames, scale=2)
    assert html.count("data:image/png;base64,") == 32
    assert len(html) < 2e6


BLUE = np.array([47, 109, 181])


@pytest.mark.parametrize("size", [1, 12, 2000])
def test_loss_curve_is_drawn_and_saved(tmp_path, size):
    losses = np.exp(-np.arange(size) / 100) + 0.01
    losses[size // 2 + 1 :: 7] = np.nan
    data = pictures.loss_curve(tmp_path / "loss.png", np.arange(size), losses)
    assert (tmp_path / "loss.png").read_bytes() == data
    picture = decode(data)
    assert picture.shape == (600, 1280, 3)
    assert (np.abs(picture - BLUE) < 3).all(-1).any()


def test_loss_curve_follows_the_losses():
    data = pictures.loss_curve(None, np.arange(100), np.linspace(2, 1, 100))
    rows, columns = np.nonzero((np.abs(decode(data) - BLUE) < 3).all(-1))
    assert np.corrcoef(rows, columns)[0, 1] > 0.95  # rows count downwards


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(InputError):
        pictures.save_png(path, np.full((2, 2, 3), np.nan))

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.save_png(path, np.zeros((2, 2, 3)))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]


ONE = np.zeros((1, 2, 2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures.to_uint8(np.zeros((4, 4))), r"images: shape \(4, 4\)"),
        (lambda: pictures.to_uint8(np.zeros((4, 4, 2))), r"images: shape \(4, 4, 2\).* 1 .* 3 "),
        (
            lambda: pictures.to_uint8(ONE, "sqrt"),
            r"scaling='sqrt' is unknown: choose from clip, per_image",
        ),
        (lambda: pictures.to_uint8(ONE.astype(int)), "images: dtype int64"),
        (
            lambda: pictures.to_uint8(ONE + np.array([0, np.nan, np.inf])),
            "images: 8 of 12 values are NaN",
        ),
        (lambda: pictures.grid(ONE[0]), r"images: shape \(2, 2, 3\): give \(batch, height"),
        (lambda: pictures.grid(ONE[:0]), r"images: shape \(0, 2, 2, 3\) holds no"),
        (lambda: pictures.grid(ONE, columns=0), "columns=0: it must be at least 1"),
        (lambda: pictures.grid(ONE, scale=0), "scale=0: it must be"),
        (lambda: pictures.grid(ONE, labels=["a", "b"]), "labels: 2 for 1 rows of 1"),
        (lambda: pictures.grid(ONE, labels=[]), "labels: 0 for 1 rows"),
        (lambda: pictures.png_bytes(ONE), r"pixels: shape \(1, 2, 2, 3\)"),
        (lambda: pictures.gif_bytes(ONE), r"frames: shape .*: give \(frame, batch"),
        (lambda: pictures.gif_bytes(ONE[None], fps=0), "fps=0: it must be"),
        (lambda: pictures.gif_bytes(ONE[None], fps=float("nan")), "fps=nan: it must"),
        (lambda: pictures.animation_html(ONE[None], fps=-1), "fps=-1: it must"),
        (lambda: pictures.animation_html(ONE[None, :0]), "frames: shape .* holds no pixel"),
        (lambda: pictures.loss_curve(None, [1, 2], [1.0]), r"losses: shape \(1,\) for steps of"),
        (lambda: pictures.loss_curve(None, [1], [np.nan]), "losses: none of 1 values is finite"),
    ],
)
def test_errors_name_the_argument_and_what_is_right(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
