"""The residual U-Net: its function, its sizes and options, training and sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers, training
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks import NETWORKS, Unet
from diffusion_jax.networks.layers import Conv
from diffusion_jax.networks.unet import ResidualBlock
from diffusion_jax.runs import Config
from diffusion_jax.sampling import sample
from diffusion_jax.training import Length
from diffusion_jax.typing import InputError
from tests.test_folding import random_variables
from tests.test_networks import SIZE, jit


class Tiny(Unet):
    """A U-Net of two levels, for images of 12 x 8."""

    image_shape: tuple[int, int, int] = (12, 8, 3)
    n_cfeat: int = 2
    n_feat: int = 8
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    heads: int = 2


RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 12, 8, 3)).astype(np.float32)
CONTEXT = np.eye(2, dtype=np.float32)


@pytest.mark.parametrize("fields", [{}, {"time": "fourier", "attention": (), "kernels": "plain"}])
def test_time_and_context_of_each_image(fields) -> None:
    network = Tiny(**fields)
    variables = random_variables(network)
    t = np.float32([0.25, 0.5])

    def outputs(variables, x, t, context):
        one = network.apply(variables, x, t[0], context)
        return one, network.apply(variables, x, t, context), network.apply(variables, x, t)

    one, each, without = jit(outputs)(variables, X, t, CONTEXT)
    assert one.shape == X.shape
    assert np.allclose(each[0], one[0], atol=1e-5)
    assert np.abs(each[1] - one[1]).max() > 1e-3
    assert np.abs(each - without).max() > 1e-3


def test_attention_is_that_of_its_paper() -> None:
    """Compute softmax(q k / sqrt(d)) v over all pixels plus the block without it, in NumPy."""
    x, emb = jnp.asarray(RNG.normal(size=(2, 3, 4, 8)), jnp.float32), jnp.ones((1, 32))
    block = ResidualBlock(8, 2, partial(Conv))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, emb)
    variables = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), x.dtype), shapes)
    params = {k: {n: np.float64(v) for n, v in p.items()} for k, p in variables["params"].items()}
    y = np.float64(jit(ResidualBlock(8, 0, partial(Conv)).apply)(variables, x, emb))
    groups = (y - y.mean((1, 2), keepdims=True)) / np.sqrt(y.var((1, 2), keepdims=True) + 1e-5)
    h = groups * params["GroupNorm_2"]["scale"] + params["GroupNorm_2"]["bias"]
    qkv = h @ params["Conv_2"]["kernel"][0, 0] + params["Conv_2"]["bias"]
    q, k, v = np.split(qkv.reshape(2, 12, 24), 3, axis=-1)
    mixed = np.empty_like(q)
    for head in (np.s_[..., :4], np.s_[..., 4:]):
        weights = np.exp(q[head] @ k[head].transpose(0, 2, 1) / 2)
        mixed[head] = weights / weights.sum(-1, keepdims=True) @ v[head]
    out = mixed @ params["Conv_3"]["kernel"][0, 0] + params["Conv_3"]["bias"]
    expected = y + out.reshape(y.shape)
    assert np.allclose(jit(block.apply)(variables, x, emb), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_shape": (12, 7, 3)}, f"width=7: give a multiple of 2 from 2 up{SIZE}"),
        ({"multipliers": (1, 2, 2, 4)}, f"height=12: give a multiple of 8 from 8 up{SIZE}"),
        ({"multipliers": ()}, "multipliers=(): give 1 to 8 of them"),
        ({"multipliers": (1, 0)}, "multipliers=0: give an integer from 1 up"),
        ({"attention": (0, 2)}, "attention=(0, 2): give levels from 0 to 1"),
        ({"n_feat": 12}, "n_feat=12: give a multiple of 8 from 8 up"),
        ({"heads": 3}, "n_feat=8: give a multiple of 3 from 3 up"),
        ({"blocks": 0}, "blocks=0: give an integer from 1 up"),
        ({"time": "spline"}, "time='spline': give one of sinusoidal, fourier"),
    ],
    ids=str,
)
def test_refuses_bad_fields(fields, message) -> None:
    with pytest.raises(InputError) as caught:
        Tiny(**fields)
    assert str(caught.value) == message


def test_a_registered_network_trains_and_samples_rectangles(monkeypatch) -> None:
    """Use grey images, light or dark by their context, which the samples must show."""
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    classes = np.arange(16) % 2
    images = np.where(classes[:, None, None, None], 191, 64).astype(np.uint8)
    images = np.broadcast_to(images, (16, 12, 8, 3))
    config = Config(
        network="tiny",
        image_shape=(12, 8, 3),
        class_names=("light", "dark"),
        prediction="x0",
        schedule="cosine:steps=50",
        optimizer="adam:3e-3",
        keep_probability=1.0,
    )
    length = Length(16, 8, 40)
    task = config.task(length)
    state = training.init(task)
    assert state.batch_stats == {}
    losses, device = [], jax.devices()[:1]
    for chunk in training.fit(task, length, images, CONTEXT[classes], state, device):
        state, losses = chunk.state, [*losses, *chunk.losses]
    targets = np.float32([64, 191]) / 127.5 - 1
    at_zero = np.square(targets).mean()  # the loss of a network whose last layer is zero
    assert losses[0] == pytest.approx(at_zero, rel=1e-5)
    network, schedule = task.network, task.schedule
    model = Model(network, {"params": state.params}, schedule, task.prediction, ("light", "dark"))
    assert network.for_sampling(model.variables) == (network, model.variables)
    tableau = samplers.build("ddim", schedule, 5)
    drawn = sample(model, tableau, 2, context=CONTEXT, devices=jax.devices()[:1]).images
    assert drawn.shape == (2, 12, 8, 3)
    assert np.allclose(drawn.mean((1, 2, 3)), targets, atol=0.1)
