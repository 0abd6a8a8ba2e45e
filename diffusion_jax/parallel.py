"""Devices: choosing them, and running a function that is written for one of them on all."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.typing import InputError, choose

AXIS = "data"  # the mapped axis: each device holds a part of the batch


def use_cpu_cores(count: int | None = None) -> None:
    """Make that many CPU cores (all that this process may use by default) devices of their own.

    XLA runs a small convolution on one core only. Call it before JAX starts; it does not matter
    where JAX finds accelerators.
    """
    if count is not None and count < 1:
        raise InputError(f"cpu_devices={count}: it must be at least 1")
    jax.config.update("jax_num_cpu_devices", count or len(os.sched_getaffinity(0)))


def make_deterministic() -> None:
    """Have XLA take kernels that give the same bits each time. Call it before JAX starts.

    GPUs have faster ones that do not. On CPUs and TPUs it changes nothing: they have no others.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def choose_devices(batch_size: int, count: int | None = None) -> list[jax.Device]:
    """The first count local devices; by default as many as divide the batch into equal parts.

    Raises InputError if a count is asked for that is not there or does not divide batch_size.
    """
    available = jax.local_devices()
    if count is None:
        count = max(n for n in range(1, len(available) + 1) if batch_size % n == 0)
    if not 1 <= count <= len(available):
        raise InputError(f"devices={count}: this machine has {len(available)}")
    if batch_size % count:
        raise InputError(
            f"batch_size={batch_size} is not divisible by devices={count}: "
            f"take {batch_size + -batch_size % count} images, or another number of devices"
        )
    return available[:count]


def data_parallel(
    fn: Callable,
    in_axes: Sequence[int | None],
    out_axes: Any,
    *,
    devices: Sequence[jax.Device],
    donate: Sequence[int] = (),
    how: str = "pmap",
) -> Callable:
    """Compile fn, written for one device, for all of them.

    in_axes: 0 for an argument whose leading axis is the device, None for one that all share;
    out_axes the same for what is returned (None: equal on all devices, reduced over AXIS by fn).
    how: "pmap", or "shard_map" for jobs of several processes: the same numbers by either.
    """
    mappers = {"pmap": _pmap, "shard_map": _shard_map}
    return choose(mappers, "how", how)(fn, tuple(in_axes), out_axes, devices, tuple(donate))


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
    """Put a tree of arrays on every device, whole."""
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()))


def split(tree: Any, count: int) -> Any:
    """(batch, ...) -> (count, batch / count, ...) in every leaf."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree)


def merge(tree: Any) -> Any:
    """(count, part, ...) -> (count * part, ...) in every leaf: the inverse of split."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,))
