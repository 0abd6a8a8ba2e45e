"""What a machine can do and what a program asks of it: peaks, FLOP, memory, collectives."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffusion_jax.parallel import data_parallel, replicate, scatter
from diffusion_jax.precisions import PRECISIONS, products_in
from diffusion_jax.timing import seconds_of

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
RUNS = 5  # of each peak; the fastest counts


class Peaks(NamedTuple):
    """FLOP/s of a large matrix product and of a large 3x3 convolution, over all devices."""

    matmul: float
    convolution: float


def peaks(devices: Sequence[jax.Device], dtype: str = "float32") -> Peaks:
    """The fastest of RUNS runs of each, on all devices at once, where FLOP is 2 a product.

    dtype: a name in precisions.PRECISIONS.
    """
    on_cpu = devices[0].platform == "cpu"
    n, batch, side, channels = (2048, 16, 32, 128) if on_cpu else (8192, 256, 64, 256)
    layout = ("NHWC", "HWIO", "NHWC")

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    square, kernel = (n, n), (3, 3, channels, channels)
    images = (batch, side, side, channels)
    flop = 2 * n**3, 2 * batch * side**2 * 9 * channels**2
    return Peaks(
        flop[0] * len(devices) / _fastest(jnp.matmul, square, square, devices, dtype),
        flop[1] * len(devices) / _fastest(convolve, images, kernel, devices, dtype),
    )


def _fastest(
    fn: Callable, one: tuple, two: tuple, devices: Sequence[jax.Device], dtype: str
) -> float:
    """The seconds of fn on arrays of these shapes, the second of which all devices share."""
    run = data_parallel(products_in(dtype)(fn), (0, None), 0, devices=devices)
    kind = PRECISIONS[dtype].dtype
    x, y = (np.full(shape, 0.5, kind) for shape in ((len(devices), *one), two))
    args = scatter(x, devices), replicate(y, devices)
    jax.block_until_ready(run(*args))
    return min(seconds_of(lambda: run(*args)) for _ in range(RUNS))


def flop(fn: Callable, *args: Any) -> float:
    """The FLOP of a function of these arguments on one device, by the compiler's cost analysis.

    Of the program as written for a TPU, before XLA rewrites it: the same number on every machine,
    where CPUs take Winograd's algorithm, in loops, of which one turn would count.
    """
    lowered = jax.jit(lambda *args: fn(*args)).trace(*args).lower(lowering_platforms=("tpu",))
    return float(lowered.cost_analysis()["flops"])


def memory(compiled: Any) -> int:
    """The bytes that a compiled program needs at its peak on one device, by its own analysis."""
    return _bytes(compiled.memory_analysis())


def _bytes(stats: Any) -> int:
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(held + stats.temp_size_in_bytes)


def available_memory(device: jax.Device) -> int | None:
    """The bytes that are free now: of the accelerator, or of the host; None where unknown."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free += [1024 * int(found[1])] if found else []
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        free.append(int(limit.read_text()) - int((group / "memory.current").read_text()))
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class Program(NamedTuple):
    """A compiled program: its bytes at its peak on one device, and its collectives."""

    name: str
    memory: int
    collectives: dict[str, int]


@contextmanager
def programs(device: jax.Device) -> Iterator[list[Program]]:
    """The programs that the body compiles for the device's backend and that live at its end."""
    before = device.client.live_executables()
    found: list[Program] = []
    yield found
    for executable in device.client.live_executables():
        if not any(executable is old for old in before):
            (module,) = executable.hlo_modules()
            stats = executable.get_compiled_memory_stats()
            found.append(Program(module.name, _bytes(stats), count_collectives(module.to_string())))


def count_collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind a program's text has; a loop's body counts once."""
    kinds = "|".join(COLLECTIVES)
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", text)))
