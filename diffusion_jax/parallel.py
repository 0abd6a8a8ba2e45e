"""Devices: choosing them, and running a function that is written for one of them on all.

The devices may belong to several processes, on several hosts, each of which runs the same program.
"""

import ctypes
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.typing import InputError, choose

AXIS = "data"  # the mapped axis: each device holds a part of the batch
CORES = 1024  # the most CPU devices
START = 300  # seconds that a process waits for the others at the start
PATIENCE = 20  # seconds without a sign of life after which a process counts as lost
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's mallopt
MESSAGE = 2000  # the most bytes of an error that processes tell each other


def use_cpu_cores(count: int | None = None) -> None:
    """Make that many CPU cores (all that this process may use by default) devices of their own.

    XLA runs a small convolution on one core only. Call it before JAX starts; it does not matter
    where JAX finds accelerators.
    """
    if count is not None and not 1 <= count <= CORES:
        raise InputError(f"cpu_devices={count}: it must be at least 1, at most {CORES}")
    jax.config.update("jax_num_cpu_devices", count or len(os.sched_getaffinity(0)))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep what XLA frees after a dispatch, for the next one.

    It goes back to the system otherwise, and comes again page by page: a third of a training step.
    One arena for all threads, for no other one takes blocks so large from the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 4096)
        mallopt(M_ARENA_MAX, 1)


def make_deterministic() -> None:
    """Have XLA take kernels that give the same bits each time. Call it before JAX starts.

    GPUs have faster ones that do not. On CPUs and TPUs it changes nothing: they have no others.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def start_processes(
    coordinator: str, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join a job of several processes. Call it before JAX starts, in each of them.

    coordinator: HOST:PORT of process 0; "auto" finds it and the numbers as JAX does, from Slurm,
    Open MPI, Kubernetes or a TPU pod.
    Raises InputError for what cannot be. When a process is lost later, JAX ends the others.
    """
    given: dict[str, Any] = {}
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"coordinator={coordinator!r}: it must be HOST:PORT, or auto")
        if num_processes is None or process_id is None:
            raise InputError(f"coordinator={coordinator}: give --num_processes and --process_id")
        if not 0 <= process_id < num_processes:
            raise InputError(
                f"process_id={process_id}, num_processes={num_processes}: "
                "processes are numbered from 0"
            )
        given = dict(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            coordinator_bind_address=coordinator,  # by default it listens on all addresses
        )
        if process_id == 0 and _answers(host, int(port)):
            raise InputError(f"coordinator={coordinator}: another program listens there")
    elif num_processes is not None or process_id is not None:
        raise InputError("coordinator=auto finds num_processes and process_id: leave them out")
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=START,
            heartbeat_timeout_seconds=PATIENCE,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"coordinator={coordinator}: cannot join the job: {error}") from None


def _answers(host: str, port: int) -> bool:
    """Whether a program listens there."""
    with suppress(OSError), socket.create_connection((host.strip("[]"), port), 1):
        return True
    return False


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


