"""The benchmark's peers in PyTorch do the same work as this library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.sampling import sample
from diffusion_jax.tableau.solve import INITIAL
from tests.models import SMALL, untrained

torch = pytest.importorskip("torch")
loops = pytest.importorskip("experiments.peers.loops")
torch_peers = pytest.importorskip("experiments.peers.torch_peers")

pytestmark = pytest.mark.peers
N, T, SEED = 3, 20, 4


@pytest.fixture(scope="module")
def model() -> Model:
    return untrained(SMALL, schedule=f"course:steps={T}")


@pytest.fixture(scope="module")
def peers(model):
    return torch_peers.TorchPeers(model, N, threads=1, cuda=False)


def noise(row: int | np.uint32) -> "torch.Tensor":
    keys = samplers.sample_keys(jax.random.key(SEED), jnp.arange(N, dtype=jnp.uint32))
    drawn = samplers.row_noise(keys, jnp.uint32(row), (8, 8, 3))
    return torch.from_numpy(np.array(drawn)).permute(0, 3, 1, 2)


def ours(model: Model, name: str, steps: int) -> np.ndarray:
    return sample(model, samplers.build(name, model.schedule, steps), N, seed=SEED).images


def distance(theirs: "torch.Tensor", images: np.ndarray) -> float:
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    return float(np.linalg.norm(theirs - images) / np.linalg.norm(images))


def test_ddim(model, peers) -> None:
    """Expect our images from our noise in the course's loop and in diffusers'."""
    network = peers.network().eval()
    start = {"x": noise(INITIAL), "context": peers.context}
    images = ours(model, "ddim", 5)
    assert distance(loops.ddim(network, peers.alpha_bar, 5, **start), images) < 1e-4
    pytest.importorskip("diffusers")
    scheduler = loops.diffusers_scheduler("ddim", peers.beta.numpy(), 5)
    assert distance(loops.diffusers_loop(scheduler, network, **start), images) < 1e-4


def test_ddpm(model, peers, monkeypatch) -> None:
    rows = iter(range(T))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(next(rows)))
    network, tables = peers.network().eval(), (peers.beta, peers.alpha_bar)
    drawn = loops.ddpm(network, *tables, x=noise(INITIAL), context=peers.context)
    assert distance(drawn, ours(model, "ddpm", T)) < 1e-4


def test_only_what_the_course_can_is_compared(peers, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert {"torch eager", "torch.compile"} <= peers.samplers("ddpm", T).keys()
    assert {"torch eager", "torch.compile"} <= peers.samplers("ddim", 5).keys()
    for name, steps in (("ddpm", 5), ("ddim", 3), ("unipc", 5)):
        assert not peers.samplers(name, steps)


def test_a_compiler_that_fails_is_a_note(model, monkeypatch) -> None:
    def fail(network: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    peers = torch_peers.TorchPeers(model, N, threads=1, cuda=False)
    assert list(peers.networks) == ["torch eager"]
    assert peers.notes[1:] == ["torch.compile failed: RuntimeError: no C++ compiler"]


def test_training_steps_learn(model, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    torch.manual_seed(0)
    peers = torch_peers.TorchPeers(model, 4, threads=1, cuda=False)
    run = peers.training()["torch eager"]
    first = np.mean([float(run(1)) for _ in range(5)])
    run(100)
    assert np.mean([float(run(1)) for _ in range(20)]) < 0.9 * first
