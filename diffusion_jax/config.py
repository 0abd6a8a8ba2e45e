"""The configuration of a run: frozen dataclasses, checked when built, stored as JSON in the run.

The defaults are the course notes' hyperparameters. Each field's help becomes an absl flag.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float64
from numpy import ndarray

from diffusion_jax import augmentation, averages, losses, parameterizations, schedules
from diffusion_jax.averages import EMA_PROFILES
from diffusion_jax.data import UNKNOWN, Dataset, changes, check_class_names
from diffusion_jax.losses import NOISINGS, TIME_SAMPLINGS, WEIGHTINGS
from diffusion_jax.networks import NETWORKS, Network
from diffusion_jax.optimizers import LR_SCHEDULES
from diffusion_jax.parameterizations import PARAMETERIZATIONS
from diffusion_jax.precisions import PRECISIONS
from diffusion_jax.schedules import SCHEDULES, NoiseSchedule
from diffusion_jax.typing import InputError, choose

SMALLEST = 1e-12  # of the real numbers that training multiplies by


def at_least(name: str, value: float, least: float) -> None:
    """Raise InputError unless value >= least."""
    if not value >= least:
        raise InputError(f"{name}={value}: it must be at least {least}")


def at_most(name: str, value: float, most: float) -> None:
    """Raise InputError unless value <= most."""
    if not value <= most:
        raise InputError(f"{name}={value}: it must be at most {most}")


def option(default: Any, help: str, choices: Any = None) -> Any:
    """A field with the text that --help shows; choices: the names that it may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    images: str = option(
        "",
        "a .npy file of uint8 images (N, h, w, 3) or (N, h, w), or a folder with one subfolder of "
        "images for each class; empty: sprites, drawn by the library",
    )
    labels: str = option(
        "", "a .npy file of labels, (N, features) or (N,) class numbers; for --images=FILE.npy"
    )
    class_names: tuple[str, ...] = option((), "the classes' names, in the order of the labels")
    null_context: bool = option(False, "train without context: every context vector is zero")
    image_size: int = option(0, "scale the images of a folder to this height and width; 0: do not")
    held_out: float = option(
        0.0, "the part of --images that training does not see and evaluation measures against"
    )
    n_images: int = option(89_400, "how many sprites to draw")
    class_frequencies: tuple[float, ...] = option(
        (8000.0, 32400.0, 6000.0, 35000.0, 8000.0),
        "how often each class is drawn; by default as in the course's file",
    )
    data_seed: int = option(0, "the seed of the drawn sprites")
    fingerprint: tuple[str, ...] = ()  # of the data: see data.fingerprint

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        at_least("n_images", self.n_images, 1)
        at_most("n_images", self.n_images, 10**7)
        at_least("data_seed", self.data_seed, 0)
        at_least("image_size", self.image_size, 0)
        at_most("image_size", self.image_size, 1024)
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out={self.held_out}: it must be in [0, 1)")
        if len(self.class_names) > 1024:
            raise InputError(f"class_names: {len(self.class_names)} of them: at most 1024")
        check_class_names(self.class_names)
        if self.fingerprint not in ((), UNKNOWN) and len(self.fingerprint) != 4:
            raise InputError(f"fingerprint={self.fingerprint}: it must be four texts")
        if self.labels and not self.images:
            raise InputError(f"labels={self.labels!r} without images: give --images too")
        if len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"class_names={','.join(self.class_names)}: each must be another")