@contextmanager
def alike(what: Callable[[], Any] | None = None) -> Iterator[None]:
    """Raise in all processes the InputError that the body raises in any, and wait for all.

    What the system refuses to one of them becomes such an InputError.

    what: gives a value after the body that must be the same in all processes, such as a checksum.
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
    told = np.frombuffer(fault.encode()[:MESSAGE].ljust(MESSAGE, b"\0"), np.uint8)
    for number, row in enumerate(multihost_utils.process_allgather(told)):
        if said := row.tobytes().rstrip(b"\0").decode(errors="ignore"):
            raise InputError(said if said == fault else f"process {number}: {said}")
    if what is not None:
        values = multihost_utils.process_allgather(np.uint32(what()))
        if np.any(values != values[0]):
            raise InputError("the processes have different settings or data: start them alike")


def agree(value: int) -> int:
    """The value that the first process has, in all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
    """The largest value that a process has, in all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_all")


def first_devices(count: int) -> list[jax.Device]:
    """Up to count devices, at least one, equally many of each process."""
    processes = jax.process_count()
    part = max(1, min(count // processes, _devices_each()))
    return [device for process in range(processes) for device in jax.local_devices(process)[:part]]


def choose_devices(batch_size: int, count: int | None = None) -> list[jax.Device]:
    """The first count devices; by default as many as divide the batch into equal parts.

    In a job of several processes, each gives equally many.
    Raises InputError if a count is asked for that is not there or does not divide batch_size.
    """
    processes = jax.process_count()
    available = processes * _devices_each()
    counts = range(processes, available + 1, processes)
    if count is None:
        count = max((n for n in counts if batch_size % n == 0), default=processes)
    if count not in counts:
        where = "this machine has" if processes == 1 else f"these {processes} processes have"
        must = "" if processes == 1 else ", and each must give equally many"
        raise InputError(f"devices={count}: {where} {available}{must}")
    if batch_size % count:
        raise InputError(
            f"batch_size={batch_size} is not divisible by devices={count}: "
            f"take {batch_size + -batch_size % count} images, or another number of devices"
        )
    return first_devices(count)


def _devices_each() -> int:
    """The devices that every process has."""
    return min(len(jax.local_devices(process)) for process in range(jax.process_count()))


def data_parallel(
    fn: Callable,
    in_axes: Sequence[int | None],
    out_axes: Any,
    *,
    devices: Sequence[jax.Device],
    donate: Sequence[int] = (),
    how: str | None = None,
) -> Any:
    """Compile fn, written for one device, for all of them.

    in_axes: 0 for an argument whose leading axis is the device, None for one that all share;
    out_axes the same for what is returned (None: equal on all devices, reduced over AXIS by fn).
    how: "pmap", or "shard_map", which jobs of several processes need: the same numbers by either.
    By default pmap where it can be.
    """
    mappers = {"pmap": _pmap, "shard_map": _shard_map}
    if how is None:
        how = "shard_map" if _several(devices) else "pmap"

    @wraps(fn)
    def pinned(*args: Any) -> Any:
        with jax.enable_x64(False):  # else JAX_ENABLE_X64 draws other noise
            return fn(*args)

    return choose(mappers, "how", how)(pinned, tuple(in_axes), out_axes, devices, tuple(donate))


def _pmap(fn, in_axes, out_axes, devices, donate):  # type: ignore[no-untyped-def]
    return jax.pmap(
        fn, AXIS, in_axes=in_axes, out_axes=out_axes, devices=devices, donate_argnums=donate
    )


def _shard_map(fn, in_axes, out_axes, devices, donate):  # type: ignore[no-untyped-def]
    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(AXIS)

    def part(tree: Any, axis: int | None) -> Any:
        return tree if axis is None else jax.tree.map(lambda leaf: leaf[0], tree)

    def whole(tree: Any, axis: int | None) -> Any:
        return tree if axis is None else jax.tree.map(lambda leaf: leaf[None], tree)

    def on_one_device(*args: Any) -> Any:
        out = fn(*map(part, args, in_axes))
        if isinstance(out_axes, tuple):
            return tuple(map(whole, out, out_axes))
        return whole(out, out_axes)

    out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes, tuple) else spec(out_axes)
    mapped = jax.shard_map(
        on_one_device,
        mesh=_mesh(devices),
        in_specs=tuple(map(spec, in_axes)),
        out_specs=out_specs,
        check_vma=False,  # gradients are reduced by hand
    )
    return jax.jit(mapped, donate_argnums=donate)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put a tree of arrays on every device, whole. Every process has the whole tree."""
    return _place(tree, devices, PartitionSpec())


def scatter(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put element i of every leaf's leading axis on device i. Every process has the whole tree."""
    return _place(tree, devices, PartitionSpec(AXIS))


def gather(tree: Any) -> Any:
    """Arrays as whole NumPy arrays, in every process."""
    return jax.tree.map(_to_host, tree)


def _to_host(leaf: Any) -> np.ndarray:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def _place(tree: Any, devices: Sequence[jax.Device], spec: PartitionSpec) -> Any:
    sharding = NamedSharding(_mesh(devices), spec)
    if not _several(devices):
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(place, tree)


def _several(devices: Sequence[jax.Device]) -> bool:
    """Whether the devices are of several processes."""
    return len({device.process_index for device in devices}) > 1


def split(tree: Any, count: int) -> Any:
    """(batch, ...) -> (count, batch / count, ...) in every leaf."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree)


def merge(tree: Any) -> Any:
    """(count, part, ...) -> (count * part, ...) in every leaf: the inverse of split."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,))
