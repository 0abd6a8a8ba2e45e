"""The peers of the benchmark: the course's network in PyTorch, eager and compiled, and its loops.

One process, the same cores, the same weights. Compiled peers that cannot be are told by a note.
"""

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_jax.networks import export_state_dict
from diffusion_jax.runs import Model
from experiments.peers import loops
from experiments.peers.context_unet import ContextUnet
from experiments.peers.loops import Tables

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TRIALS = 5  # of each memory format; the fastest run counts


Kind = Callable[[torch.nn.Module], loops.Network]


class Peer(NamedTuple):
    """A network or a training step of one kind, ready to run, and its first run's seconds."""

    run: Callable[..., Any]
    seconds: float


class TorchPeers:
    """The peers of a model at one batch size."""

    def __init__(
        self, model: Model, batch: int, threads: int, cuda: bool, tf32: bool = False
    ) -> None:
        """Load the weights, choose the faster memory format, compile."""
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.device = "cuda" if cuda else "cpu"
        self.notes: list[str] = []
        network = model.network
        height, width, channels = network.image_shape
        names = ("n_feat", "n_cfeat", "shortcut", "norm")
        self.fields = {name: getattr(network, name) for name in names}
        self.fields |= {"in_channels": channels, "height": height}
        self.weights = {
            name: torch.from_numpy(value)
            for name, value in export_state_dict(model.variables).items()
        }
        schedule = model.schedule
        self.beta = schedule.beta
        self.tables = Tables.of(schedule.beta, schedule.alpha**2, self.device)
        shape = (batch, channels, height, width)
        self.x = torch.randn(shape, device=self.device)
        self.context = torch.zeros((batch, network.n_cfeat), device=self.device)
        self.format = self._faster_format()
        self.x = self.x.contiguous(memory_format=FORMATS[self.format])

    @cached_property
    def networks(self) -> dict[str, Peer]:
        """The network of each kind, in evaluation mode."""
        return self._ready(self._forward)

    def network(self) -> Any:
        """The network with the model's weights, in the chosen memory format."""
        network: Any = ContextUnet(**self.fields)
        network.load_state_dict(self.weights)
        return network.to(self.device, memory_format=FORMATS[self.format])

    def _faster_format(self) -> str:
        seconds = {}
        for name, layout in FORMATS.items():
            self.format = name
            x = self.x.contiguous(memory_format=layout)
            run = partial(self._pass, self.network().eval(), x)
            runs = [self._seconds(run) for _ in range(TRIALS)]
            seconds[name] = min(runs[1:])
        return min(seconds, key=lambda name: seconds[name])

    def _pass(self, forward: loops.Network, x: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            t = torch.full((1, 1), 0.5, device=self.device)
            return forward(self.x if x is None else x, t, self.context)

    def _kinds(self) -> dict[str, Kind]:
        kinds: dict[str, Kind] = {"torch eager": _eager}
        kinds["torch.compile"] = torch.compile
        if self.device == "cuda":
            kinds["torch.compile reduce-overhead"] = partial(torch.compile, mode="reduce-overhead")
        return kinds

    def _ready(self, make: Callable[[Kind], Peer]) -> dict[str, Peer]:
        """What make makes of each kind; a note where the compiler fails."""
        peers = {}
        for name, kind in self._kinds().items():
            try:
                peers[name] = make(kind)
            except Exception as error:  # whatever the compiler meets, the other kinds are timed
                if kind is _eager:
                    raise
                self.notes.append(f"{name} failed: {type(error).__name__}: {_line(error)}")
        return peers

    def _forward(self, kind: Kind) -> Peer:
        run = kind(self.network().eval())
        return Peer(run, self._seconds(lambda: self._pass(run)))

    def _training(self, kind: Kind) -> Peer:
        network = self.network().train()
        run = loops.training_steps(network, kind(network), self.tables, self._batches())
        return Peer(lambda count: self._wait(run(count)), self._seconds(lambda: run(1)))

    def _seconds(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        self._wait(run())
        return time.perf_counter() - begin

    def _wait(self, out: Any) -> Any:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return out

    def passes(self, count: int) -> dict[str, Callable[[], Any]]:
        """Bare forward passes, for each peer."""
        return {
            name: partial(self._passes, peer.run, count) for name, peer in self.networks.items()
        }

    def _passes(self, forward: loops.Network, count: int) -> Any:
        return self._wait([self._pass(forward) for _ in range(count)])

    def samplers(self, name: str, steps: int, rows: int | None = None) -> dict[str, Callable]:
        """Each peer's loop of ddpm or ddim, none for others; rows: only so many passes.

        The notes' ddpm takes all T steps, and their ddim such as divide T.
        """
        last = len(self.beta) - 1
        if (name, steps) != ("ddpm", last) and not (name == "ddim" and last % steps == 0):
            return {}
        loop = loops.ddpm if name == "ddpm" else partial(loops.ddim, steps=steps)
        found = {
            label: partial(loop, peer.run, self.tables) for label, peer in self.networks.items()
        }
        if find_spec("diffusers"):
            scheduler = loops.diffusers_scheduler(name, self.beta, steps)
            eager = self.networks["torch eager"].run
            found["diffusers"] = partial(loops.diffusers_loop, scheduler, eager)
        rows = steps if rows is None else rows
        return {label: partial(self._sample, loop, rows) for label, loop in found.items()}

    def _sample(self, loop: Callable[..., Tensor], rows: int) -> Tensor:
        return self._wait(loop(x=torch.randn_like(self.x), context=self.context, rows=rows))

    def training(self) -> dict[str, Peer]:
        """The notes' training step of each kind, to be called with how many of them."""
        return self._ready(self._training)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(0)
        batch = len(self.x)
        shape = (8, *self.x.shape)
        pixels = torch.from_numpy(rng.integers(0, 256, shape, np.uint8)).to(self.device)
        labels = torch.nn.functional.one_hot(
            torch.from_numpy(rng.integers(0, self.context.shape[1], (8, batch))),
            self.context.shape[1],
        ).to(self.device, torch.float32)
        while True:
            for x, context in zip(pixels, labels, strict=True):
                x = x.to(torch.float32) / 127.5 - 1
                yield x.contiguous(memory_format=FORMATS[self.format]), context


def _eager(network: torch.nn.Module) -> loops.Network:
    return network


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