@dataclass(frozen=True)
class NetworkConfig:
    """The network. What the data decides is filled in from the data."""

    network: str = option("context_unet", "the network", NETWORKS)
    n_feat: int = option(64, "feature maps at full resolution; a multiple of 8")
    shortcut: str = option(
        "conv",
        "the residual shortcut where the channels change: a learned 1x1 convolution, or none, as "
        "in weights that the course published",
        ("conv", "none"),
    )
    norm: str = option("batch", "the normalisation in the convolution blocks", ("batch", "group"))
    image_shape: tuple[int, ...] = (16, 16, 3)
    n_cfeat: int = 5

    def __post_init__(self) -> None:
        """Raise InputError if the network does not take these options."""
        self.build()

    def build(self, **fields: Any) -> Network:
        """Return the network with the options that it has, and fields such as axis_name."""
        make = choose(NETWORKS, "network", self.network)
        names = {field.name for field in dataclasses.fields(make)} & self.__dict__.keys()
        return make(**{name: getattr(self, name) for name in names}, **fields)


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network learns of it."""

    schedule: str = option("notes", "the noise schedule", SCHEDULES)
    timesteps: int = option(500, "T, the number of steps of the noise schedule")
    beta_min: float = option(
        0.0, "the first beta of linear, notes or scaled_linear; 0: the schedule's own"
    )
    beta_max: float = option(0.0, "the last beta; 0: the schedule's own")
    parameterization: str = option("eps", "what the network predicts", PARAMETERIZATIONS)
    noising: str = option(
        "ddpm",
        "how training adds noise: ddpm (right), or notes: scaled by 1 - alpha_bar, a slip of the "
        "course",
        NOISINGS,
    )

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        choose(PARAMETERIZATIONS, "parameterization", self.parameterization)
        schedule = self.build()
        losses.check_noising(self.noising, schedule)
        parameterizations.check(self.parameterization, schedule)

    def build(self) -> NoiseSchedule:
        """The noise schedule."""
        betas = {"beta_min": self.beta_min, "beta_max": self.beta_max}
        given = {name: value for name, value in betas.items() if value}
        return schedules.build(self.schedule, self.timesteps, **given)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    epochs: int = option(32, "how often training visits every image")
    batch_size: int = option(100, "images in a step, over all devices")
    learning_rate: float = option(1e-3, "Adam's learning rate at the start")
    lr_schedule: str = option(
        "notes",
        "notes: falls linearly to 0, once an epoch; linear: the same in every step; constant; "
        "cosine",
        LR_SCHEDULES,
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    ema_decay: float = option(0.0, "decay of the moving average that is sampled from; 0: none")
    ema_profile: str = option(
        "exponential",
        "the moving average's weights: exponential, by ema_decay; or power, of the run so far, by "
        "ema_sigma_rel",
        EMA_PROFILES,
    )
    ema_sigma_rel: float = option(
        0.1, "width of the power average as a part of the run so far, up to 0.28"
    )
    ema_snapshots: int = option(
        0,
        "how often to store two power averages, of which experiments.ema makes others when the run "
        "is over; 0: never",
    )
    grad_clip: float = option(0.0, "largest norm of the gradient; 0: do not clip")
    keep_probability: float = option(0.9, "how often training shows an image's context")
    flips: tuple[str, ...] = option(
        augmentation.NONE,
        "which images training mirrors, left to right, every second time: none; all; or those of "
        "the classes named, such as hero,food, where others face one side",
    )
    loss_weighting: str = option(
        "simple", "how much each level of noise counts in the loss", WEIGHTINGS
    )
    weighting_gamma: float = option(
        0.0, "gamma of the weightings min_snr and p2; 0: as in the papers, 5 and 1"
    )
    time_sampling: str = option(
        "uniform",
        "how often training visits each level of noise: uniform, or EDM's lognormal in "
        "sigma / alpha",
        TIME_SAMPLINGS,
    )
    seed: int = option(0, "the seed of the initial weights, of the noise and of the order")
    dtype: str = option(
        "float32",
        "what the network computes in, in training; tf32: float32 with products rounded to TF32 "
        "on GPUs. Weights and optimizer are in float32",
        PRECISIONS,
    )

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        choose(LR_SCHEDULES, "lr_schedule", self.lr_schedule)
        choose(WEIGHTINGS, "loss_weighting", self.loss_weighting)
        choose(TIME_SAMPLINGS, "time_sampling", self.time_sampling)
        choose(PRECISIONS, "dtype", self.dtype)
        for name in ("epochs", "batch_size"):
            at_least(name, getattr(self, name), 1)
        choose(EMA_PROFILES, "ema_profile", self.ema_profile)
        averages.check(self.ema_sigma_rel, "ema_sigma_rel")
        for name in ("warmup_steps", "ema_snapshots", "grad_clip", "weighting_gamma", "seed"):
            at_least(name, getattr(self, name), 0)
        if self.seed >= 2**32:
            raise InputError(f"seed={self.seed}: it must be in 0..{2**32 - 1}")
        at_most("epochs", self.epochs, 10**6)
        at_most("batch_size", self.batch_size, 2**16)
        at_most("warmup_steps", self.warmup_steps, 2**31 - 1)
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate}: it must be above 0, and finite")
        for name in ("learning_rate", "grad_clip", "weighting_gamma"):
            if 0 < getattr(self, name) < SMALLEST:
                raise InputError(
                    f"{name}={getattr(self, name)}: so small, it changes nothing in float32; "
                    f"it must be at least {SMALLEST}"
                )
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay}: it must be in [0, 1)")
        if not 0 <= self.keep_probability <= 1:
            raise InputError(f"keep_probability={self.keep_probability}: it must be in [0, 1]")


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value from JSON has the type of a field: of floats, whole numbers will do."""
    if isinstance(default, tuple):
        of = default[0] if default else ""
        return isinstance(value, tuple) and all(_is_like(part, of) for part in value)
    if isinstance(default, float):
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is type(default)


