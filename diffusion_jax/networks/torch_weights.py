"""Weights of the published PyTorch network: files, and the renaming to and from Flax."""

import importlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.files import write_atomically
from diffusion_jax.magic import HEAD, UNKNOWN, explain, sniff
from diffusion_jax.typing import InputError, Variables

NESTED = ("model_state_dict", "state_dict", "model")  # where a checkpoint keeps a model's tensors
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
FORMS = ("a ZIP archive", "a pickle, which is never run", UNKNOWN)  # that weights may have
StateDict = dict[str, np.ndarray]

LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# Kernels: OIHW -> HWIO; transposed convolutions: IOHW -> HWOI; linear layers: OI -> IO.
TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
KINDS: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}
TO_TORCH = {rank: tuple(np.argsort(axes).tolist()) for rank, axes in TO_FLAX.items()}


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read named tensors from a .pth, .pt or .safetensors file. Pickled code is never run.

    A checkpoint's may be nested under one of NESTED, and all names may begin with PREFIXES.

    Returns:
        Arrays by name; floating ones of any precision as float32.

    Raises:
        InputError: no such file, another suffix, the library is missing, or the file does not
            hold a dictionary of tensors.
    """
    path = Path(path)
    decode, _ = codec(path)
    if path.exists() and not path.is_file():  # reading a pipe or a device would not end
        raise InputError(f"{path} is not a file of tensors alone: it is no file")
    data = b""
    try:
        data = path.read_bytes()
        return _without_prefixes(decode(data))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if sniff(data) not in FORMS:
            reason = explain(data[:HEAD], "give weights as torch.save or safetensors write them")
        elif "weights_only" in str(error):
            reason = "it holds Python objects, which are never loaded: save a state_dict() alone"
        raise InputError(f"{path} is not a file of tensors alone: {reason}") from error


def _without_prefixes(state_dict: StateDict) -> StateDict:
    """Remove those of PREFIXES with which every name begins."""
    for prefix in PREFIXES * 2:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): v for name, v in state_dict.items()}
    return state_dict


def write_state_dict(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Write named tensors to a .pth, .pt or .safetensors file: all of it, or nothing.

    Raises:
        InputError: another suffix, the library is missing, or the file cannot be written.
    """
    path = Path(path)
    _, encode = codec(path)
    data = encode({name: np.array(value, order="C") for name, value in state_dict.items()})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def import_state_dict(state_dict: Mapping[str, np.ndarray], template: Variables) -> Variables:
    """Bring a state_dict into the shape of a network's variables.

    Args:
        state_dict: arrays under the names of the reference; num_batches_tracked is ignored.
        template: what network.init returns, or jax.eval_shape of it.

    Raises:
        InputError: names all tensors that are missing, surplus, of another shape, or not finite.
    """
    paths = traverse.flatten_dict(template)
    names = {path: torch_name(path) for path in paths}
    wanted = {names[p]: torch_shape(leaf.shape) for p, leaf in paths.items()}
    given = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    faults = [*mismatches(wanted, given), *not_finite(given)]
    if faults:
        raise InputError(f"state_dict does not fit the network: {'; '.join(faults)}")
    leaves = {path: from_torch(given[name]) for path, name in names.items()}
    return jax.device_put(traverse.unflatten_dict(leaves))


def export_state_dict(variables: Variables) -> StateDict:
    """Return variables as float32 arrays under the reference's names, which it loads strictly.

    num_batches_tracked, which Flax does not have, is 0.
    """
    state_dict = {}
    for path, leaf in traverse.flatten_dict(variables).items():
        value = np.asarray(leaf, np.float32)
        name = torch_name(path)
        state_dict[name] = np.array(value.transpose(TO_TORCH[value.ndim]), order="C")
        if name.endswith("running_var"):
            tracked = name.replace("running_var", "num_batches_tracked")
            state_dict[tracked] = np.zeros((), np.int64)
    return state_dict


