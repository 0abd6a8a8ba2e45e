"""Flags shared by the apps: the configuration's fields as flags, and errors as one line."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from diffusion_jax import parallel
from diffusion_jax.config import Config
from diffusion_jax.typing import InputError, require
from experiments.presets import PRESETS

flags.disclaim_key_flags()  # the flags belong to the app that calls the functions below
FLAGS = flags.FLAGS
WORTH_KEEPING = 0.1  # seconds of compilation


def define_config() -> None:
    """Define --preset, and a flag for each field of the configuration that has a help text."""
    about = "; ".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
    flags.DEFINE_enum("preset", "notes", list(PRESETS), f"where the settings start from. {about}")
    for field in _fields():
        _define(field)


def config() -> Config:
    """The configuration that the flags describe. Raises InputError for what cannot be."""
    given = {field.name: FLAGS[field.name].value for field in _fields()}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    if "class_frequencies" in values:
        values["class_frequencies"] = _numbers("class_frequencies", values["class_frequencies"])
    return PRESETS[FLAGS.preset]().override(**values)


def define_devices() -> None:
    """Define --devices and --cpu_devices."""
    flags.DEFINE_integer("devices", None, "devices to use; by default as many as divide the batch")
    flags.DEFINE_integer(
        "cpu_devices", None, "CPU cores to use as devices, where there is no accelerator; all"
    )


def run(main: Callable[[], None]) -> None:
    """Run an app. What the user gave wrong ends it with one line and exit code 2."""

    _define_cache()

    def guarded(argv: Sequence[str]) -> None:
        try:
            if argv[1:]:
                raise InputError(f"{' '.join(argv[1:])!r} is no flag: flags are --name=value")
            if not FLAGS["verbosity"].present:
                logging.set_verbosity(logging.ERROR)  # orbax reports each of its steps
            parallel.use_cpu_cores(FLAGS["cpu_devices"].value)
            _use_cache(FLAGS["compilation_cache_dir"].value)
            main()
        except InputError as error:
            _stop(error)

    app.run(guarded, flags_parser=_parse)


def _define_cache() -> None:
    if "compilation_cache_dir" not in FLAGS:
        flags.DEFINE_string(
            "compilation_cache_dir",
            None,
            "where compiled programs are kept for the next time; empty: nowhere; by default "
            "JAX_COMPILATION_CACHE_DIR, or diffusion_jax in the user's cache folder",
        )


def _use_cache(folder: str | None) -> None:
    """Have JAX keep what it compiles; an environment variable of JAX's own goes before a default.

    Raises InputError where folder is a file.
    """
    if folder is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(caches) / "diffusion_jax")
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"compilation_cache_dir={folder!r} is a file: name a folder")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder or None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        _stop(error)
        raise


def _stop(error: Exception) -> None:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def options(words: Sequence[str]) -> dict[str, Any]:
    """Options as --options gives them: order=3 is a number, lower=true a truth, else a word."""
    return dict(_option(word) for word in words)


def _option(text: str) -> tuple[str, Any]:
    """An option's name and value: a number, true, false or a word."""
    name, equals, word = text.partition("=")
    require(name and equals and word, f"options={text}: write them as order=3,rule=exact")
    if word in ("true", "false"):
        return name, word == "true"
    for kind in (int, float):
        try:
            return name, kind(word)
        except ValueError:
            continue
    return name, word


def _fields() -> Iterator[dataclasses.Field]:
    for group in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config, group.name)):
            if "help" in field.metadata:
                yield field


def _define(field: dataclasses.Field) -> None:
    name, default, about = field.name, field.default, field.metadata["help"]
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if default != "":
        about = f"{about} (notes: {default})"
    if field.metadata["choices"]:
        flags.DEFINE_enum(name, None, list(field.metadata["choices"]), about)
    else:
        define: dict[type, Any] = {
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
            tuple: flags.DEFINE_list,
        }
        define[type(field.default)](name, None, about)


def _numbers(name: str, values: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except ValueError:
        raise InputError(f"{name}={','.join(values)}: it must be numbers") from None


def describe(devices: Sequence[jax.Device]) -> str:
    """Devices in words: "2 CPU cores", "1 NVIDIA H100"."""
    kind = "CPU cores" if devices[0].platform == "cpu" else devices[0].device_kind
    return f"{len(devices)} {kind}"
