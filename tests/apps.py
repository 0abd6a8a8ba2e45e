"""Run an app's main function in the test's own process."""

import contextlib
import copy
import importlib
import io
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from diffusion_jax import training
from diffusion_jax.runs.config import Config
from diffusion_jax.training import loop
from experiments.app import Args


def call(app: str, *argv: str) -> None:
    """Run experiments.APP with these flags, without the flags that other modules defined.

    Errors are raised, not printed. The app sees all devices of the process.
    """
    others, module = _take_away(), f"experiments.{app}"
    before = sys.modules.pop(module, None)
    try:
        main = importlib.import_module(module).main
        flags.FLAGS([app, *argv])
        main(Args(flags.FLAGS))
    finally:
        _take_away()
        sys.modules.pop(module, None)
        if before is not None:
            sys.modules[module] = before
        for owner, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(owner, flag)


def _take_away() -> list[tuple[str, flags.Flag]]:
    """Unregister the flags of the apps, and return them with their modules."""
    modules = flags.FLAGS.flags_by_module_dict().items()
    taken = [(m, flag) for m, of in modules if m.startswith("experiments") for flag in of]
    for _, flag in taken:
        delattr(flags.FLAGS, flag.name)
    return taken


def output_of(app: str, *argv: str) -> str:
    """Run an app as call does, and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call(app, *argv)
    return out.getvalue()


def once(make: Callable) -> Callable:
    """Cache the results of make, keyed by the text of its arguments."""
    made: dict[str, Any] = {}

    def made_before(*args: Any) -> Any:
        key = repr(args)
        if key not in made:
            made[key] = make(*args)
        return made[key]

    return made_before


def copied(config: Config, **fields: Any) -> Config:
    """Return a configuration with some fields replaced, without checks."""
    copy_of = copy.copy(config)
    vars(copy_of).update(fields)
    return copy_of


def compile_once() -> pytest.MonkeyPatch:
    """Make training initialise and compile once for each configuration, until undone."""
    patch, initial, task = pytest.MonkeyPatch(), once(training.init), once(Config.task)
    other = {"data": "unknown", "fingerprint": ()}  # the program does not depend on these
    patch.setattr(Config, "task", lambda self, length: task(copied(self, **other), length))
    patch.setattr("diffusion_jax.training.loop.train_chunk", once(loop.train_chunk))
    patch.setattr(training, "init", lambda task: jax.tree.map(jnp.copy, initial(task)))
    return patch
