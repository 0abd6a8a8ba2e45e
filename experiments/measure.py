"""What the benchmark measures of this library: its programs, samplers and training."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import parallel, samplers, training
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks.precisions import computing_in, products_in
from diffusion_jax.runs.config import Config
from diffusion_jax.sampling import sample
from diffusion_jax.tableau import XI, Tableau
from diffusion_jax.training import Length
from diffusion_jax.typing import InputError
from experiments import timing

Record = dict[str, Any]
STATES = 8  # batches that sampling holds beside a pass: the state, a prediction, registers
BATCHES = 8  # batches in the data set that training is timed on


class Setting(NamedTuple):
    """All that determines the program for sampling, which serves every sampler."""

    model: Model
    batch: int
    dtype: str
    devices: tuple[jax.Device, ...]

    def draw(self, tableau: Tableau, **options: Any) -> np.ndarray:
        """Sample a batch."""
        options |= {"devices": self.devices, "dtype": self.dtype}
        return sample(self.model, tableau, self.batch, **options).images

    @property
    def words(self) -> Record:
        """Return the columns of the setting in a table."""
        return {"batch": self.batch, "dtype": self.dtype, "devices": len(self.devices)}


class Bare:
    """Forward passes of a setting's network, compiled without a loop, as a limit for loops."""

    def __init__(self, setting: Setting) -> None:
        """Compile from shapes. Raise InputError if the memory does not suffice."""
        network, count = computing_in(setting.model.network, setting.dtype), len(setting.devices)
        forward = products_in(setting.dtype)(network.apply)
        shape = (count, setting.batch // count, *network.image_shape)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        context = jax.ShapeDtypeStruct((*shape[:2], network.n_cfeat), jnp.float32)
        part = jax.tree.map(lambda whole: whole.update(shape=whole.shape[1:]), (x, context))
        counted = timing.flop(forward, setting.model.variables, part[0], 0.5, part[1])
        self.flop = count * counted  # for the whole batch
        apply = parallel.data_parallel(forward, (None, 0, None, 0), 0, devices=setting.devices)
        lowered = apply.lower(setting.model.variables, x, np.float32(0.5), context)
        self.compiled = lowered.compile()
        check_memory(setting, timing.memory(self.compiled) + STATES * 4 * x.size // count)
        noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        zeros = np.zeros(context.shape, np.float32)
        shared = parallel.replicate((setting.model.variables, np.float32(0.5)), setting.devices)
        parts = parallel.scatter((noise, zeros), setting.devices)
        self.args = shared[0], parts[0], shared[1], parts[1]

    def run(self, passes: int) -> Any:
        """Run a number of passes, one after the other."""
        return [self.compiled(*self.args) for _ in range(passes)]


def check_memory(setting: Setting, needed: int) -> None:
    """Raise InputError if each device has fewer free bytes than needed."""
    device = setting.devices[0]
    free = timing.available_memory(device)
    needed *= len(setting.devices) if device.platform == "cpu" else 1  # cores share the memory
    if free is not None and needed > free:
        raise InputError(
            f"batches={setting.batch} needs about {needed / 2**30:.1f} GiB of memory of the "
            f"{free / 2**30:.1f} that are free: take up to {setting.batch * free // needed} images"
        )


def program_row(name: str, words: Record, found: Record, flop: float) -> Record:
    """Return a program as a row of a table. found: from timing.first_run."""
    counts = ", ".join(f"{n} {kind}" for kind, n in found["collectives"].items())
    return {"program": name, **words} | {
        "first call, s": found["cold"]["seconds"],
        "of it XLA, s": found["cold"]["xla_seconds"],
        "from cache, s": found.get("cached"),
        "GFLOP a pass or step": flop / 1e9,
        "MiB a device": found["memory_bytes"] / 2**20,
        "collectives": counts or "none",
    }


def compile_program(setting: Setting) -> Record:
    """Return the cost of the setting's sampling program before its first row, cold and cached."""
    run = partial(setting.draw, samplers.build("ddim", setting.model.schedule, 1), rows=0)
    with timing.empty_cache():
        jax.clear_caches()
        record = timing.first_run(run, setting.devices[0])
        jax.clear_caches()
        return record | {"cached": timing.first_run(run, setting.devices[0])["cold"]["seconds"]}


def solver_errors(setting: Setting, tableaus: Mapping[str, Tableau]) -> dict[str, float | None]:
    """Return the relative distance of each sampler's images from a fine solution's.

    Both start from the same noise. The fine solution is Heun's method at every step of the
    schedule. Samplers that add noise get None.
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
    """Training steps of a configuration on random images, with many steps in a dispatch."""

    def __init__(self, config: Config, devices: Sequence[jax.Device]) -> None:
        """Compile the steps, and record how long it takes."""
        batch, count, rng = config.batch_size, len(devices), np.random.default_rng(0)
        n = BATCHES * batch
        task = config.task(Length(n, batch, 1000))
        images = rng.integers(0, 256, (n, *config.image_shape), np.uint8)
        labels = np.eye(config.n_cfeat, dtype=np.float32)[rng.integers(0, config.n_cfeat, n)]
        state = training.init(task)
        places = np.arange(training.CHUNK * batch, dtype=np.int32) % n
        self.order = places.reshape(training.CHUNK, count, -1).swapaxes(0, 1).copy()
        first = self.order[:, 0]
        axes = (None, 0, 0, 0, None, None), (None, None)
        step = parallel.data_parallel(training.train_step(task), *axes, devices=devices)
        key = jax.eval_shape(lambda: jax.random.key(0))
        one = images[first], labels[first], first, key, np.float32(1e-3)
        self.flop = count * timing.flop(step, state, *one)
        self.state, *self.dataset = parallel.replicate((state, images, labels), devices)
        self.chunk = training.train_chunk(task, devices)
        with timing.empty_cache():
            self.record = timing.first_run(partial(self.run, 0), devices[0])

    def run(self, steps: int) -> Any:
        """Take a number of further steps."""
        rates = np.full(training.CHUNK, 1e-3, np.float32)
        given = self.order, rates, np.int32(steps), np.uint32(0)
        self.state, scalars = self.chunk(self.state, *self.dataset, *given)
        return scalars
