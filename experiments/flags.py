"""Flags shared by the apps: the configuration's fields as flags, and errors as one line."""

import dataclasses
import inspect
import math
import os
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from diffusion_jax import parallel, samplers
from diffusion_jax.config import Config
from diffusion_jax.contexts import parse as parse_contexts
from diffusion_jax.denoisers import THRESHOLDS, Guidance, check_guidance
from diffusion_jax.grids import GRIDS
from diffusion_jax.locks import check_writable
from diffusion_jax.runs import load_model
from diffusion_jax.samplers import SAMPLERS, Tableau
from diffusion_jax.schedules import SCHEDULES, NoiseSchedule
from diffusion_jax.typing import InputError, RunWarning, require
from experiments.presets import PRESETS
from experiments.terminal import outputs

flags.disclaim_key_flags()  # the flags belong to the app that calls the functions below
FLAGS = flags.FLAGS
SHIPPED = "checkpoints/sprites"  # the model that comes with the project
WORTH_KEEPING = 0.1  # seconds of compilation
LONGEST_NAME = 120  # characters of the name of a file or a folder
GUIDANCE = (
    *("guidance", "guidance_interval", "guidance_rescale", "cfg_plus_plus"),
    *("autoguidance", "autoguidance_step"),
)
FIELDS = [  # of the configuration, those that are flags
    field
    for group in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config, group.name))
    if "help" in field.metadata
]
CONFIG = ("preset", *(field.name for field in FIELDS))  # the flags of define_config
STEPS = {"ddpm": 500, "sa_solver": 10}  # by default, where it is not 25


def define_config() -> None:
    """Define --preset, and a flag for each field of the configuration that has a help text."""
    about = "; ".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
    flags.DEFINE_enum("preset", "notes", list(PRESETS), f"where the settings start from. {about}")
    for field in FIELDS:
        _define(field)


def config() -> Config:
    """The configuration that the flags describe. Raises InputError for what cannot be."""
    given = {field.name: FLAGS[field.name].value for field in FIELDS}
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    if "class_frequencies" in values:
        values["class_frequencies"] = tuple(numbers("class_frequencies"))
    chosen = PRESETS[FLAGS.preset]().override(**values)
    _refuse_unread_fields(chosen)
    return chosen


def _refuse_unread_fields(chosen: Config) -> None:
    """Raise InputError for a flag that the rest of the configuration leaves without effect."""
    training, schedule = chosen.training, chosen.diffusion.schedule
    betas = {"beta_min", "beta_max"} - inspect.signature(SCHEDULES[schedule]).parameters.keys()
    refuse_unread(f"--schedule={schedule}", *sorted(betas))
    power = training.ema_profile == "power"
    unread = "ema_decay" if power else "ema_sigma_rel"
    refuse_unread(f"--ema_profile={training.ema_profile}", unread)
    if chosen.data.null_context:
        refuse_unread("--null_context", "keep_probability")
    if chosen.data.images:
        refuse_unread("a run on --images", "n_images", "data_seed", "class_frequencies")


def refuse_unread(where: str, *names: str) -> None:
    """Raise InputError if the command line has one of the flags, which `where` does not read."""
    for name in names:
        require(not FLAGS[name].present, f"{name}: {where} does not read it: leave it out")


def variant(name: str, *flags_: str) -> str:
    """A name for results, with the flags that differ from their defaults: ddim-25-seed=3.

    Characters that are awkward in a file's name become _; a checksum then keeps names distinct.
    """
    given = [
        (flag, FLAGS[flag].value) for flag in flags_ if FLAGS[flag].value != FLAGS[flag].default
    ]
    words = [f"{flag}={','.join(v) if isinstance(v, list) else v}" for flag, v in given]
    whole = "-".join([name, *words])
    plain = re.sub(r"[^\w.,=+-]+", "_", whole, flags=re.ASCII)[:LONGEST_NAME]
    return plain if plain == whole else f"{plain}-{zlib.crc32(whole.encode(errors='replace')):08x}"


def finite_grid(schedule: NoiseSchedule) -> str:
    """The grid that is even in log-SNR, or trailing where the last level is noise alone."""
    return "uniform_logsnr" if np.isfinite(schedule.ratio[-1]) else "trailing"


def define_run() -> None:
    """Define --run and --step, of the model to use."""
    flags.DEFINE_string("run", SHIPPED, "the run folder; by default the project's own model")
    flags.DEFINE_integer("step", None, "the checkpoint; by default the newest")


