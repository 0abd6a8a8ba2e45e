"""The configuration of a run: a spec for each component and a few numbers, stored as JSON.

The defaults are the course's hyperparameters. The help of each field becomes that of a flag.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_jax import data, networks, spec
from diffusion_jax.data import CLASS_NAMES, Dataset
from diffusion_jax.diffusion import losses, predictions, schedules
from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.training import Length, Task, augmentation, averages, optimizers
from diffusion_jax.typing import InputError, require

FEATURES = 1024  # the most features of a context
EPOCHS = 10**6  # the most epochs
REGISTRIES: dict[str, spec.Registry] = {
    "data": data.DATA,
    "network": networks.NETWORKS,
    "schedule": schedules.SCHEDULES,
    "prediction": predictions.PREDICTIONS,
    "loss": losses.LOSSES,
    "optimizer": optimizers.OPTIMIZERS,
    "ema": averages.AVERAGES,
    "augment": augmentation.AUGMENTATIONS,
}
# Parameters of components that are not options, because the caller fills them in.
SUPPLIED = {
    "network": networks.SUPPLIED,
    "optimizer": ("length",),
    "augment": ("class_names",),
}


def option(default: Any, help: str) -> Any:
    """Return a field with the text that --help shows."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """All that decides the outcome of a run. Checked when built: raise InputError if it is invalid.

    null_context is true if keep_probability is 0: every context vector is then zero. The last three
    fields come from the data: the shape of an image, the name of each number of a context vector,
    and the data's fingerprint. These four have no flag.
    """

    data: str = option("sprites", "the images and their labels")
    null_context: bool = False
    network: str = option("context_unet", "the network")
    schedule: str = option("course", "the noise schedule")
    prediction: str = option("eps", "what the network predicts")
    loss: str = option("mse", "the loss, how it weights noise levels, and how training draws them")
    optimizer: str = option("adam", "the optimizer and its learning rate")
    ema: str = option("none", "the moving average of the weights, which sampling then uses")
    augment: str = option("none", "the random changes to images in training")
    keep_probability: float = option(
        0.9, "the probability that training shows an image's context; 0 trains without contexts"
    )
    epochs: float = option(32, "the number of passes over all images, whole or not")
    batch_size: int = option(100, "the number of images in a training step, over all devices")
    seed: int = option(0, "the seed of the initial weights, the noise and the order of images")
    dtype: str = option(
        "float32",
        "the precision of the network in training: float32, bfloat16, or tf32, which is float32 "
        "with products rounded to TF32 on GPUs; weights and optimizer stay in float32",
    )
    image_shape: tuple[int, ...] = (16, 16, 3)
    class_names: tuple[str, ...] = CLASS_NAMES
    fingerprint: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise InputError naming the field that is invalid, or two that do not fit together."""
        for name, text in self.specs().items():
            object.__setattr__(self, name, text.full)
        if self.epochs == self.epochs // 1:
            object.__setattr__(self, "epochs", int(self.epochs))
        object.__setattr__(self, "null_context", self.null_context or not self.keep_probability)
        require(0 <= self.keep_probability <= 1, _bad(self, "keep_probability", "in [0, 1]"))
        require(0 < self.epochs <= EPOCHS, _bad(self, "epochs", f"above 0, and at most {EPOCHS}"))
        require(1 <= self.batch_size <= 2**16, _bad(self, "batch_size", "in 1..65536"))
        require(0 <= self.seed < 2**32, _bad(self, "seed", "in 0..2**32 - 1"))
        spec.choose(PRECISIONS, "dtype", self.dtype)
        three = len(self.image_shape) == 3
        require(three, _bad(self, "image_shape", "height, width and channels"))
        count = len(self.class_names)
        require(0 < count <= FEATURES, f"class_names: {count} of them: at most {FEATURES}")
        data.check_class_names(self.class_names)
        require(len(self.fingerprint) in (0, 4), f"fingerprint={self.fingerprint}: give four texts")
        schedule, prediction = self.build_schedule(), predictions.build(self.prediction)
        predictions.check(prediction, schedule)
        losses.build(self.loss).check(prediction, schedule)
        self.build_network()
        optimizers.build(self.optimizer, Length(1, 1, 1))
        averages.build(self.ema)
        if self.fingerprint or self.null_context or self.data.startswith("sprites"):
            self.build_augment()  # else the classes are not known yet

    def specs(self) -> dict[str, spec.Spec]:
        """Return the parsed spec of each component."""
        return {name: _parse(name, getattr(self, name)) for name in REGISTRIES}

    @property
    def n_cfeat(self) -> int:
        """The length of a context vector."""
        return len(self.class_names)

    def build_schedule(self) -> NoiseSchedule:
        """Return the noise schedule."""
        return schedules.build(self.schedule)

    def build_network(self) -> Any:
        """Return the network for the run's images and contexts."""
        return networks.build(self.network, image_shape=self.image_shape, n_cfeat=self.n_cfeat)

    def build_augment(self) -> augmentation.Augment:
        """Return the augmentation."""
        return augmentation.build(self.augment, () if self.null_context else self.class_names)

    def most_epochs(self, n_images: int) -> float:
        """Return the most epochs that a run on n_images images can have."""
        return min(EPOCHS, (2**31 - 1 - self.batch_size) / n_images)

    def length(self, n_images: int) -> Length:
        """Return the length of a run on n_images images."""
        return Length(n_images, self.batch_size, self.epochs)

    def task(self, length: Length) -> Task:
        """Return what a step of a run of some length trains."""
        return Task(
            self.build_network(),
            self.build_schedule(),
            predictions.build(self.prediction),
            losses.build(self.loss),
            optimizers.build(self.optimizer, length),
            averages.build(self.ema),
            self.build_augment(),
            self.keep_probability,
            self.seed,
            self.dtype,
        )

    def override(self, **values: Any) -> "Config":
        """Return the configuration with some fields replaced."""
        return dataclasses.replace(self, **values)

    def refine(self, **values: Any) -> "Config":
        """Return the configuration with some fields replaced, as override does.

        But a spec keeps the options of the spec that it replaces if both name one component: the
        optimizer adam:0.001 changes only the learning rate of adam:0.002:warmup=50.
        """
        for name, old in self.specs().items():
            if name in values and (new := _parse(name, values[name])).name == old.name:
                values[name] = new._replace(options=old.options | new.options).full
        return self.override(**values)

    def fill_in(self, dataset: Dataset) -> "Config":
        """Return the configuration with what the data decides.

        A run on images without labels is one without context.
        """
        count = len(dataset.images)
        fits = self.epochs <= self.most_epochs(count)
        require(fits, f"epochs={self.epochs}: too many for int32 step counters")
        steps = self.length(count).steps
        require(steps, f"epochs={self.epochs}: that is less than one step")
        return self.override(
            null_context=self.null_context or not dataset.labels.any(),
            image_shape=dataset.images.shape[1:],
            class_names=dataset.class_names,
            fingerprint=dataset.fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that is ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str) -> "Config":
        """Return the inverse of to_dict. Raise InputError naming source and what is wrong."""
        names = {field.name for field in dataclasses.fields(Config)}
        missing = ", ".join(sorted(names - values.keys()))
        require(not missing, f"{source} does not have fields {missing}")
        spec.check(Config, values, source)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        try:
            return Config(**fields)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def differences(self, other: "Config") -> list[str]:
        """Return lines "name: ours -> theirs" of the fields that differ, and one about the data.

        Data with the same fingerprint are equal, wherever they are stored.
        """
        mine, theirs = self.fingerprint, vars(other)
        skipped = {"fingerprint"}
        if mine and mine == other.fingerprint:
            parts = (each.specs()["data"].options.get("held_out") for each in (self, other))
            skipped |= {"data"} if len(set(parts)) == 1 else set()
        changed = data.changes(mine, other.fingerprint)
        return [f"data: {changed}"] * bool(changed) + [
            f"{name}: {value} -> {theirs[name]}"
            for name, value in vars(self).items()
            if value != theirs[name] and name not in skipped
        ]


def _parse(name: str, text: str) -> spec.Spec:
    return spec.parse(text, REGISTRIES[name], name, SUPPLIED.get(name, ()))


def _bad(config: Config, name: str, right: str) -> str:
    return f"{name}={getattr(config, name)}: it must be {right}"
