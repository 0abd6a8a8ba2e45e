"""The course's loops in PyTorch, as in its notebooks, and the loop of diffusers.

A network is a function (x, t / T, context) -> noise. Schedules are tables of the steps 0 (clean)
to T: beta (b_t of the course) and alpha_bar (ab_t), on the device.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
LEARNING_RATE, KEEP = 1e-3, 0.9


def time_of(i: int, steps: int, x: Tensor) -> Tensor:
    """Return the time of a step for the network, on the device of x."""
    return torch.full((1, 1), i / steps, device=x.device)


@torch.no_grad()
def ddpm(network: Network, beta: Tensor, alpha_bar: Tensor, x: Tensor, context: Tensor) -> Tensor:
    """Sample by DDPM, in all T steps."""
    steps, a = len(beta) - 1, 1 - beta
    for i in range(steps, 0, -1):
        z = torch.randn_like(x) if i > 1 else 0
        eps = network(x, time_of(i, steps, x), context)
        mean = (x - eps * ((1 - a[i]) / (1 - alpha_bar[i]).sqrt())) / a[i].sqrt()
        x = mean + beta.sqrt()[i] * z
    return x


@torch.no_grad()
def ddim(network: Network, alpha_bar: Tensor, steps: int, x: Tensor, context: Tensor) -> Tensor:
    """Sample by DDIM, in a number of steps that divides T."""
    last = len(alpha_bar) - 1
    stride = last // steps
    for i in range(last, 0, -stride):
        eps = network(x, time_of(i, last, x), context)
        ab, before = alpha_bar[i], alpha_bar[i - stride]
        x0 = before.sqrt() / ab.sqrt() * (x - (1 - ab).sqrt() * eps)
        x = x0 + (1 - before).sqrt() * eps
    return x


@torch.no_grad()
def diffusers_loop(scheduler: Any, network: Network, x: Tensor, context: Tensor) -> Tensor:
    """Sample by the loop that diffusers documents. The scheduler's steps must be set."""
    for t in scheduler.timesteps:
        time = time_of(int(t) + 1, scheduler.config.num_train_timesteps, x)  # they count from 0
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
    network: nn.Module,
    forward: Network,
    alpha_bar: Tensor,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> Callable[[int], Tensor]:
    """Return a function (n) that takes n of the course's training steps.

    forward: the network, which may be compiled. batches: endless (images, context), images in
    [-1, 1]. Unlike the course's, the noising is correct.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    steps = len(alpha_bar) - 1

    def step() -> Tensor:
        x, context = next(batches)
        optimizer.zero_grad()
        context = context * torch.bernoulli(torch.full((len(x), 1), KEEP)).to(x.device)
        noise = torch.randn_like(x)
        t = torch.randint(1, steps + 1, (len(x),)).to(x.device)
        ab = alpha_bar[t, None, None, None]
        predicted = forward(ab.sqrt() * x + (1 - ab).sqrt() * noise, t / steps, context)
        loss = nn.functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda count: [step() for _ in range(count)][-1]