def infer_fields(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the fields of the ContextUnet that a state_dict belongs to, from its shapes.

    Raises:
        InputError: a tensor that tells one of them is missing or has another rank.
    """
    n_feat, in_channels, _, _ = shape_of(state_dict, "init_conv.conv1.0.weight", 4)
    _, n_cfeat = shape_of(state_dict, "contextembed1.model.0.weight", 2)
    *_, height, width = shape_of(state_dict, "up0.0.weight", 4)
    return {
        "image_shape": (4 * height, 4 * width, in_channels),
        "n_feat": n_feat,
        "n_cfeat": n_cfeat,
        "shortcut": "conv" if "init_conv.shortcut.weight" in state_dict else "none",
        "norm": "batch" if "init_conv.conv1.1.running_mean" in state_dict else "group",
    }


def shape_of(state_dict: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there, of that rank."""
    if name not in state_dict or state_dict[name].ndim != rank:
        raise InputError(f"state_dict is not a ContextUnet's: {name} of rank {rank} is missing")
    return state_dict[name].shape


def torch_name(path: tuple[str, ...]) -> str:
    """Name a Flax leaf as the reference does: (params, down1, model_0, kernel) etc."""
    collection, *modules, leaf = path
    dotted = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*dotted, LEAVES[collection, leaf]])


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a Flax leaf has in PyTorch."""
    return tuple(shape[axis] for axis in TO_TORCH[len(shape)])


def from_torch(value: np.ndarray) -> np.ndarray:
    """Return a float32 copy with the axes in Flax's order."""
    return np.array(value.transpose(TO_FLAX[value.ndim]), np.float32, order="C")


def mismatches(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray]) -> list[str]:
    """Say what is missing, surplus and of another shape."""
    missing = [f"{k} {shape}" for k, shape in wanted.items() if k not in given]
    surplus = [f"{k} {value.shape}" for k, value in given.items() if k not in wanted]
    shapes = [
        f"{k} {given[k].shape} instead of {shape}"
        for k, shape in wanted.items()
        if k in given and given[k].shape != shape
    ]
    hint = any(text.startswith("init_conv.shortcut") for text in missing)
    return [
        *([f"missing {', '.join(missing)}"] if missing else []),
        *(['without init_conv.shortcut the network is one of shortcut="none"'] if hint else []),
        *([f"surplus {', '.join(surplus)}"] if surplus else []),
        *([f"of another shape {', '.join(shapes)}"] if shapes else []),
    ]


def not_finite(given: Mapping[str, np.ndarray]) -> list[str]:
    """Say which tensors are not of finite floats."""
    bad = [
        name
        for name, value in given.items()
        if not (jnp.issubdtype(value.dtype, jnp.floating) and np.isfinite(value).all())
    ]
    return [f"not of finite floats {', '.join(bad)}"] if bad else []


def codec(path: Path) -> tuple[Callable[[bytes], StateDict], Callable[[StateDict], bytes]]:
    """Return how a file of this suffix is decoded and encoded."""
    if path.suffix not in CODECS:
        raise InputError(f"{path}: give a file ending in {', '.join(CODECS)}")
    return CODECS[path.suffix]


def library(name: str) -> Any:
    """Import an optional library."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name.split('.')[0]} is not installed: pip install 'diffusion_jax[torch]'"
        ) from error


def decode_torch(data: bytes) -> StateDict:
    """Decode what torch.save wrote, tensors alone."""
    torch = library("torch")
    if zipfile.is_zipfile(io.BytesIO(data)):
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TypeError("is compressed, which torch.save never does")
    with warnings.catch_warnings(action="ignore"):  # about forms that are then refused
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(tensors, dict):
        nested = [tensors[key] for key in NESTED if isinstance(tensors.get(key), dict)]
        tensors = nested[0] if len(nested) == 1 else tensors
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise TypeError(f"holds no dictionary of tensors alone, but a {type(tensors).__name__}")
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if claimed > len(data):  # elements that share their memory would be told apart, and fill it
        raise TypeError(f"holds {len(data)} bytes, and claims tensors of {claimed}")
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in tensors.items()
    }


def encode_torch(state_dict: StateDict) -> bytes:
    """Encode as torch.save does."""
    torch = library("torch")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(value) for name, value in state_dict.items()}, buffer)
    return buffer.getvalue()


def decode_safetensors(data: bytes) -> StateDict:
    """Decode a safetensors file, in bfloat16 too, which safetensors.numpy does not."""
    arrays = {}
    for name, tensor in library("safetensors").deserialize(data):
        value = np.frombuffer(tensor["data"], KINDS[tensor["dtype"]]).reshape(tensor["shape"])
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        arrays[name] = value.astype(np.float32) if floating else value
    return arrays


def encode_safetensors(state_dict: StateDict) -> bytes:
    """Encode as a safetensors file."""
    return library("safetensors.numpy").save(state_dict)


CODECS = {
    ".pth": (decode_torch, encode_torch),
    ".pt": (decode_torch, encode_torch),
    ".safetensors": (decode_safetensors, encode_safetensors),
}
