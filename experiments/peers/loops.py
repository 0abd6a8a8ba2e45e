"""The course's loops in PyTorch, as in its notebooks, and the loop of diffusers.

Schedules are float64 NumPy tables: beta and alpha_bar at steps 0 (clean) .. T.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t / T, context) -> noise
LEARNING_RATE, KEEP = 1e-3, 0.9


class Tables(NamedTuple):
    """The course's b_t, a_t and ab_t, on the device."""

    b: Tensor
    a: Tensor
    ab: Tensor

    @staticmethod
    def of(beta: np.ndarray, alpha_bar: np.ndarray, device: str) -> "Tables":
        """Return the tables of a schedule, in float32."""
        b, ab = (torch.from_numpy(np.float32(table)).to(device) for table in (beta, alpha_bar))
        return Tables(b, 1 - b, ab)


@torch.no_grad()
def ddpm(network: Network, tables: Tables, x: Tensor, context: Tensor, rows: int) -> Tensor:
    """Sample by DDPM. Take all T steps, or only the first rows of them."""
    steps = len(tables.b) - 1
    for i in range(steps, max(steps - rows, 0), -1):
        t = torch.tensor([i / steps])[:, None, None, None].to(x.device)
        z = torch.randn_like(x) if i > 1 else 0
        eps = network(x, t, context)
        noise = tables.b.sqrt()[i] * z
        mean = (x - eps * ((1 - tables.a[i]) / (1 - tables.ab[i]).sqrt())) / tables.a[i].sqrt()
        x = mean + noise
    return x


@torch.no_grad()
def ddim(
    network: Network, tables: Tables, x: Tensor, context: Tensor, steps: int, rows: int
) -> Tensor:
    """Sample by DDIM. Take a number of steps that divides T, or only the first rows of them."""
    last = len(tables.b) - 1
    stride = last // steps
    for i in list(range(last, 0, -stride))[:rows]:
        t = torch.tensor([i / last])[:, None, None, None].to(x.device)
        eps = network(x, t, context)
        ab, before = tables.ab[i], tables.ab[i - stride]
        x0 = before.sqrt() / ab.sqrt() * (x - (1 - ab).sqrt() * eps)
        x = x0 + (1 - before).sqrt() * eps
    return x


@torch.no_grad()
def diffusers_loop(
    scheduler: Any, network: Network, x: Tensor, context: Tensor, rows: int
) -> Tensor:
    """Sample by the loop that diffusers documents. The scheduler's steps must be set."""
    steps = scheduler.config.num_train_timesteps
    for t in scheduler.timesteps[:rows]:
        time = ((t + 1) / steps).reshape(1, 1).to(x.device)  # diffusers counts from 0
        x = scheduler.step(network(x, time, context), t, x).prev_sample
    return x


def diffusers_scheduler(name: str, beta: np.ndarray, steps: int) -> Any:
    """Return diffusers' DDPM or DDIM with the same schedule and grid."""
    import diffusers

    make: Any = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[name]
    own: dict[str, Any] = {"num_train_timesteps": len(beta) - 1, "trained_betas": beta[1:]}
    own |= {"variance_type": "fixed_large"} if name == "ddpm" else {"set_alpha_to_one": True}
    scheduler = make(clip_sample=False, timestep_spacing="trailing", **own)
    scheduler.set_timesteps(steps)
    return scheduler


def training_steps(
    network: nn.Module, forward: Network, tables: Tables, batches: Iterator[tuple[Tensor, Tensor]]
) -> Callable[[int], Tensor]:
    """Return a function (n) that takes n of the course's training steps.

    forward: the network, which may be compiled. batches: endless (images, context), images in
    [-1, 1]. Unlike the course's, the noising is correct.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    steps = len(tables.b) - 1

    def step() -> Tensor:
        x, context = next(batches)
        optimizer.zero_grad()
        context = context * torch.bernoulli(torch.full((len(x), 1), KEEP)).to(x.device)
        noise = torch.randn_like(x)
        t = torch.randint(1, steps + 1, (len(x),)).to(x.device)
        ab = tables.ab[t, None, None, None]
        predicted = forward(ab.sqrt() * x + (1 - ab).sqrt() * noise, t / steps, context)
        loss = nn.functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda count: [step() for _ in range(count)][-1]