def define_devices() -> None:
    """Define --devices and --cpu_devices."""
    flags.DEFINE_integer("devices", None, "devices to use; by default as many as divide the batch")
    flags.DEFINE_integer(
        "cpu_devices", None, "CPU cores to use as devices, where there is no accelerator; all"
    )


def define_sampler(
    sampler: str = "sa_solver",
    steps: str = "500 for ddpm, 10 for sa_solver, 25 for others",
    grid: str | None = "trailing",
) -> None:
    """Define --sampler, --steps, --grid and --options; steps: words for how many by default.

    The default has the best samples of at most 10 evaluations: see docs/quality.md.
    """
    flags.DEFINE_enum("sampler", sampler, list(SAMPLERS), "the sampler")
    flags.DEFINE_integer("steps", None, f"sampling steps; by default {steps}")
    flags.DEFINE_enum("grid", grid, list(GRIDS), "which levels the steps visit")
    flags.DEFINE_list("options", [], "options of the sampler or the grid: order=3,rho=5")


def tableau(
    schedule: NoiseSchedule, sampler: str, steps: int | None, **more: Any
) -> tuple[str, Tableau]:
    """A sampler's label and its table on --grid, with --options and more of them.

    steps: None is the sampler's default. Raises InputError for what cannot be.
    """
    if steps is None:
        steps = min(STEPS.get(sampler, 25), schedule.steps)
    given = {**options(FLAGS.options), **more}
    return f"{sampler}-{steps}", samplers.build(sampler, schedule, steps, FLAGS.grid, **given)


def define_guidance() -> None:
    """Define the flags of what wraps the network: guidance and thresholding."""
    flags.DEFINE_float("guidance", None, "scale of guidance: 1 is none, above 1 exaggerates")
    flags.DEFINE_list(
        "guidance_interval", None, "guide only where LOW < sigma / alpha <= HIGH, such as 0.3,5"
    )
    flags.DEFINE_float(
        "guidance_rescale", 0.0, "from 0 to 1: bring the contrast of guided outputs back"
    )
    flags.DEFINE_boolean("cfg_plus_plus", False, "CFG++: noise without guidance; --guidance 0 to 1")
    flags.DEFINE_string(
        "autoguidance", None, "a worse run to guide away from, in place of the lack of context"
    )
    flags.DEFINE_integer("autoguidance_step", None, "its checkpoint; by default the newest")
    flags.DEFINE_enum("threshold", "none", list(THRESHOLDS), "how predictions are kept in [-1, 1]")


def guidance(settings: Config) -> dict[str, Any]:
    """What those flags say, as arguments of sample. Raises InputError for what cannot be."""
    if FLAGS.guidance is None:
        for name in GUIDANCE[1:]:
            require(not FLAGS[name].present, f"{name} needs --guidance, its scale")
        return {"threshold": FLAGS.threshold}
    if not FLAGS.autoguidance:
        refuse_unread("guidance without --autoguidance", "autoguidance_step")
    without = settings.data.null_context or settings.training.keep_probability in (0, 1)
    require(
        FLAGS.autoguidance or not without,
        f"guidance={FLAGS.guidance}: this run was trained only with or only without context; "
        "guidance needs both, or --autoguidance",
    )
    bounds = tuple(numbers("guidance_interval")) or (0.0, math.inf)
    require(len(bounds) == 2, f"guidance_interval={bounds}: it must be two numbers, LOW,HIGH")
    low, high = bounds
    chosen = Guidance(FLAGS.guidance, low, high, FLAGS.guidance_rescale, FLAGS.cfg_plus_plus)
    worse = None
    if FLAGS.autoguidance:
        worse = load_model(FLAGS.autoguidance, FLAGS.autoguidance_step)
    return {"guidance": check_guidance(chosen), "worse": worse, "threshold": FLAGS.threshold}


def contexts(settings: Config) -> np.ndarray:
    """The vectors of --context. Raises InputError for what this run cannot take."""
    require(
        not settings.data.null_context,
        f"context={FLAGS.context!r}: this run was trained without context",
    )
    return parse_contexts(FLAGS.context, settings.data.class_names)


