"""What the benchmark measures of this library: programs, samplers and training."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from diffusion_jax import hardware, parallel, samplers, timing, training
from diffusion_jax.config import Config
from diffusion_jax.optimizers import Length
from diffusion_jax.precisions import computing_in, products_in
from diffusion_jax.runs import Model
from diffusion_jax.samplers.tableau import XI, Tableau
from diffusion_jax.sampling import sample
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.typing import InputError, choose, require
from experiments.flags import options

STATES = 8  # images that sampling holds beside a network pass: the state, a prediction, registers
SWEEP = (1, 2, 3, 10, 25, 50, 100, 333, 500, 1000)
BATCHES = 8  # of training images, in the data set that training is timed on


class Setting(NamedTuple):
    """What decides which program runs: everything but the sampler and its steps."""

    model: Model
    batch: int
    dtype: str
    devices: tuple[jax.Device, ...]

    def draw(self, tableau: Tableau, **options: Any) -> np.ndarray:
        """Sample a batch."""
        options |= {"devices": self.devices, "dtype": self.dtype}
        return sample(self.model, tableau, self.batch, **options).images

    @property
    def words(self) -> dict[str, Any]:
        """The setting as a table shows it."""
        return {"batch": self.batch, "dtype": self.dtype, "devices": len(self.devices)}


def parse_case(word: str, schedule: NoiseSchedule) -> Tableau:
    """The tableau of name:steps, or name:steps:option=value:... with options, the grid one of them.

    Raises InputError for what cannot be.
    """
    name, _, others = word.partition(":")
    steps, *words = others.split(":")
    choose(samplers.SAMPLERS, "samplers", name)
    require(steps.isdecimal(), f"samplers={word}: write each as ddim:25, a name and its steps")
    grid = [each.removeprefix("grid=") for each in words if each.startswith("grid=")]
    given = options([each for each in words if not each.startswith("grid=")])
    return samplers.build(name, schedule, int(steps), *grid[-1:], **given)


class Bare:
    """Forward passes of a setting's network, compiled by themselves: what a loop can reach."""

    def __init__(self, setting: Setting) -> None:
        """Compile from shapes alone. Raises InputError if the memory does not suffice."""
        network, count = computing_in(setting.model.network, setting.dtype), len(setting.devices)
        forward = products_in(setting.dtype)(network.apply)
        shape = (count, setting.batch // count, *network.image_shape)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        context = jax.ShapeDtypeStruct((*shape[:2], network.n_cfeat), jnp.float32)
        part = jax.tree.map(lambda whole: whole.update(shape=whole.shape[1:]), (x, context))
        counted = hardware.flop(forward, setting.model.variables, part[0], 0.5, part[1])
        self.flop = count * counted  # of the whole batch
        apply = parallel.data_parallel(forward, (None, 0, None, 0), 0, devices=setting.devices)
        lowered = apply.lower(setting.model.variables, x, np.float32(0.5), context)
        self.compiled = lowered.compile()
        check_memory(setting, hardware.memory(self.compiled) + STATES * 4 * x.size // count)
        noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        zeros = np.zeros(context.shape, np.float32)
        shared = parallel.replicate((setting.model.variables, np.float32(0.5)), setting.devices)
        parts = parallel.scatter((noise, zeros), setting.devices)
        self.args = shared[0], parts[0], shared[1], parts[1]

    def run(self, passes: int) -> Any:
        """Run so many passes, one after the other."""
        return [self.compiled(*self.args) for _ in range(passes)]


def check_memory(setting: Setting, needed: int) -> None:
    """Raise InputError if so many bytes on each device are more than what is free."""
    device = setting.devices[0]
    free = hardware.available_memory(device)
    needed *= len(setting.devices) if device.platform == "cpu" else 1  # cores share the memory
    if free is not None and needed > free:
        raise InputError(
            f"batches={setting.batch} needs about {needed / 2**30:.1f} GiB of memory of the "
            f"{free / 2**30:.1f} that are free: take up to {setting.batch * free // needed} images"
        )


@contextmanager
def empty_cache() -> Iterator[None]:
    """Within, compiled programs go to a persistent cache of its own, which starts empty."""
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old = {name: getattr(jax.config, name) for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        settings["jax_compilation_cache_dir"] = folder
        try:
            _configure(settings)
            yield
        finally:
            _configure(old)


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_program(setting: Setting) -> dict[str, Any]:
    """What the setting's sampling program costs before its first row, cold and from the cache."""
    tableau = samplers.build("ddim", setting.model.schedule, 1)
    record: dict[str, Any] = {}
    with empty_cache():
        for state in ("cold", "cached"):
            jax.clear_caches()
            with timing.counting() as compilations, hardware.programs(setting.devices[0]) as found:
                seconds = timing.seconds_of(lambda: setting.draw(tableau, rows=0))
            record[state] = {"seconds": seconds, "xla_seconds": compilations.seconds}
    largest = max(found, key=lambda program: program.memory)
    stats = setting.devices[0].memory_stats() or {}
    return record | {
        "memory_bytes": largest.memory,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "collectives": largest.collectives,
    }


def count_sweep(setting: Setting, steps: Sequence[int] = SWEEP) -> dict[str, Any]:
    """How many programs all samplers at many numbers of steps compile, from none."""
    jax.clear_caches()
    steps = [n for n in steps if n <= setting.model.schedule.steps]
    with timing.counting() as compilations:
        for name in samplers.SAMPLERS:
            for n in steps:
                setting.draw(samplers.build(name, setting.model.schedule, n), rows=0)
    return {
        "samplers": list(samplers.SAMPLERS),
        "steps": steps,
        "runs": len(steps) * len(samplers.SAMPLERS),
        "compilations": compilations.count,
    }


def solver_errors(setting: Setting, tableaus: Mapping[str, Tableau]) -> dict[str, float | None]:
    """The relative distance of each sampler's images to those of a fine solution from one noise.

    The reference is Heun's method at every step of the schedule. None for samplers with noise.
    """
    schedule = setting.model.schedule
    reference = setting.draw(samplers.build("heun", schedule, schedule.steps))
    return {
        name: None
        if np.any(tableau.mix[..., XI])
        else float(np.linalg.norm(setting.draw(tableau) - reference) / np.linalg.norm(reference))
        for name, tableau in tableaus.items()
    }


class Trainer:
    """Training steps of a configuration on random images, many in a dispatch."""

    def __init__(self, config: Config, batch: int, devices: Sequence[jax.Device]) -> None:
        """Compile, and tell the seconds that it takes."""
        self.config = config.override(batch_size=batch)
        network = self.config.network
        rng = np.random.default_rng(0)
        self.n = BATCHES * batch
        shape = (self.n, *network.image_shape)
        images = rng.integers(0, 256, shape, np.uint8)
        labels = np.eye(network.n_cfeat, dtype=np.float32)[rng.integers(0, network.n_cfeat, self.n)]
        length = Length(self.n, batch, 1000)
        state = training.init(self.config, length)
        self.state, *self.dataset = parallel.replicate((state, images, labels), devices)
        places = np.arange(training.CHUNK * batch) % self.n
        order = np.array_split(places.reshape(training.CHUNK, batch), len(devices), axis=1)
        self.order = np.stack(order).astype(np.int32)
        self.chunk = training.train_chunk(self.config, length, devices, "pmap")
        self.flop = self._flop(length, devices)
        begin = time.perf_counter()
        counting = timing.counting()
        with empty_cache(), counting as compilations, hardware.programs(devices[0]) as found:
            self.run(0)
        self.seconds, self.xla_seconds = time.perf_counter() - begin, compilations.seconds
        self.program = max(found, key=lambda program: program.memory)

    def _flop(self, length: Length, devices: Sequence[jax.Device]) -> float:
        """The FLOP of a step, over all devices."""
        count = len(devices)
        step = parallel.data_parallel(
            training.train_step(self.config, length),
            (None, 0, 0, 0, None),
            (None, None),
            devices=devices,
        )
        first = self.order[:, 0]
        images, labels = (np.asarray(part) for part in self.dataset)
        key = jax.eval_shape(lambda: jax.random.key(0))
        counted = hardware.flop(step, self.state, images[first], labels[first], first, key)
        return count * counted

    def record(self) -> dict[str, Any]:
        """What the program costs before its first step, and what it needs."""
        return {
            "batch": self.config.training.batch_size,
            "dtype": self.config.training.dtype,
            "devices": len(self.order),
            "cold": {"seconds": self.seconds, "xla_seconds": self.xla_seconds},
            "flop_per_pass": self.flop,
            "memory_bytes": self.program.memory,
            "collectives": self.program.collectives,
        }

    def run(self, steps: int) -> Any:
        """Train on, so many steps."""
        self.state, losses = self.chunk(self.state, *self.dataset, self.order, np.int32(steps))
        return losses
