"""Compare the ContextUnet and its layers with results of PyTorch (tests/make_fixtures.py)."""

import re
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.networks import (
    NETWORKS,
    ContextUnet,
    Network,
    export_state_dict,
    import_state_dict,
)
from diffusion_jax.networks.kernels import KERNELS
from diffusion_jax.networks.layers import BatchNorm, ConvTranspose, GroupNorm, max_pool
from diffusion_jax.typing import InputError
from tests.make_fixtures import (
    CASES,
    FIELDS,
    FIXTURES,
    RATE,
    SEEDS,
    STEPS,
    draw_batch,
    draw_weights,
    pack,
)
from tests.models import SMALL, untrained

# This halves the time to compile, and takes a sixth of it for the initialisation.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@cache
def template(network):
    x = jnp.zeros((1, *network.image_shape))
    return jax.eval_shape(network.init, jax.random.key(0), x, 0.5)


def zeros(shape_tree):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shape_tree)


def drawn(network):
    shapes = {k: v.shape for k, v in export_state_dict(zeros(template(network))).items()}
    return import_state_dict(draw_weights(shapes), template(network))


def network_of(height=16, in_channels=3, **fields):
    """Return the network with the fields of the PyTorch one."""
    return ContextUnet((height, height, in_channels), **fields)


def run_ours(network, batch, steps=STEPS):
    """Compute the results of make_fixtures.run_reference, under the same names."""
    x, t, context, target = (jnp.asarray(nhwc(a)) for a in batch)
    variables = drawn(network)
    params = variables.pop("params")
    adam = optax.adam(RATE)

    def evaluate(v):
        return network.apply(v, x, t, context), network.apply(v, x, t)

    def loss(params, stats):
        mutable = ["batch_stats"]
        v = {"params": params, **stats}
        output, stats = network.apply(v, x, t, context, train=True, mutable=mutable)
        return jnp.square(output - target).mean(), (output, stats)

    def step(params, stats, state):
        (value, (output, stats)), grad = jax.value_and_grad(loss, has_aux=True)(params, stats)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float32
            updates, state = adam.update(grad, state, params)
        return (optax.apply_updates(params, updates), stats, state), (value, output, grad)

    outputs = jit(evaluate)({"params": params, **variables})
    found = dict(zip(("eval", "eval_none"), map(nchw, outputs), strict=True))
    carry, losses, compiled = (params, variables, adam.init(params)), [], jit(step)
    for index in range(steps):
        carry, (value, output, grad) = compiled(*carry)
        losses.append(value)
        if index == 0:
            found["train"] = nchw(output)
            found |= tree("grad", {"params": grad}) | tree("stats", carry[1])
    found |= tree("param", {"params": carry[0]})
    found["last"] = nchw(compiled(*carry)[1][1])
    return found | {"losses": np.float32(losses)}


def tree(name, variables):
    tensors = export_state_dict(variables).items()
    return {f"{name}/{k}": v for k, v in tensors if v.dtype == np.float32}


def nhwc(a):
    return a.transpose(0, 2, 3, 1) if a.ndim == 4 else a


def nchw(a):
    return np.asarray(a).transpose(0, 3, 1, 2)


def error(ours, theirs):
    """Return the norm of the difference divided by the norm."""
    return np.linalg.norm(np.float64(ours) - theirs) / np.linalg.norm(theirs)


def unseen(name, fields):
    """Return whether the norm behind a bias removes it, so that its gradient is zero.

    BatchNorm removes every bias in front of it. GroupNorm removes those of groups of one channel.
    The remaining gradient is rounding, from which Adam still makes steps of up to its rate.
    """
    if name.endswith("out.0.bias"):
        return fields["n_feat"] == 8
    in_block = re.search(r"conv[12]\.0\.bias$", name) is not None
    wide = "down2" in name  # twice n_feat channels
    return in_block and (fields["norm"] == "batch" or (fields["n_feat"] == 8 and not wide))


