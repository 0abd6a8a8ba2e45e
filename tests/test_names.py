"""The page docs/names.md: its texts build, and it names every sampler and grid."""

import re
from pathlib import Path

import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules

PAGE = (Path(__file__).parent.parent / "docs" / "names.md").read_text()
HERE = [row.split("|")[2] for row in PAGE.splitlines() if row.startswith("| ")]
QUOTED = dict.fromkeys(text for cell in HERE for text in re.findall(r"`([^`]+)`", cell))
TEXTS = [text for text in QUOTED if re.match(rf"({'|'.join(samplers.SAMPLERS)})(:|$)", text)]
GRIDS = [text for text in QUOTED if text.startswith("grid=")]
SCHEDULE = schedules.scaled_linear(1000)
NOT_THEIRS = {"etdrk", "runge_kutta", "stork", "quadratic"}  # no other library has a name for them


@pytest.mark.parametrize("text", TEXTS + GRIDS)
@pytest.mark.filterwarnings("ignore::diffusion_jax.typing.RunWarning")  # unstable samplers warn
def test_every_text_builds(text: str) -> None:
    text = f"ddim:{text}" if text in GRIDS else text
    assert samplers.build(samplers.parse(text, SCHEDULE), SCHEDULE).rows


def test_everything_else_in_quotes_is_a_flag_or_a_name() -> None:
    rest = QUOTED.keys() - {*TEXTS, *GRIDS} - schedules.SCHEDULES.keys() - grids.GRIDS.keys()
    rest = {text for text in rest if not text.startswith(("--", "python -m", "samplers.ddim_"))}
    assert rest == {"interpolate", "to_zero"}


def test_every_sampler_and_grid_is_on_the_page() -> None:
    named = {re.split(r"[:=]", text.removeprefix("grid="))[0] for text in QUOTED}
    assert {*samplers.SAMPLERS, *grids.GRIDS} - named == NOT_THEIRS