def define_processes() -> None:
    """Define --coordinator, --num_processes and --process_id."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "for a job of several processes: HOST:PORT of process 0, or auto, to find it and the "
        "numbers from Slurm, Open MPI, Kubernetes or the TPU pod",
    )
    flags.DEFINE_integer("num_processes", None, "how many processes the job has")
    flags.DEFINE_integer("process_id", None, "the number of this process, from 0")


def run(main: Callable[[], None]) -> None:
    """Run an app. What the user gave wrong ends it with one line and exit code 2.

    So does what the system refuses: permissions, a full disk, a file where a folder should be.
    """

    _define_cache()

    def guarded(argv: Sequence[str]) -> None:
        try:
            if argv[1:]:
                raise InputError(f"{' '.join(argv[1:])!r} is no flag: flags are --name=value")
            if not FLAGS["verbosity"].present:
                logging.set_verbosity(logging.FATAL)  # orbax reports each of its steps
            warnings.showwarning = _show(warnings.showwarning)
            sys.unraisablehook = _raise_no_late_writes(sys.unraisablehook)
            jax.config.update("jax_enable_x64", False)  # JAX_ENABLE_X64 would change results
            parallel.use_cpu_cores(FLAGS["cpu_devices"].value)
            _use_cache(FLAGS["compilation_cache_dir"].value)
            if "coordinator" in FLAGS and _is_job():
                _run_job(main)
            else:
                main()
        except InputError as error:
            _stop(error)
        except OSError as error:
            if error.errno is None:  # it is not the system's
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            _stop(f"{where}{error.strerror}")
        except KeyboardInterrupt:
            sys.exit(130)

    with outputs(sys.stdout, sys.stderr):
        app.run(guarded, flags_parser=_parse)


def _is_job() -> bool:
    """Whether the flags ask for a job of several processes."""
    given = [name for name in ("num_processes", "process_id") if FLAGS[name].value is not None]
    if given and not FLAGS.coordinator:
        raise InputError(f"{given[0]}={FLAGS[given[0]].value}: give --coordinator too")
    return bool(FLAGS.coordinator)


def _run_job(main: Callable[[], None]) -> None:
    """Run main in one process of several. One that fails leaves at once, which ends the others."""
    about = (
        f"waiting for all processes, at most {parallel.START} s: coordinator={FLAGS.coordinator}"
    )
    print(about, file=sys.stderr, flush=True)
    parallel.start_processes(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    try:
        main()
        parallel.wait_for_all()
    except (InputError, SystemExit):
        raise
    except BaseException as error:
        if not (isinstance(error, OSError) and error.errno):  # the system's tell all in one line
            traceback.print_exc()
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"error: this process of {jax.process_count()} stops, as it failed or another one "
            f"was lost: {what}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the others


def say(text: str) -> None:
    """Print, in the first process of a job."""
    if parallel.is_first():
        print(text, flush=True)


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
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(caches):  # else there is no home
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


def _show(others: Callable) -> Callable:
    """How to show warnings: those of runs as one line, others as before."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **kwargs: Any) -> None:
        if issubclass(category, RunWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            others(message, category, *where, **kwargs)

    return show


def _raise_no_late_writes(others: Callable) -> Callable:
    """Leave out what orbax's writers say that outlive a failed save; show all else as before."""

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    return show


def _stop(error: object) -> None:
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
    required = ("name", "schedule", "steps", "grid")  # of samplers.build
    require(name not in required, f"options={text}: {name} is no option of a sampler")
    if word in ("true", "false"):
        return name, word == "true"
    for kind in (int, float):
        try:
            return name, kind(word)
        except ValueError:
            continue
    return name, word


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


def numbers(name: str, kind: Callable[[str], Any] = float) -> list[Any]:
    """The numbers of a list flag; kind: int for whole ones."""
    words: list[str] = FLAGS.get_flag_value(name, [])
    try:
        return [kind(word) for word in words]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name}={','.join(words)}: they must be {what}") from None


def output_folder(name: str, default: Path) -> Path:
    """The folder that a flag names, or a default. Raises InputError if it cannot be written."""
    path = Path(FLAGS[name].value or default)
    require(not path.exists() or path.is_dir(), f"{name}={str(path)!r} is a file: name a folder")
    check_writable(path, name)
    return path


def describe(devices: Sequence[jax.Device]) -> str:
    """Devices in words: "2 CPU cores", "1 NVIDIA H100"."""
    kind = "CPU cores" if devices[0].platform == "cpu" else devices[0].device_kind
    processes = len({device.process_index for device in devices})
    return f"{len(devices)} {kind}" + (f" of {processes} processes" if processes > 1 else "")