def assert_parity(ours, theirs, fields, adam=1e-4):
    """Compare two runs whose trees are complete (see test_peers_networks.py)."""
    assert set(ours) == set(theirs)
    for key in ("eval", "eval_none", "train"):
        assert error(ours[key], theirs[key]) < 1e-5, key
    grads = {k: v for k, v in theirs.items() if k.startswith("grad/")}
    whole = np.sqrt(sum(np.linalg.norm(v) ** 2 for v in grads.values()))
    for name, grad in grads.items():
        size = np.linalg.norm(grad)
        assert (size < 1e-6 * whole) == unseen(name, fields), name
        assert np.linalg.norm(ours[name] - grad) < 1e-4 * max(size, 1e-2 * whole), name
    for name in (k for k in theirs if k.startswith("stats/")):
        assert error(ours[name], theirs[name]) < 1e-5, name
    assert error(ours["losses"], theirs["losses"]) < 2e-4
    assert error(ours["last"], theirs["last"]) < adam
    for name in (k for k in theirs if k.startswith("param/")):
        if not unseen(name, fields):
            assert error(ours[name], theirs[name]) < adam, name


def test_registry():
    assert NETWORKS["context_unet"] is ContextUnet


SIZE = "; the data option size=N scales images to it"
SLOW = "16_none"  # it differs from 28_none only in the size of the images


@pytest.mark.parametrize(
    "case", [pytest.param(SLOW, marks=pytest.mark.slow), *sorted(CASES.keys() - {SLOW})]
)
def test_agrees_with_pytorch(case):
    fields = FIELDS | CASES[case]
    ours = run_ours(network_of(**fields), draw_batch(fields["height"], seed=SEEDS[case]))
    packed, theirs = pack(ours), np.load(FIXTURES / f"context_unet_{case}.npz")
    assert set(packed) == set(theirs)
    for key in ("eval", "eval_none", "train"):
        assert error(packed[key], theirs[key]) < 1e-5, key
    names = sorted(k for k in ours if k.startswith("grad/"))
    bounds = np.where([unseen(k, fields) for k in names], np.inf, 1e-4)
    assert error(packed["grad"], theirs["grad"]) < 1e-4
    assert (abs(packed["grad_norms"] / theirs["grad_norms"] - 1) < bounds).all()
    if fields["norm"] == "batch":
        assert error(packed["stats"], theirs["stats"]) < 1e-5
        np.testing.assert_allclose(packed["stats_norms"], theirs["stats_norms"], rtol=1e-5)
    # After Adam, outputs and parameters agree, except where a gradient is only rounding. This can
    # also happen to single entries: errors are 1e-7, and 8e-5 where it did.
    assert error(packed["losses"], theirs["losses"]) < 1e-5
    assert error(packed["last"], theirs["last"]) < 1e-3
    assert (abs(packed["param_norms"] / theirs["param_norms"] - 1) < 10 * bounds).all()
    seen = np.concatenate([np.full(thinned(ours[k]), not unseen(k, fields)) for k in names])
    assert error(packed["param"][seen], theirs["param"][seen]) < 1e-3


def thinned(values):
    return -(-values.size // 11) if values.size > 300 else values.size


@pytest.mark.parametrize(("shortcut", "count"), [("none", 1_480_771), ("conv", 1_481_027)])
def test_has_the_published_parameters(shortcut, count):
    shapes = template(ContextUnet(shortcut=shortcut))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
    assert len(export_state_dict(zeros(shapes))) == 156 + 2 * (shortcut == "conv")


def test_no_shortcut_is_learned_where_channels_agree():
    params = template(ContextUnet((16, 16, 8), n_feat=8))["params"]
    assert set(params["init_conv"]) == {"conv1_0", "conv1_1", "conv2_0", "conv2_1"}


@pytest.mark.parametrize(
    "fields",
    [
        {"image_shape": (12, 20, 1), "n_cfeat": 1, "shortcut": "none"},
        {"image_shape": (32, 32, 3), "n_cfeat": 12, "norm": "group"},
    ],
    ids=str,
)
def test_absent_context_is_zero_and_one_time_serves_all(fields):
    network = ContextUnet(n_feat=8, **fields)
    variables = drawn(network)
    x = jax.random.normal(jax.random.key(1), (3, *network.image_shape))
    context = jnp.zeros((3, network.n_cfeat))

    def outputs(v, x):
        full = network.apply(v, x, jnp.full(3, 0.25), context)
        return full, network.apply(v, x, 0.25), network.apply(v, x, 0.25, context + 1)

    full, short, other = jit(outputs)(variables, x)
    assert full.shape == x.shape
    assert full.dtype == x.dtype
    np.testing.assert_allclose(short, full, rtol=1e-4, atol=1e-5)
    assert error(other, full) > 1e-3


def test_computes_in_bfloat16_with_parameters_in_float32():
    fields = {"n_feat": 8, "image_shape": (8, 8, 3)}
    variables = drawn(ContextUnet(**fields))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    half = jit(ContextUnet(**fields, dtype=jnp.bfloat16).apply)(variables, x, 0.5)
    assert half.dtype == x.dtype
    assert 1e-4 < error(half, jit(ContextUnet(**fields).apply)(variables, x, 0.5)) < 0.05
    shapes = template(ContextUnet(**fields, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_starts_as_pytorch_does():
    """Expect U(+-1/sqrt(fan_in)), where fan_in is the product of all but PyTorch's first axis."""
    state = export_state_dict(untrained(SMALL).variables)
    biases = []
    for name, weight in ((k, v) for k, v in state.items() if k.endswith("weight")):
        bias = state[name.replace("weight", "bias")]
        if weight.ndim == 1:
            assert (weight == 1).all()
            assert (bias == 0).all()
            continue
        bound = np.prod(weight.shape[1:]) ** -0.5
        assert abs(weight).max() <= bound
        assert abs(bias).max() <= bound
        biases.append(bias / bound)
        if weight.size > 500:
            assert weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.08)
            assert abs(weight.mean()) < 0.1 * bound
    assert np.concatenate(biases).std() == pytest.approx(1 / np.sqrt(3), rel=0.1)
    assert all((state[k] == 0).all() for k in state if k.endswith("running_mean"))
    assert all((state[k] == 1).all() for k in state if k.endswith("running_var"))


def test_batch_norm_keeps_the_unbiased_variance_and_its_precision():
    x = 100 + 0.01 * np.random.RandomState(0).standard_normal((3, 5, 5, 2)).astype(np.float32)
    flat = x.reshape(75, 2).astype(np.float64)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), jnp.asarray(x))
    y, updated = norm.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(75, 2), expected, atol=1e-2)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-6)
    var = 0.9 + 0.1 * flat.var(0, ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-6)


