"""Every component is one function or class, and one line of its registry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import data, networks, samplers, spec
from diffusion_jax.data import Dataset, Source
from diffusion_jax.diffusion import grids, guidance, losses, predictions, schedules
from diffusion_jax.diffusion.predictions import X0
from diffusion_jax.networks import Network
from diffusion_jax.networks.layers import Conv
from diffusion_jax.runs import Config, load_model, metrics
from diffusion_jax.runs.config import REGISTRIES, SUPPLIED
from diffusion_jax.runs.trainer import train_run
from diffusion_jax.sampling import sample
from diffusion_jax.tableau import one_row_a_step
from diffusion_jax.training import augmentation, averages, optimizers
from diffusion_jax.training.averages import Average


def tiny_data(value: int = 64) -> Source:
    """Make images of one colour."""
    images = np.full((8, 8, 8, 1), value, np.uint8)
    return Source(Dataset(images, np.ones((8, 1), np.float32), ("only",)))


class TinyNetwork(Network):
    """A single convolution."""

    size: int = 3

    def setup(self) -> None:
        """Make the layer."""
        self.layer = Conv(self.image_shape[2], self.size)

    def __call__(self, x, t, context=None, train=False):
        """Convolve."""
        return self.layer(x)


def tiny_schedule(steps: int = 10) -> schedules.NoiseSchedule:
    """Return rectified flow under a new name."""
    return schedules.flow(steps)


class TinyPrediction(X0):
    """The clean image under a new name."""


def tiny_loss(power: int = 2) -> losses.Loss:
    """Raise the error to an even power."""
    return losses.Loss(lambda d: d**power, losses.simple, losses.uniform, "ddpm")


def tiny_optimizer(length: optimizers.Length, rate: float = 0.05) -> optimizers.Optimizer:
    """Descend along the gradient."""
    return optimizers.Optimizer(optax.scale(-1.0), lambda step: np.full(len(step), rate))


def tiny_average(half: bool = True) -> Average:
    """Average the new and the old weights equally."""
    return Average(lambda step: jnp.float32(0.5 if half else 1.0))


def tiny_augmentation(class_names, brighter: float = 0.0) -> augmentation.Augment:
    """Add a constant."""
    return lambda images, context, keys: images + brighter


def tiny_grid(schedule: schedules.NoiseSchedule, n: int, power: float = 1.0) -> grids.Grid:
    """Place levels evenly in a power of t."""
    return grids.at(schedule, schedule.steps * np.linspace(1, 0, n + 1) ** power)


def tiny_sampler(schedule: schedules.NoiseSchedule, grid: grids.Grid, part: float = 1.0):
    """Move a part of the way to the predicted image, and stop."""
    return one_row_a_step(grid, x=np.full(grid.steps, 1 - part), x0=np.full(grid.steps, part))


TINY = {
    "data": (data.DATA, tiny_data),
    "network": (networks.NETWORKS, TinyNetwork),
    "schedule": (schedules.SCHEDULES, tiny_schedule),
    "prediction": (predictions.PREDICTIONS, TinyPrediction),
    "loss": (losses.LOSSES, tiny_loss),
    "optimizer": (optimizers.OPTIMIZERS, tiny_optimizer),
    "ema": (averages.AVERAGES, tiny_average),
    "augment": (augmentation.AUGMENTATIONS, tiny_augmentation),
}


def test_a_new_component_of_every_kind_trains_and_samples(tmp_path, monkeypatch) -> None:
    assert TINY.keys() == REGISTRIES.keys()
    for registry, entry in (*TINY.values(), (samplers.SAMPLERS, tiny_sampler)):
        monkeypatch.setitem(registry, "tiny", entry)
    monkeypatch.setitem(grids.GRIDS, "tiny", tiny_grid)
    config = Config(**dict.fromkeys(TINY, "tiny"), batch_size=4, epochs=30)
    assert config.optimizer == "tiny:rate=0.05", "its options are in config.json"
    dataset = data.load("tiny:value=96")
    config = config.override(data="tiny:value=96").fill_in(dataset)
    train_run(tmp_path / "run", config, dataset, jax.devices()[:1], report=lambda text: None)
    found = [record["loss"] for record in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert found[-1] < found[0] / 2
    model = load_model(tmp_path / "run")
    tableau = samplers.build("tiny:3:part=0.5:grid=tiny:power=2", model.schedule)
    drawn = sample(model, tableau, 2, devices=jax.devices()[:1]).images
    assert drawn.shape == (2, 8, 8, 1)
    assert np.all(np.isfinite(drawn))


PARTS = [(losses.mse, losses.WEIGHTINGS), (losses.mse, losses.TIMES)]
PARTS += [(optimizers.adam, optimizers.DECAYS), (samplers.on_grid, grids.GRIDS)]
ALL = {
    **REGISTRIES,
    **{"sampler": samplers.SAMPLERS, "grid": grids.GRIDS, "weighting": losses.WEIGHTINGS},
    **{"times": losses.TIMES, "decay": optimizers.DECAYS},
    **{"guidance": guidance.GUIDANCES, "threshold": guidance.THRESHOLDS},
}


@pytest.mark.parametrize("name", ALL)
def test_every_entry_explains_itself(name: str) -> None:
    supplied = (*SUPPLIED.get(name, ()), "n", "x0")
    for entry, component in ALL[name].items():
        assert (getattr(component, "func", component).__doc__ or "").strip(), entry
        text = spec.parse(entry, ALL[name], name, supplied).full
        assert spec.parse(text, ALL[name], name, supplied).full == text


def test_no_option_of_a_part_is_hidden_by_one_of_its_owner() -> None:
    owners = {"loss": losses.LOSSES, "optimizer": optimizers.OPTIMIZERS}
    for owner in (*samplers.SAMPLERS.values(), *(o for r in owners.values() for o in r.values())):
        own = spec.parameters(owner, ("schedule", "grid", "length"))
        for _, registry in PARTS:
            for name, part in registry.items():
                inner = {k for k, v in spec.parameters(part).items() if v.default is not v.empty}
                assert not inner & own.keys(), f"{owner} hides {name}"
