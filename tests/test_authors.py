"""Compare whole runs with those of the authors' own code, in float64 and with the same noise.

tests/fixtures/authors.json has, for each case, our sampler, the call of theirs with its repository
and commit, and the five numbers in which their run ends. Both denoise tests.interpreter.mixture,
which CFG++ guides towards tanh(x).
They start from sigma * linspace(-2, 2, 5), and row r of ours gets row r of NOISE. Where a row of
ours has no counterpart in theirs, theirs got what belongs to the same step.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.samplers import adams, coefficients
from diffusion_jax.tableau import for_cfg_pp
from tests.interpreter import interpret, mixture

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "authors.json").read_text())
CASES = FIXTURE["cases"]
NOISE = np.random.RandomState(7).standard_normal((200, 5))
WHY = {
    "halved": "They give the second divided difference, which is half of the second derivative, "
    "the weight of the whole derivative.",
    "sums": "They approximate integrals by sums of 100 terms.",
    "stage": "The difference in their third stage has a weight that does not vanish in short steps "
    "(phi_23 of the data prediction is -1 at h = 0).",
    "parenthesis": "They have (1 - a b) / 2 where the second difference has (1 - a) b / 2.",
    "sum": "They have that fault, add a term to the weight of the third difference where the exact "
    "weight subtracts it, and have h_1 / h_2 in it where the exact weight has h_2 / h_3.",
    "gamma": "Their gamma has c3^3 where the order condition has c3^2. Both are the same for c3=1.",
    "abscissae": "Their Runge-Kutta-Gegenbauer stages are at the places of Runge-Kutta-Legendre.",
}


def label(case: dict) -> str:
    return case["ours"] + " with CFG++" * ("cfg_pp" in case)


PUT_IN = ("halved", "sums", "parenthesis", "abscissae")  # what as_theirs puts into ours


def relative_error(case: dict) -> float:
    """Return |ours - theirs| / |theirs| at the end of a run."""
    levels = FIXTURE["levels"][case["levels"]]
    name = levels["schedule"]
    schedule = continuous() if name == "continuous" else schedules.build(name)
    if "ratio" in levels:
        grid = grids.at_ratio(schedule, np.array(levels["ratio"]))
    else:
        grid = grids.at(schedule, np.array(levels["t"]), end=levels["t"][-1])
    tableau = samplers.build(case["ours"], schedule, grid.steps, grid)
    start = grid.sigma[0] * np.linspace(-2, 2, 5)
    denoise = mixture
    if scale := case.get("cfg_pp"):
        tableau, denoise = for_cfg_pp(tableau), partial(guided, scale)
    ours = interpret(tableau, denoise, start, NOISE[: tableau.rows])
    return float(np.linalg.norm(ours - case["end"]) / np.linalg.norm(case["end"]))


def continuous() -> schedules.NoiseSchedule:
    """Return the VP SDE (Song et al. 2021) with beta from 0.1 to 20, in a fine table."""
    t = np.linspace(0, 1, 100_001)
    log_alpha = -0.05 * t - 19.9 / 4 * t**2
    return schedules.from_levels(np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)))


def guided(scale: float, x: np.ndarray, *level: float) -> tuple[np.ndarray, np.ndarray]:
    x0, eps = mixture(x, *level)
    return x0 + scale * (np.tanh(x) - x0), eps


@contextmanager
def as_theirs(why: str) -> Iterator[None]:
    """Put what theirs does differently into ours."""
    extended = sys.modules["diffusion_jax.samplers.extended"]
    moments = coefficients.exponential_moments

    def sums(f, low: float, high: float) -> np.ndarray:
        return f(low + np.arange(100) / 100 * (high - low)).sum(-1) * (high - low) / 100

    def halved(kappa: float, count: int) -> np.ndarray:
        return moments(kappa, count) / np.array([1.0, 2.0])[:count]

    def misplaced(nodes: np.ndarray, moments: np.ndarray) -> np.ndarray:
        fault = (nodes[0] * nodes[-1] + nodes[0] - 1) / 2
        return coefficients.difference_weights(nodes, moments + [0, fault][: len(nodes)])

    def legendre(stages: int) -> np.ndarray:
        j = np.arange(1.0, stages)
        places = np.append([0.0, 4 / 3], (j[1:] - 1) * (j[1:] + 2))
        return places / ((stages - 1) * (stages + 2))

    with pytest.MonkeyPatch.context() as patch:
        if why == "abscissae":
            patch.setattr(sys.modules["diffusion_jax.samplers.stork"], "abscissae", legendre)
        if why == "halved":
            patch.setattr(coefficients, "exponential_moments", halved)
        if why == "sums":
            patch.setattr(extended, "integrate", sums)
        if why == "parenthesis":
            patch.setattr(adams, "difference_weights", misplaced)
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{label(case)}-{case['levels']}")
def test_whole_runs_end_where_the_authors_do(case: dict) -> None:
    if not case["why"]:
        assert relative_error(case) < 1e-9
        return
    assert relative_error(case) > 1e-4
    if case["why"] in PUT_IN:
        with as_theirs(case["why"]):
            assert relative_error(case) < 1e-9


def lines() -> list[str]:
    """Return the table of docs/samplers.md."""
    rows = ["| ours | theirs | relative error | remark |", "|---|---|---|---|"]
    for case in CASES:
        remark, numbers = "", {why: i for i, why in enumerate(WHY, 1)}
        if case["why"]:
            remark = f"differs [{numbers[case['why']]}]"
            with as_theirs(case["why"]):
                error = relative_error(case)
            remark += f"; with their fault in ours: {error:.0e}" if case["why"] in PUT_IN else ""
        rows.append(
            f"| `{case['ours']}` | {case['theirs']} | {relative_error(case):.0e} | {remark} |"
        )
    return [*rows, "", *(f"{i}. {why}" for i, why in enumerate(WHY.values(), 1))]