def test_group_norm_keeps_its_precision():
    x = 100 + 0.01 * np.random.RandomState(0).standard_normal((2, 5, 5, 16)).astype(np.float32)
    groups = x.reshape(2, 25, 8, 2).astype(np.float64)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    y, _ = GroupNorm().init_with_output(jax.random.key(0), jnp.asarray(x))
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(y, expected, atol=1e-2)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shards", [2, 8])
def test_batch_norm_over_devices_is_that_of_the_whole_batch(shards, kernels):
    x = jax.random.normal(jax.random.key(0), (16, 3, 3, 2)) * 3 + 1
    weight = jax.random.normal(jax.random.key(1), x.shape)
    variables = BatchNorm().init(jax.random.key(0), x)

    def loss(x, weight, axis_name=None):
        norm = BatchNorm(axis_name, kernels)
        y, updated = norm.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
        return (y * weight).sum(), (y, updated["batch_stats"])

    grad, (y, stats) = jax.grad(loss, has_aux=True)(x, weight)
    mapped = jax.pmap(
        jax.grad(partial(loss, axis_name="data"), has_aux=True),
        "data",
        devices=jax.devices()[:shards],
    )
    split = (shards, 16 // shards, 3, 3, 2)
    grads, (ys, many) = mapped(x.reshape(split), weight.reshape(split))
    np.testing.assert_allclose(ys.reshape(x.shape), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads.reshape(x.shape), grad, rtol=1e-4, atol=1e-5)
    for name, value in stats.items():
        np.testing.assert_allclose(many[name], np.stack([value] * shards), rtol=1e-5)


def test_gradient_over_devices_is_that_of_the_whole_batch():
    fields = {"n_feat": 8, "image_shape": (8, 8, 3)}
    variables = drawn(ContextUnet(**fields))
    x, t, context, target = (jnp.asarray(nhwc(a)) for a in draw_batch(8, batch=4, seed=11))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradient(variables, x, t, context, target, axis_name=None):
        network = ContextUnet(**fields, axis_name=axis_name)

        def loss(params):
            v = variables | {"params": params}
            output, stats = network.apply(v, x, t, context, train=True, mutable=["batch_stats"])
            return jnp.square(output - target).mean(), stats

        grad, stats = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": jax.lax.pmean(grad, axis_name) if axis_name else grad, **stats}

    mapped = jax.shard_map(
        partial(gradient, axis_name="data"),
        mesh=mesh,
        in_specs=(same, data, data, data, data),
        out_specs=same,
        check_vma=False,
    )
    one = export_state_dict(jit(gradient)(variables, x, t, context, target))
    two = export_state_dict(jit(mapped)(variables, x, t, context, target))
    for name, value in one.items():
        if not unseen(name, fields | {"norm": "batch"}) and value.ndim:
            assert error(two[name], value) < 1e-4, name


@pytest.mark.parametrize("size", [(6, 4), (7, 5)])
def test_max_pool_is_a_reduced_window(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    weight = jax.random.normal(jax.random.key(1), (2, 3, 2, 3))

    def window(x):
        size = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, size, size, "VALID")

    assert_same_with_gradient(max_pool, window, weight, x)


@pytest.mark.parametrize("size", [(2, 2), (5, 3)])
def test_conv_transpose_is_that_of_lax(size):
    layer = ConvTranspose(4, size)
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 3))
    params = layer.init(jax.random.key(1), x)["params"]
    weight = jax.random.normal(jax.random.key(2), (2, 3 * size[0], 2 * size[1], 4))

    def ours(x, params):
        return layer.apply({"params": params}, x)

    def reference(x, params):
        y = jax.lax.conv_transpose(x, params["kernel"], size, "VALID", transpose_kernel=True)
        return y + params["bias"].reshape(1, 1, 1, -1)

    assert_same_with_gradient(ours, reference, weight, x, params)


