"""The peers of the benchmark: the course's network in PyTorch, eager and compiled, and its loops.

The peers run in this process, on the same cores, with the same weights.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks import export_state_dict
from experiments.peers import loops
from experiments.peers.context_unet import ContextUnet
from experiments.peers.loops import Network

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TRIALS = 5  # runs in each memory format; the fastest run counts, without the first


class TorchPeers:
    """The peers of a model at one batch size.

    first: the seconds of the first call of each program. notes: messages about the peers.
    """

    def __init__(
        self, model: Model, batch: int, threads: int, cuda: bool, tf32: bool = False
    ) -> None:
        """Load the weights and choose the faster memory format."""
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.device, self.first = "cuda" if cuda else "cpu", dict[str, float]()
        height, width, channels = model.network.image_shape
        names = ("n_feat", "n_cfeat", "shortcut", "norm")
        self.fields = {name: getattr(model.network, name) for name in names}
        self.fields |= {"in_channels": channels, "height": height}
        state = export_state_dict(model.variables).items()
        self.weights = {name: torch.from_numpy(value) for name, value in state}
        beta, alpha_bar = model.schedule.beta, model.schedule.alpha**2
        tables = (torch.from_numpy(np.float32(table)) for table in (beta, alpha_bar))
        self.beta, self.alpha_bar = (table.to(self.device) for table in tables)
        self.x = torch.randn((batch, channels, height, width), device=self.device)
        self.context = torch.zeros((batch, model.n_cfeat), device=self.device)
        self.format = min(FORMATS, key=self._seconds_in)
        self.x = self.x.contiguous(memory_format=FORMATS[self.format])
        self.notes = [f"torch: {self.device}, {threads} threads, {self.format}"]

    def network(self) -> Any:
        """Return the network with the model's weights, in the chosen memory format."""
        network: Any = ContextUnet(**self.fields)
        network.load_state_dict(self.weights)
        return network.to(self.device, memory_format=FORMATS[self.format])

    def _seconds_in(self, name: str) -> float:
        self.format, self.x = name, self.x.contiguous(memory_format=FORMATS[name])
        network = self.network().eval()
        return min([self._seconds(partial(self._pass, network)) for _ in range(TRIALS)][1:])

    def _seconds(self, run: Callable[[], Any]) -> float:
        begin = perf_counter()
        self._wait(run())
        return perf_counter() - begin

    def _wait(self, out: Any) -> Any:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return out

    @torch.no_grad()
    def _pass(self, network: Network) -> Tensor:
        return network(self.x, loops.time_of(1, 2, self.x), self.context)

    def _ready(self, what: str, make: Callable, first: Callable) -> dict[str, Any]:
        """Return make(compiler) for each compiler after a first call. Note compilers that fail."""
        kinds: dict[str, Callable] = {"torch eager": _eager, "torch.compile": torch.compile}
        if self.device == "cuda":
            kinds["torch.compile reduce-overhead"] = partial(torch.compile, mode="reduce-overhead")
        peers = {}
        for name, kind in kinds.items():
            try:
                run = make(kind)
                self.first[f"{name}: {what}"] = self._seconds(partial(first, run))
                self._wait([first(run) for _ in range(2)])  # CUDA graphs are recorded here
            except Exception as error:  # the compiler failed; the other kinds are timed
                if kind is _eager:
                    raise
                line = " ".join(str(error).split())[:200]
                self.notes.append(f"{name} failed: {type(error).__name__}: {line}")
            else:
                peers[name] = run
        return peers

    @cached_property
    def networks(self) -> dict[str, Network]:
        """Return the network of each kind, in evaluation mode."""
        return self._ready("network", lambda kind: kind(self.network().eval()), self._pass)

    def training(self) -> dict[str, Callable[[int], Any]]:
        """Return functions (count) that take this many of the course's training steps, by kind."""

        def make(kind: Callable) -> Callable:
            network = self.network().train()
            run = loops.training_steps(network, kind(network), self.alpha_bar, self._batches())
            return lambda count: self._wait(run(count))

        return self._ready("training", make, lambda run: run(1))

    def passes(self, count: int) -> dict[str, Callable[[], Any]]:
        """Return functions that run forward passes, one for each network."""

        def run(network: Network) -> Any:
            return self._wait([self._pass(network) for _ in range(count)])

        return {name: partial(run, network) for name, network in self.networks.items()}

    def samplers(self, name: str, steps: int) -> dict[str, Callable[[], Tensor]]:
        """Return each peer's loop of ddpm in all T steps, or of ddim in steps that divide T.

        Return no loop for other samplers, which the course does not have.
        """
        last = len(self.beta) - 1
        if (name, steps) != ("ddpm", last) and not (name == "ddim" and last % steps == 0):
            return {}
        own = (loops.ddpm, self.beta, self.alpha_bar)
        loop, *tables = own if name == "ddpm" else (loops.ddim, self.alpha_bar, steps)
        found = {label: partial(loop, net, *tables) for label, net in self.networks.items()}
        if find_spec("diffusers"):
            scheduler = loops.diffusers_scheduler(name, self.beta.cpu().numpy(), steps)
            eager = self.networks["torch eager"]
            found["diffusers"] = partial(loops.diffusers_loop, scheduler, eager)

        def run(loop: Callable[..., Tensor]) -> Tensor:
            return self._wait(loop(x=torch.randn_like(self.x), context=self.context))

        return {label: partial(run, loop) for label, loop in found.items()}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng, (batch, features) = np.random.default_rng(0), self.context.shape
        pixels = torch.from_numpy(rng.integers(0, 256, (8, *self.x.shape), np.uint8))
        classes = torch.from_numpy(rng.integers(0, features, (8, batch)))
        labels = torch.nn.functional.one_hot(classes, features).to(self.device, torch.float32)
        pixels = pixels.to(self.device)
        while True:
            for x, context in zip(pixels, labels, strict=True):
                x = x.to(torch.float32) / 127.5 - 1
                yield x.contiguous(memory_format=FORMATS[self.format]), context


def _eager(network: torch.nn.Module) -> Network:
    return network
