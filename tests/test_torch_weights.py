"""Files of weights, and the names in them. test_peers_networks.py has the tests with PyTorch."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.networks import (
    ContextUnet,
    export_state_dict,
    import_state_dict,
    infer_fields,
    read_state_dict,
    write_state_dict,
)
from diffusion_jax.typing import InputError
from tests.test_networks import drawn, template

NETWORK = ContextUnet(n_feat=8, shortcut="none")


@pytest.fixture(scope="module")
def state():
    return export_state_dict(drawn(NETWORK))


def assert_equal(one, two):
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        np.testing.assert_array_equal(value, two[name], strict=True)


@pytest.mark.parametrize("fields", [{}, {"norm": "group"}, {"image_shape": (28, 8, 3)}], ids=str)
def test_import_and_export_are_inverse(fields):
    network = ContextUnet(n_feat=8, **fields)
    state = export_state_dict(drawn(network))
    variables = import_state_dict(state, template(network))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    assert jax.tree.structure(variables) == jax.tree.structure(template(network))
    assert_equal(export_state_dict(variables), state)


def test_names_and_axes_are_the_references():
    variables = drawn(NETWORK)
    state = export_state_dict(variables)
    params, stats = variables["params"], variables["batch_stats"]
    kernel = params["down1"]["model_0"]["conv1_0"]["kernel"]
    weight = state["down1.model.0.conv1.0.weight"]
    assert weight[1, 2, 0, 2] == kernel[0, 2, 2, 1]
    weight = state["up1.model.0.weight"]  # a transposed convolution is (in, out, height, width)
    assert weight.shape == (32, 8, 2, 2)
    assert weight[5, 2, 0, 1] == params["up1"]["model_0"]["kernel"][0, 1, 2, 5]
    weight = state["contextembed1.model.0.weight"]
    assert weight[7, 3] == params["contextembed1"]["model_0"]["kernel"][3, 7]
    assert state["out.1.weight"][4] == params["out_1"]["scale"][4]
    var = stats["up2"]["model_2"]["conv2_1"]["var"]
    assert state["up2.model.2.conv2.1.running_var"][3] == var[3]
    tracked = state["init_conv.conv1.1.num_batches_tracked"]
    assert (tracked.shape, tracked.dtype) == ((), np.int64)


def test_import_copies_what_it_is_given(state):
    given = {k: v.copy() for k, v in state.items()}
    variables = import_state_dict(given, template(NETWORK))
    for value in given.values():
        value[...] = 7
    assert_equal(export_state_dict(variables), state)


def test_import_lists_every_fault(state):
    given = {k: v for k, v in state.items() if k not in ("out.0.bias", "up0.1.weight")}
    given |= {"extra.weight": np.zeros(3, np.float32), "out.3.bias": np.zeros(4, np.float32)}
    with pytest.raises(InputError) as caught:
        import_state_dict(given, template(NETWORK))
    message = str(caught.value)
    assert "\n" not in message
    assert "missing out.0.bias (8,), up0.1.weight (16,)" in message
    assert "surplus extra.weight (3,)" in message
    assert "of a different shape out.3.bias (4,) instead of (3,)" in message
    assert "shortcut" not in message


def test_import_says_what_a_missing_shortcut_means(state):
    learned = template(ContextUnet(n_feat=8, shortcut="conv"))
    with pytest.raises(InputError, match=r"init_conv\.shortcut\.weight.*shortcut=\"none\""):
        import_state_dict(state, learned)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.int32(3)])
def test_import_refuses_what_is_not_finite_or_not_floating(state, value):
    bad = state["up0.0.bias"].astype(np.asarray(value).dtype)
    bad[3] = value
    with pytest.raises(InputError, match=r"not of finite floats up0\.0\.bias$"):
        import_state_dict(state | {"up0.0.bias": bad}, template(NETWORK))


@pytest.mark.parametrize(
    "fields",
    [
        {"image_shape": (16, 16, 3), "n_feat": 8, "n_cfeat": 5},
        {"image_shape": (8, 12, 1), "n_feat": 16, "n_cfeat": 12, "norm": "group"},
        {"image_shape": (32, 32, 3), "n_feat": 8, "n_cfeat": 1, "shortcut": "none"},
    ],
    ids=str,
)
def test_fields_are_inferred_from_the_shapes(fields):
    fields = {"shortcut": "conv", "norm": "batch"} | fields
    zeros = jax.tree.map(lambda v: np.zeros(v.shape), template(ContextUnet(**fields)))
    assert infer_fields(export_state_dict(zeros)) == fields


@pytest.mark.parametrize("name", ["init_conv.conv1.0.weight", "up0.0.weight"])
def test_fields_of_another_network_are_refused(state, name):
    with pytest.raises(InputError, match="not a ContextUnet's"):
        infer_fields({k: v for k, v in state.items() if k != name})
    with pytest.raises(InputError, match="not a ContextUnet's"):
        infer_fields(state | {name: np.zeros(3, np.float32)})


def test_safetensors_round_trip_without_torch(state, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, state)
    read = read_state_dict(path)
    assert_equal({k: read[k] for k in state}, state)
    assert len(read) == len(state)
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_safetensors_holds_transposed_arrays_and_other_precisions(tmp_path):
    path = tmp_path / "weights.safetensors"
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_state_dict(path, {"a": transposed, "b": np.float16([0.5, 2]), "c": np.float64([0.25])})
    read = read_state_dict(path)
    np.testing.assert_array_equal(read["a"], transposed, strict=True)
    np.testing.assert_array_equal(read["b"], np.float32([0.5, 2]), strict=True)
    np.testing.assert_array_equal(read["c"], np.float32([0.25]), strict=True)


def test_safetensors_layout_is_the_published_one(tmp_path):
    """Read the eight bytes of the length, the JSON header and the data, without the library."""
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, {"a": np.float32([[1, 2]])})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])["a"]
    assert (header["dtype"], header["shape"]) == ("F32", [1, 2])
    np.testing.assert_array_equal(np.frombuffer(data[start:], np.float32), [1, 2])


def test_a_failed_write_leaves_the_old_file(state, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        write_state_dict(path, state)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("function", [read_state_dict, lambda path: write_state_dict(path, {})])
@pytest.mark.parametrize("name", ["weights.npz", "weights", "weights.PTH"])
def test_other_suffixes_are_refused(function, name, tmp_path):
    with pytest.raises(InputError, match=r"give a file ending in \.pth, \.pt, \.safetensors"):
        function(tmp_path / name)


def test_missing_files_are_named_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "no" / "weights.safetensors"
    for missing in (path, path.with_suffix(".pth")):
        with pytest.raises(InputError, match=r"no/weights\.\w+: No such file"):
            read_state_dict(missing)
    write_state_dict(path, {"a": np.float32([1])})
    with pytest.raises(InputError, match=r"s/x\.safetensors: (Not a dir|File exists)"):
        write_state_dict(path / "x.safetensors", {"a": np.float32([1])})


def test_a_missing_pytorch_is_named(tmp_path, monkeypatch):
    for module in ["torch", *(m for m in sys.modules if m.startswith("torch."))]:
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    hint = r"torch is not installed: pip install '\.\[torch\]'"
    with pytest.raises(InputError, match=hint):
        read_state_dict(path)
    with pytest.raises(InputError, match=hint):
        write_state_dict(path, {})


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_safetensors_are_refused(state, keep, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, state)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"safetensors is not a file of only tensors: ") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_named_for_what_they_are(tmp_path):
    for suffix in (".safetensors", ".pth"):
        if suffix == ".pth":
            pytest.importorskip("torch")
        path = tmp_path / f"weights{suffix}"
        for data, kind in (
            (b"<!DOCTYPE html>\n<html>", "an HTML page: .* download the file itself"),
            (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image: give weights as torch.save"),
            (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer: .*git lfs pull"),
            (b"\x93NUMPY\x01\x00", "a .npy array: give weights"),
            (b"", "empty: give weights"),
            (b"GIF89a" * 100, "a GIF image: give weights"),
        ):
            path.write_bytes(data)
            with pytest.raises(InputError, match=f"not a file of only tensors: it is {kind}"):
                read_state_dict(path)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_removed(state, tmp_path, prefix):
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, {prefix + name: value for name, value in state.items()})
    read = read_state_dict(path)
    assert_equal({name: read[name] for name in state}, state)
    mixed = {"module.a": np.float32([1]), "b": np.float32([2])}
    write_state_dict(path, mixed)
    assert set(read_state_dict(path)) == set(mixed)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["model_state_dict", "state_dict", "model"])
def test_a_checkpoint_s_model_is_found(state, tmp_path, name):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{k}": torch.from_numpy(v) for k, v in state.items()}
    optimizer = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-3}]}
    whole = {"epoch": 31, name: tensors, "optimizer_state_dict": optimizer, "loss": 0.1}
    torch.save(whole, tmp_path / "x.pth")
    assert_equal(read_state_dict(tmp_path / "x.pth"), state)
    torch.save(whole | {"model": tensors, "state_dict": tensors}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="is not a dictionary of only tensors, but a dict"):
        read_state_dict(tmp_path / "x.pth")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["module", "legacy", "script", "beside"])
def test_python_objects_are_refused_without_advice_to_load_them(tmp_path, form):
    torch = pytest.importorskip("torch")
    module, path = torch.nn.Linear(2, 2), tmp_path / "x.pt"
    if form == "script":
        torch.jit.save(torch.jit.script(module), path)
    else:
        what = {"model": module.state_dict(), "args": Path("x")} if form == "beside" else module
        torch.save(what, path, _use_new_zipfile_serialization=form != "legacy")
    reason = "is compressed|holds Python objects, which are never loaded: save only a state_dict"
    with pytest.raises(InputError, match=reason) as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)
