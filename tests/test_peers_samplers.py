"""Compare whole sampling runs with diffusers, for the cases in compare_samplers.py."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
compare_samplers = pytest.importorskip("tests.compare_samplers")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers will drop DPM-Solver in eps
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # their code uses old NumPy
]
CASES = compare_samplers.CASES


@pytest.mark.parametrize("label", CASES)
def test_whole_runs_agree(label: str) -> None:
    case = CASES[label]
    for prediction in case.predictions:
        error = compare_samplers.relative_error(case, prediction)
        if not case.why:
            assert error < 1e-5
        else:
            assert not error < 1e-5, "no difference is left: delete the reason"


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if case.as_theirs])
def test_the_reason_given_for_a_difference_is_all_of_it(label: str) -> None:
    """Expect our tableau with their fault to agree with theirs."""
    case = CASES[label]
    for prediction in case.predictions:
        assert (
            compare_samplers.relative_error(case._replace(ours=case.as_theirs), prediction) < 1e-5
        )


def test_the_network_is_the_same_in_both() -> None:
    x = np.random.default_rng(0).standard_normal(compare_samplers.SHAPE).astype(np.float32)
    ours = compare_samplers.network(compare_samplers.jnp.asarray(x), 0.3, compare_samplers.jnp)
    theirs = compare_samplers.network(compare_samplers.torch.tensor(x), 0.3, compare_samplers.torch)
    assert np.allclose(ours, theirs.numpy(), atol=1e-6)