@dataclass(frozen=True)
class Config:
    """All that decides the outcome of a run."""

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        """Raise InputError for groups that do not fit together."""
        self.loss_weights()
        augmentation.check(self.training.flips, self.data.class_names, self.data.null_context)

    def loss_weights(self) -> Float64[ndarray, "levels"]:
        """The weight of each level in the loss."""
        return losses.weights(
            self.training.loss_weighting,
            self.diffusion.parameterization,
            self.diffusion.build(),
            self.training.weighting_gamma,
        )

    def override(self, **values: Any) -> "Config":
        """The configuration with some fields of its groups set to other values."""
        groups = {}
        for group in dataclasses.fields(self):
            old = getattr(self, group.name)
            own = {field.name for field in dataclasses.fields(old)}
            groups[group.name] = dataclasses.replace(
                old, **{name: values.pop(name) for name in own & values.keys()}
            )
        if values:
            raise InputError(f"there is no option {', '.join(values)}")
        return Config(**groups)

    def fill_in(self, dataset: Dataset) -> "Config":
        """The configuration with what the data decides, and where it is, by absolute paths.

        Raises InputError if they do not fit.
        """
        seen = len(dataset.images) * self.training.epochs + self.training.batch_size
        if seen >= 2**31:
            raise InputError(f"epochs={self.training.epochs}: too many for int32 step counters")
        return self.override(
            image_shape=dataset.images.shape[1:],
            n_cfeat=dataset.labels.shape[1],
            class_names=dataset.class_names,
            fingerprint=dataset.fingerprint,
            images=self.data.images and os.path.abspath(self.data.images),
            labels=self.data.labels and os.path.abspath(self.data.labels),
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested dicts, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], source: str) -> "Config":
        """The inverse of to_dict. Fields that an earlier version did not have get their defaults.

        Raises InputError naming source and the fields that this version does not have.
        """
        groups = {}
        if surplus := values.keys() - {group.name for group in dataclasses.fields(Config)}:
            raise InputError(f"{source}: {', '.join(sorted(surplus))} are not this version's")
        for group in dataclasses.fields(Config):
            cls: Any = type(group.default)
            stored = values.get(group.name)
            if not isinstance(stored, dict):
                raise InputError(f"{source}: the fields of {group.name} are missing")
            if surplus := stored.keys() - {field.name for field in dataclasses.fields(cls)}:
                raise InputError(
                    f"{source}: the fields of {group.name} are not this version's: "
                    f"{', '.join(sorted(surplus))}"
                )
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            for name, value in fields.items():
                if not _is_like(value, getattr(group.default, name)):
                    kind = type(getattr(group.default, name)).__name__
                    raise InputError(f"{source}: {name}={value!r}: it must be of type {kind}")
            groups[group.name] = cls(**fields)
        config = Config(**groups)
        names, features = config.data.class_names, config.network.n_cfeat
        if names and len(names) != features:
            raise InputError(f"{source}: {len(names)} class_names for n_cfeat={features}")
        return config

    def differences(self, other: "Config") -> list[str]:
        """Lines "name: ours -> theirs" of the fields that differ, and how the data differ.

        The same data may be elsewhere.
        """
        theirs = other.to_dict()
        mine, yours = self.data.fingerprint, other.data.fingerprint
        passed = {"fingerprint", *(("images", "labels") if mine and mine == yours else ())}
        changed = changes(mine, yours)
        return [f"data: {changed}"] * bool(changed) + [
            f"{name}: {value!r} -> {theirs[group][name]!r}"
            for group, fields in self.to_dict().items()
            for name, value in fields.items()
            if value != theirs[group][name] and name not in passed
        ]