def assert_same_with_gradient(ours, reference, weight, *args):
    def with_gradient(fn):
        return jit(lambda args: (fn(*args), jax.grad(lambda a: jnp.vdot(fn(*a), weight))(args)))(
            args
        )

    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, with_gradient(ours), with_gradient(reference))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_shape": (16, 16, 0)}, "in_channels=0: give an integer from 1 up"),
        ({"n_feat": 12}, "n_feat=12: give a multiple of 8 from 8 up"),
        ({"n_feat": 0}, "n_feat=0: give a multiple of 8 from 8 up"),
        ({"n_cfeat": -1}, "n_cfeat=-1: give an integer from 1 up"),
        ({"image_shape": (18, 16, 3)}, f"height=18: give a multiple of 4 from 8 up{SIZE}"),
        ({"image_shape": (16, 4, 3)}, f"width=4: give a multiple of 4 from 8 up{SIZE}"),
    ],
    ids=str,
)
def test_refuses_bad_fields(fields, message):
    with pytest.raises(InputError) as caught:
        ContextUnet(**fields)
    assert str(caught.value) == message


class Toy(Network):
    """A network of the tests. The library, not the type checker, checks its fields."""

    norm: Literal["batch", "none"] = "batch"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "norm='layer': give one of batch, none"),
        ({"kernels": "slow"}, "kernels='slow': give one of fast, plain"),
        ({"image_shape": (16, 16)}, "image_shape=(16, 16): give height, width and channels"),
        ({"n_cfeat": "5"}, "n_cfeat='5': give an integer from 1 up"),
    ],
    ids=str,
)
def test_every_network_checks_its_fields(fields, message):
    with pytest.raises(InputError) as caught:
        Toy(**fields)
    assert str(caught.value) == message


def shaped(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("x", "t", "context", "message"),
    [
        (shaped(16, 16, 3), shaped(), None, r"x has shape \(16, 16, 3\): give \(batch, 16, 16, 3"),
        (shaped(2, 3, 16, 16), shaped(), None, r"x has shape .*: give \(batch, 16, 16, 3\)"),
        (shaped(2, 16, 16, 3, dtype=np.uint8), shaped(), None, "x is of uint8: give floats"),
        (shaped(2, 16, 16, 3), shaped(2, dtype=np.int32), None, "t is of int32: give floats"),
        (shaped(2, 16, 16, 3), shaped(3), None, r"t has shape \(3,\): give a scalar or \(2,\)"),
        (shaped(2, 16, 16, 3), shaped(2, 1), None, r"t has shape \(2, 1\)"),
        (shaped(2, 16, 16, 3), shaped(), shaped(5), r"context .* \(5,\): give \(2, 5\), or None"),
        (shaped(2, 16, 16, 3), shaped(), shaped(2, 4), r"context has shape \(2, 4\)"),
        (shaped(2, 16, 16, 3), shaped(), shaped(1, 5), r"context has shape \(1, 5\)"),
    ],
)
def test_refuses_bad_inputs_before_compilation(x, t, context, message):
    network = ContextUnet()
    with pytest.raises(InputError, match=message):
        jax.eval_shape(network.apply, template(network), x, t, context)
