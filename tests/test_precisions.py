"""Every precision gives outputs near those in float32, and all stored values are in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers, training
from diffusion_jax.networks.precisions import PRECISIONS, products_in
from diffusion_jax.sampling import sample
from diffusion_jax.training.optimizers import Length
from diffusion_jax.typing import InputError
from tests.models import TINY, untrained


@pytest.mark.parametrize(
    ("dtype", "name"), [("float32", "HIGHEST"), ("tf32", "[HIGH, HIGH]"), ("bfloat16", "DEFAULT")]
)
def test_products_carry_the_precision_that_they_are_traced_in(dtype: str, name: str) -> None:
    @products_in(dtype)
    def product(x):
        return x @ x

    text = jax.jit(product).lower(jnp.ones((2, 2), PRECISIONS[dtype].dtype)).as_text()
    assert name in text


def test_sampling_in_bfloat16_is_near_float32() -> None:
    model = untrained()
    tableau = samplers.build("ddim", model.schedule, 5)
    full, tf32, half = (
        sample(model, tableau, 2, dtype=name, devices=jax.devices()[:1]).images
        for name in ("float32", "tf32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert np.array_equal(full, tf32), "on a CPU there is no TF32"
    worst = np.abs(half - full).max() / np.abs(full).max()
    assert 1e-5 < worst < 0.05
    with pytest.raises(InputError, match="dtype='float16' is unknown: did you mean bfloat16"):
        sample(model, tableau, 2, dtype="float16")


def test_training_in_bfloat16_is_near_float32_and_keeps_float32() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 8, 8, 3), np.uint8)
    labels = np.eye(3, dtype=np.float32)[np.arange(8) % 3]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config, length = TINY.override(dtype=dtype), Length(8, 8, 3)
        task, device = config.task(length), jax.devices()[:1]
        *_, last = training.fit(
            task, length, images, labels, training.init(task), device, stops=(3,)
        )
        losses[dtype] = last.losses
        kinds = {leaf.dtype for leaf in jax.tree.leaves(last.state)}
        assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}
    worst = np.abs(losses["bfloat16"] / losses["float32"] - 1).max()
    assert 1e-6 < worst < 0.03
