"""Weights of the published PyTorch network: their files, and conversion to and from Flax."""

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
import safetensors.numpy

from diffusion_jax.files import HEAD, UNKNOWN, explain, sniff, write_atomically
from diffusion_jax.typing import InputError, Variables, import_extra, require

NESTED = ("model_state_dict", "state_dict", "model")  # keys of a checkpoint that hold the tensors
PREFIXES = ("module.", "_orig_mod.")  # added by DataParallel and by torch.compile
FORMS = ("a ZIP archive", "a pickle, which is never run", UNKNOWN)  # kinds of files with weights
StateDict = dict[str, np.ndarray]
Codec = tuple[Callable[[bytes], StateDict], Callable[[StateDict], bytes]]  # decode, encode

LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# Kernels: OIHW -> HWIO; transposed convolutions: IOHW -> HWOI; linear layers: OI -> IO.
TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
TO_TORCH = {rank: tuple(np.argsort(axes).tolist()) for rank, axes in TO_FLAX.items()}
KINDS: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read named tensors from a .pth, .pt or .safetensors file. Pickled code is never run.

    In a checkpoint, the tensors may be nested under one of NESTED, and all names may begin with one
    of PREFIXES. Return arrays by name; floating-point arrays of any precision become float32.
    Raise InputError if the suffix is not one of these three, the library is missing, or the file is
    not a dictionary of tensors.
    """
    path = Path(path)
    decode, _ = codec(path)
    fault = f"{path} is not a file of only tensors"
    regular = path.is_file() or not path.exists()  # reading a pipe or a device might never end
    require(regular, f"{fault}: it is not a file")
    data = b""
    try:
        data = path.read_bytes()
        state_dict = decode(data)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if sniff(data) not in FORMS:
            reason = explain(data[:HEAD], "give weights as torch.save or safetensors write them")
        elif "weights_only" in str(error):
            reason = "it holds Python objects, which are never loaded: save only a state_dict()"
        raise InputError(f"{fault}: {reason}") from error
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): v for name, v in state_dict.items()}
    return {
        name: value.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value
        for name, value in state_dict.items()
    }


def write_state_dict(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Write named tensors to a .pth, .pt or .safetensors file, completely or not at all.

    Raise InputError if the suffix is not one of these three, the library is missing, or the file
    cannot be written.
    """
    _, encode = codec(Path(path))
    data = encode({name: np.array(value, order="C") for name, value in state_dict.items()})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def import_state_dict(state_dict: Mapping[str, np.ndarray], template: Variables) -> Variables:
    """Return a network's variables with the values of a state_dict.

    state_dict: arrays under the names of the reference; num_batches_tracked is ignored.
    template: the result of network.init, or of jax.eval_shape on it.
    Raise an InputError that names all tensors that are missing, surplus, of a different shape, or
    not finite.
    """
    leaves = {torch_name(p): (p, leaf) for p, leaf in traverse.flatten_dict(template).items()}
    shapes = {
        k: tuple(leaf.shape[a] for a in TO_TORCH[leaf.ndim]) for k, (_, leaf) in leaves.items()
    }
    given = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    faults = {
        "missing": [f"{k} {shape}" for k, shape in shapes.items() if k not in given],
        "surplus": [f"{k} {value.shape}" for k, value in given.items() if k not in shapes],
        "of a different shape": [
            f"{k} {v.shape} instead of {shapes[k]}"
            for k, v in given.items()
            if v.shape != shapes.get(k, v.shape)
        ],
        "not of finite floats": [k for k, v in given.items() if not _finite(v)],
    }
    words = [f"{fault} {', '.join(names)}" for fault, names in faults.items() if names]
    if any(name.startswith("init_conv.shortcut") for name in faults["missing"]):
        words.append('without init_conv.shortcut the network is one of shortcut="none"')
    require(not words, f"state_dict does not fit the network: {'; '.join(words)}")
    found = {
        path: np.array(given[name].transpose(TO_FLAX[given[name].ndim]), np.float32, order="C")
        for name, (path, _) in leaves.items()
    }
    return jax.device_put(traverse.unflatten_dict(found))


def _finite(value: np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating) and bool(np.isfinite(value).all())


def export_state_dict(variables: Variables) -> StateDict:
    """Return variables as a float32 state_dict, which the reference network loads strictly.

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
    """Return the fields of a ContextUnet, inferred from the shapes of its state_dict.

    Raise InputError if a tensor that determines a field is missing or has a different rank.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        fits = name in state_dict and state_dict[name].ndim == rank
        require(fits, f"state_dict is not a ContextUnet's: {name} of rank {rank} is missing")
        return state_dict[name].shape

    n_feat, in_channels, _, _ = shape("init_conv.conv1.0.weight", 4)
    *_, height, width = shape("up0.0.weight", 4)
    return {
        "image_shape": (4 * height, 4 * width, in_channels),
        "n_feat": n_feat,
        "n_cfeat": shape("contextembed1.model.0.weight", 2)[1],
        "shortcut": "conv" if "init_conv.shortcut.weight" in state_dict else "none",
        "norm": "batch" if "init_conv.conv1.1.running_mean" in state_dict else "group",
    }


def torch_name(path: tuple[str, ...]) -> str:
    """Return the reference's name of a Flax leaf, such as (params, down1, model_0, kernel)."""
    collection, *modules, leaf = path
    dotted = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*dotted, LEAVES[collection, leaf]])


def codec(path: Path) -> Codec:
    """Return the functions that decode and encode files with this suffix."""
    require(path.suffix in CODECS, f"{path}: give a file ending in {', '.join(CODECS)}")
    return CODECS[path.suffix]


def decode_torch(data: bytes) -> StateDict:
    """Decode the bytes of a torch.save file that holds only tensors."""
    torch = import_extra("torch", "torch")
    if zipfile.is_zipfile(io.BytesIO(data)):
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TypeError("it is compressed, which torch.save never does")
    with warnings.catch_warnings(action="ignore"):  # about files that are refused below
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(tensors, dict):
        nested = [tensors[key] for key in NESTED if isinstance(tensors.get(key), dict)]
        tensors = nested[0] if len(nested) == 1 else tensors
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise TypeError(f"it is not a dictionary of only tensors, but a {type(tensors).__name__}")
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if claimed > len(data):  # tensors that share memory would be copied and could fill it
        raise TypeError(f"it holds {len(data)} bytes, and claims tensors of {claimed}")
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in tensors.items()
    }


def encode_torch(state_dict: StateDict) -> bytes:
    """Encode tensors as torch.save does."""
    torch = import_extra("torch", "torch")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(value) for name, value in state_dict.items()}, buffer)
    return buffer.getvalue()


def decode_safetensors(data: bytes) -> StateDict:
    """Decode the bytes of a safetensors file. Unlike safetensors.numpy, it supports bfloat16."""
    return {
        name: np.frombuffer(value["data"], KINDS[value["dtype"]]).reshape(value["shape"])
        for name, value in safetensors.deserialize(data)
    }


CODECS: dict[str, Codec] = {
    ".pth": (decode_torch, encode_torch),
    ".pt": (decode_torch, encode_torch),
    ".safetensors": (decode_safetensors, safetensors.numpy.save),
}
