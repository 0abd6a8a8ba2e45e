"""Compare whole runs of the apps' sampler with the course's loops in PyTorch, with equal weights.

`python -m tests.test_peers_trajectories` prints the errors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks import import_state_dict
from diffusion_jax.runs import untrained
from diffusion_jax.runs.config import Config
from diffusion_jax.sampling import sample
from diffusion_jax.tableau.solve import INITIAL

torch = pytest.importorskip("torch")
reference_torch = pytest.importorskip("experiments.peers.context_unet")

pytestmark = pytest.mark.peers

N, T, SEED = 4, 500, 3
CONTEXT = np.float32([[1, 0, 0, 0, 0], [0, 0, 0.6, 0.4, 0], [1, 0, 0.6, 0, 0], [0, 0, 0, 0, 0]])


def pair() -> tuple[Model, Callable]:
    """Return our model, and the reference with equal weights as a function of NHWC images and t."""
    torch.manual_seed(0)
    reference = reference_torch.ContextUnet(shortcut="none").eval()
    model = untrained(Config(network="context_unet:shortcut=none"))
    state_dict = {name: value.numpy() for name, value in reference.state_dict().items()}
    variables = import_state_dict(state_dict, model.variables)

    @torch.no_grad()
    def eps(x: torch.Tensor, i: int) -> torch.Tensor:
        t = torch.full((1, 1), i / T)
        return reference(x.permute(0, 3, 1, 2), t, torch.from_numpy(CONTEXT)).permute(0, 2, 3, 1)

    return model._replace(variables=variables), eps


def noise(row: int | np.uint32) -> torch.Tensor:
    keys = samplers.sample_keys(jax.random.key(SEED), jnp.arange(N, dtype=jnp.uint32))
    return torch.from_numpy(np.array(samplers.row_noise(keys, jnp.uint32(row), (16, 16, 3))))


def course_tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b = (0.02 - 1e-4) * torch.linspace(0, 1, T + 1, dtype=torch.float64) + 1e-4
    ab = torch.cumsum((1 - b).log(), 0).exp()
    ab[0] = 1
    return b, 1 - b, ab


def torch_ddpm(eps: Callable) -> list[torch.Tensor]:
    b, a, ab = course_tables()
    x, states = noise(INITIAL), []
    for i in range(T, 0, -1):
        z = noise(T - i) if i > 1 else 0
        mean = (x - eps(x, i) * ((1 - a[i]) / (1 - ab[i]).sqrt()).float()) / a[i].sqrt().float()
        x = mean + b[i].sqrt().float() * z
        states.append(x)
    return states


def torch_ddim(eps: Callable, n: int) -> list[torch.Tensor]:
    _, _, ab = course_tables()
    x, states = noise(INITIAL), []
    for i in range(T, 0, -(T // n)):
        j, e = i - T // n, eps(x, i)
        x0 = (ab[j] / ab[i]).sqrt().float() * (x - (1 - ab[i]).sqrt().float() * e)
        x = x0 + (1 - ab[j]).sqrt().float() * e
        states.append(x)
    return states


def error(name: str, steps: int) -> float:
    """Return the largest relative error of the states after each step."""
    model, eps = pair()
    theirs = torch_ddpm(eps) if name == "ddpm" else torch_ddim(eps, steps)
    tableau = samplers.build(name, model.schedule, steps, "course")
    ours = sample(model, tableau, N, context=CONTEXT, seed=SEED, frames=range(steps)).frames
    states = [state.numpy() for state in theirs]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, states, strict=True))


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 500), ("ddim", 25), ("ddim", 20)])
def test_every_state_is_that_of_the_courses_loop(name: str, steps: int) -> None:
    assert error(name, steps) < 1e-4


if __name__ == "__main__":
    for case in (("ddpm", 500), ("ddim", 25), ("ddim", 20)):
        print(f"{case[0]}-{case[1]}: largest relative error of a state {error(*case):.1e}")
