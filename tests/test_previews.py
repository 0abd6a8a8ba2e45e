"""preview.png: redrawn from the same noise, rarely enough, without compiling again."""

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import pictures, samplers
from diffusion_jax.runs import previews
from diffusion_jax.runs.previews import Preview
from diffusion_jax.sampling import sample
from tests.models import TINY, untrained


@pytest.fixture
def preview(tmp_path) -> Preview:
    return Preview(tmp_path, untrained(TINY)._replace(variables={}), jax.devices()[:2])


def test_a_preview_shows_samples_of_each_class_and_compiles_once(preview) -> None:
    events: list[str] = []
    monitor = jax.monitoring.register_event_duration_secs_listener
    monitor(lambda name, *_, **__: events.append(name))
    first, second = (untrained(TINY, seed=seed) for seed in (0, 1))
    preview.refresh(first.variables)
    context = np.repeat(np.eye(3, dtype=np.float32), 8, axis=0)
    images = sample(
        first, samplers.build("sa_solver:10", first.schedule), 24, context=context
    ).images
    expected = pictures.grid(images, columns=8, labels=["a", "b", "c"])
    with Image.open(preview.path) as picture:
        np.testing.assert_allclose(np.asarray(picture).astype(int), expected, atol=1)
    events.clear()
    shown = preview.path.read_bytes()
    preview.refresh(second.variables, now=True)
    assert preview.path.read_bytes() != shown
    preview.refresh(first.variables, now=True)
    assert preview.path.read_bytes() == shown
    assert not [name for name in events if "compile" in name]


def test_previews_take_a_small_part_of_the_time(preview, monkeypatch) -> None:
    """Let each of the pictures take 30 s at first, then 1 s, in a run of an hour."""
    clock, drawn = [0.0], []

    def draw(variables) -> np.ndarray:
        clock[0] += 1.0 if drawn else 30.0
        drawn.append(clock[0])
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(preview, "draw", draw)
    monkeypatch.setattr(previews.time, "perf_counter", lambda: clock[0])
    while clock[0] < 3600:
        preview.refresh({})
        clock[0] += 1.0
    assert drawn[:2] == [30.0, 32.0]  # the second one takes the first step of training in
    assert len(drawn) == pytest.approx(3600 / 51, abs=2)
    preview.refresh({}, now=True)
    assert drawn[-1] == clock[0]


def test_weights_that_give_no_numbers_are_shown_too(preview) -> None:
    broken = jax.tree.map(lambda leaf: leaf * np.nan, untrained(TINY).variables)
    assert preview.draw(broken).dtype == np.uint8
