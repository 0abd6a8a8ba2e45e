"""Choose devices, and run a function that is written for one device on all of them.

The devices may belong to several processes, on several hosts, each of which runs the same program.
"""

import ctypes
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.typing import InputError, require

AXIS = "data"  # the mapped axis: each device holds a part of the batch
CORES = 1024  # the most CPU devices
START = 300  # the seconds that a process waits for the others at the start
PATIENCE = 20  # a process that has not responded for this many seconds counts as lost
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's mallopt
MALLOPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 4096, M_ARENA_MAX: 1}
MESSAGE = 2000  # the most bytes of an error that processes send each other


def use_cpu_cores(count: int | None = None) -> None:
    """Make count CPU cores separate devices; by default all that this process may use.

    Call it before JAX starts. It has no effect where JAX finds accelerators. Cores are separate
    devices because XLA runs a small convolution on one core only. Raise InputError unless count is
    in 1..CORES.

    glibc is also told to keep memory that XLA frees after a dispatch. Otherwise the memory returns
    to the system, and getting it back page by page takes a third of a training step. All threads
    share one arena, because only the main arena keeps blocks of this size.
    """
    fits = count is None or 1 <= count <= CORES
    require(fits, f"cpu_devices={count}: it must be at least 1, at most {CORES}")
    jax.config.update("jax_num_cpu_devices", count or len(os.sched_getaffinity(0)))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def make_deterministic() -> None:
    """Make XLA use only kernels that give the same bits each time. Call it before JAX starts.

    On GPUs these kernels are slower than the default ones. CPUs and TPUs have no others.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def start_processes(text: str) -> None:
    """Join a job of several processes. Call it before JAX starts, in each of them.

    text: "HOST:PORT,COUNT,NUMBER", where HOST:PORT is that of process 0 and NUMBER this process's;
    or "auto", to find them as JAX does, from Slurm, Open MPI, Kubernetes or a TPU pod.
    Raise InputError if the text is invalid. When a process is lost later, JAX ends the others.
    """
    given: dict[str, Any] = {}
    if text != "auto":
        found = re.fullmatch(r"(.+):(\d{1,5}),(\d{1,6}),(\d{1,6})", text, re.ASCII)
        if found is None:
            raise InputError(f"processes={text!r}: it must be HOST:PORT,COUNT,NUMBER, or auto")
        host, (port, count, number) = found[1], map(int, found.groups()[1:])
        fits = 0 < port < 2**16 and number < count
        right = "processes are numbered from 0 to COUNT - 1, and ports from 1 to 65535"
        require(fits, f"processes={text!r}: {right}")
        given = {"num_processes": count, "process_id": number}
        for what in ("coordinator_address", "coordinator_bind_address"):  # by default it binds all
            given[what] = f"{host}:{port}"
        taken = number == 0 and _answers(host, port)
        require(not taken, f"processes={text}: some program already listens there")
    for what in ("heartbeat", "shutdown"):
        given[f"{what}_timeout_seconds"] = PATIENCE
    try:
        jax.distributed.initialize(**given, initialization_timeout=START)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"processes={text}: cannot join the job: {error}") from None


def _answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host.strip("[]"), port), 1):
        return True
    return False


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0


@contextmanager
def sharing_errors(checksum: Callable[[], int] | None = None) -> Iterator[None]:
    """Wait for all processes, and raise in each the InputError that the body raises in any.

    With several processes, an OSError also becomes such an InputError.
    checksum: called after the body; its value must be the same in all processes.
    """
    if jax.process_count() == 1:
        yield
        return
    fault = ""
    try:
        yield
    except InputError as error:
        fault = str(error) or "InputError"
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    message = np.frombuffer(fault.encode()[:MESSAGE].ljust(MESSAGE, b"\0"), np.uint8)
    for number, row in enumerate(multihost_utils.process_allgather(message)):
        if sent := row.tobytes().rstrip(b"\0").decode(errors="ignore"):
            raise InputError(sent if sent == fault else f"process {number}: {sent}")
    if checksum is not None:
        values = multihost_utils.process_allgather(np.uint32(checksum()))
        same = np.all(values == values[0])
        require(same, "the processes have different settings or data: start all with the same")


def agree(value: int) -> int:
    """Return the first process's value in all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
    """Return the largest value of any process in all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def wait_for_all() -> None:
    """Wait until all processes are here."""
    multihost_utils.sync_global_devices("wait_for_all")


def first_devices(count: int) -> list[jax.Device]:
    """Return up to count devices, at least one, equally many of each process."""
    processes = range(jax.process_count())
    each = max(1, min(count // len(processes), _devices_each()))
    return [device for process in processes for device in jax.local_devices(process)[:each]]


def choose_devices(batch_size: int, count: int | None = None) -> list[jax.Device]:
    """Return the first count devices; by default as many as divide the batch into equal parts.

    In a job of several processes, each gives equally many.
    Raise InputError if there are not count devices, or if batch_size is not divisible by count.
    """
    processes = jax.process_count()
    available = processes * _devices_each()
    counts = range(processes, available + 1, processes)
    if count is None:
        count = max((n for n in counts if batch_size % n == 0), default=processes)
    where = "this machine has" if processes == 1 else f"these {processes} processes have"
    must = "" if processes == 1 else ", and each must give equally many"
    require(count in counts, f"devices={count}: {where} {available}{must}")
    require(
        batch_size % count == 0,
        f"batch_size={batch_size} is not divisible by devices={count}: "
        f"take {batch_size + -batch_size % count} images, or a different number of devices",
    )
    return first_devices(count)


def _devices_each() -> int:
    """Return the number of devices that every process has."""
    return min(len(jax.local_devices(process)) for process in range(jax.process_count()))


def data_parallel(
    fn: Callable,
    in_axes: Sequence[int | None],
    out_axes: Any,
    *,
    devices: Sequence[jax.Device],
    donate: Sequence[int] = (),
) -> Any:
    """Compile fn, written for one device, for all of them.

    in_axes: 0 for an argument whose leading axis is the device, None for one that all share.
    out_axes: the same for the results. None requires that fn reduces the result over AXIS, so that
    it is equal on all devices. Devices of several processes need shard_map, which gives the same
    numbers.
    """

    @wraps(fn)
    def pinned(*args: Any) -> Any:
        with jax.enable_x64(False):  # else JAX_ENABLE_X64 draws different noise
            return fn(*args)

    ins, donated = tuple(in_axes), tuple(donate)
    if is_distributed(devices):
        return jax.jit(_shard_map(pinned, ins, out_axes, devices), donate_argnums=donated)
    return jax.pmap(
        pinned, AXIS, in_axes=ins, out_axes=out_axes, devices=devices, donate_argnums=donated
    )


def _shard_map(fn: Callable, in_axes: Any, out_axes: Any, devices: Sequence[jax.Device]) -> Any:
    """Map fn as pmap does: only the caller sees the axis of devices."""

    def over(axes: Any, change: Callable, *trees: Any) -> Any:
        return jax.tree.map(change, axes, *trees, is_leaf=lambda axis: axis is None)

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(AXIS)

    def part(axis: int | None, tree: Any) -> Any:
        return tree if axis is None else jax.tree.map(lambda leaf: leaf[0], tree)

    def whole(axis: int | None, tree: Any) -> Any:
        return tree if axis is None else jax.tree.map(lambda leaf: leaf[None], tree)

    return jax.shard_map(
        lambda *args: over(out_axes, whole, fn(*over(in_axes, part, args))),
        mesh=_mesh(devices),
        in_specs=over(in_axes, spec),
        out_specs=over(out_axes, spec),
        check_vma=False,  # fn reduces gradients itself
    )


def is_distributed(devices: Sequence[jax.Device]) -> bool:
    """Return whether the devices belong to several processes."""
    return len({device.process_index for device in devices}) > 1


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put a tree of arrays on every device, whole. Every process has the whole tree."""
    return _place(tree, devices, PartitionSpec())


def scatter(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put element i of every leaf's leading axis on device i. Every process has the whole tree."""
    return _place(tree, devices, PartitionSpec(AXIS))


def gather(tree: Any) -> Any:
    """Return arrays as whole NumPy arrays, in every process."""

    def to_host(leaf: Any) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(to_host, tree)


def _place(tree: Any, devices: Sequence[jax.Device], spec: PartitionSpec) -> Any:
    sharding = NamedSharding(_mesh(devices), spec)
    if not is_distributed(devices):
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(place, tree)


def split(tree: Any, count: int) -> Any:
    """Reshape every leaf: (batch, ...) -> (count, batch / count, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree)


def merge(tree: Any) -> Any:
    """Reshape every leaf: (count, part, ...) -> (count * part, ...), the inverse of split."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,))
