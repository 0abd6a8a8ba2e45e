"""The shared part of all apps: groups of flags, help, start, and errors as one line."""

import dataclasses
import os
import re
import sys
import textwrap
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from diffusion_jax import parallel, spec
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.guidance import GUIDANCES, THRESHOLDS, threshold
from diffusion_jax.diffusion.guidance import guide as parse_guidance
from diffusion_jax.runs import load_model
from diffusion_jax.runs.config import REGISTRIES, SUPPLIED, Config
from diffusion_jax.runs.locks import check_writable
from diffusion_jax.samplers import FILES, SAMPLERS
from diffusion_jax.typing import InputError, RunWarning, require
from experiments.presets import PRESETS
from experiments.terminal import outputs

flags.disclaim_key_flags()  # the flags belong to the app that defines them
SHIPPED = "checkpoints/sprites"  # the model that comes with the project
WORTH_KEEPING = 0.1  # the fewest seconds of compilation
LONGEST_NAME = 120  # the most characters of a file's or folder's name
# The registries that --help explains, and the parameters in them that are not options.
Shown = dict[str, tuple[spec.Registry, tuple[str, ...]]]
CATALOGUES: dict[str, Shown] = {
    "config": {name: (registry, SUPPLIED.get(name, ())) for name, registry in REGISTRIES.items()},
    "sampler": {
        "sampler": (SAMPLERS | FILES, ("schedule", "grid")),
        "grid": (GRIDS, ("schedule", "n")),
    },
    "guidance": {"guidance": (GUIDANCES, ()), "threshold": (THRESHOLDS, ("x0",))},
}
FIELDS = {each.name: each.default for each in dataclasses.fields(Config) if each.metadata}
SHOWN: Shown = {}  # the registries of this app


class Args:
    """The values of the flags. It records which ones are read, so that the rest can be refused."""

    def __init__(self, values: flags.FlagValues) -> None:
        """Wrap absl's values."""
        self._values = values
        self._read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        """Return the value of a flag."""
        self._read.add(name)
        return self._values[name].value

    def peek(self, name: str) -> Any:
        """Return the value of a flag without counting it as read."""
        return self._values[name].value

    def given(self, name: str) -> bool:
        """Return whether a flag is on the command line."""
        return bool(self._values[name].present)

    def differs(self, name: str) -> bool:
        """Return whether a flag's value differs from its default."""
        return bool(self.peek(name) != self._values[name].default)

    def refuse_unread(self, what: str) -> None:
        """Raise InputError for a flag on the command line that nothing has read."""
        for flag in _own_flags(self._values):
            unread = flag.present and flag.name not in self._read
            require(not unread, f"--{flag.name}: {what} does not read it: leave it out")


def _own_flags(values: flags.FlagValues) -> list[flags.Flag]:
    """Return the app's flags in the order of their definition, without those of libraries."""
    modules = values.flags_by_module_dict().items()
    own = [of for name, of in modules if name == sys.argv[0] or name.startswith("experiments")]
    return [flag for of in own for flag in of]


def define_config() -> None:
    """Define --preset and a flag for each field of Config that has a help text."""
    about = " ".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
    flags.DEFINE_enum("preset", "course", list(PRESETS), f"where the settings start from. {about}")
    define: dict[type, Any] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for field in dataclasses.fields(Config):
        if "help" in field.metadata:
            about = f"{field.metadata['help']} (course: {field.default})"
            define[type(field.default)](field.name, None, about)
    SHOWN.update(CATALOGUES["config"])


def config(args: Args) -> Config:
    """Return the configuration that the flags describe. Raise InputError if it is invalid."""
    chosen = PRESETS[args.preset]().override(**fields(args))
    unread = chosen.null_context and args.given("keep_probability")
    require(not unread, "keep_probability: --null_context does not read it: leave it out")
    return chosen


def fields(args: Args) -> dict[str, Any]:
    """Return the fields of Config that the command line gives."""
    return {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}


def read_fields(words: Sequence[Sequence[str]], what: str) -> dict[str, Any]:
    """Return fields of Config from pairs of name and text. Raise InputError if one is invalid."""
    found = {}
    for name, text in words:
        kind = spec.PLAIN[type(spec.choose(FIELDS, what, name))]
        try:
            found[name] = kind.read(text)
        except ValueError:
            raise InputError(f"{what}: {name}={text}: it must be {kind.label}") from None
    return found


def define_run() -> None:
    """Define --run and --step, which choose the model."""
    flags.DEFINE_string("run", SHIPPED, "the run folder; by default the project's own model")
    flags.DEFINE_integer("step", None, "the checkpoint; by default the newest")


def define_devices() -> None:
    """Define --devices and --cpu_devices."""
    flags.DEFINE_integer("devices", None, "devices to use; by default as many as divide the batch")
    flags.DEFINE_integer("cpu_devices", None, "CPU cores that count as devices; by default all")


def define_sampler(default: str = "sa_solver:10") -> None:
    """Define --sampler."""
    flags.DEFINE_string(
        "sampler", default, "the sampler, such as ddim:25 or unipc:10:order=3:grid=karras:rho=5"
    )
    SHOWN.update(CATALOGUES["sampler"])


def define_guidance() -> None:
    """Define --guidance and --threshold."""
    flags.DEFINE_string(
        "guidance", None, "guidance: a scale, such as 2, or cfg:2:rescale=0.7, cfg_pp, auto:run=RUN"
    )
    flags.DEFINE_string("threshold", "none", "how predicted images are kept within [-1, 1]")
    SHOWN.update(CATALOGUES["guidance"])


def define_processes() -> None:
    """Define --processes."""
    flags.DEFINE_string(
        "processes",
        None,
        "for a job of several processes: HOST:PORT,COUNT,NUMBER, where HOST:PORT is that of "
        "process 0 and NUMBER is this process's; or auto, to find them from Slurm, Open MPI, "
        "Kubernetes or the TPU pod",
    )


def output_folder(path: str | None, default: Path, name: str = "out") -> Path:
    """Return the folder that a flag names, or a default. Raise InputError if it is not writable."""
    folder = Path(path or default)
    fits = not folder.exists() or folder.is_dir()
    require(fits, f"{name}={str(folder)!r} is a file: name a folder")
    check_writable(folder, name)
    return folder


def check_guidance(args: Args, config: Config) -> dict[str, Any]:
    """Return --guidance and --threshold as arguments of sample. Raise InputError if invalid."""
    threshold(args.threshold)
    given = {} if args.guidance is None else guided(args.guidance, config)
    return given | {"threshold": args.threshold}


def guided(text: str, config: Config) -> dict[str, Any]:
    """Return a guidance as arguments of sample. Raise InputError if it does not suit the run."""
    guide = parse_guidance(text)
    without = config.null_context or config.keep_probability in (0, 1)
    require(
        guide.run or not without or guide.guidance.scale == 1,
        f"guidance={text}: this run was trained only with or only without context; "
        "guidance needs both, or --guidance=auto:run=RUN",
    )
    worse = load_model(guide.run, guide.step) if guide.run else None
    return {"guidance": guide.guidance, "worse": worse}


def variant(label: str, args: Args, *names: str) -> str:
    """Return a name for results that has the flags that differ from defaults: ddim-25-seed=3.

    Characters that are awkward in file names become _, and a checksum then keeps names distinct.
    """
    values = {name: args.peek(name) for name in names if args.differs(name)}
    words = [
        f"{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in values.items()
    ]
    whole = "-".join([label, *words])
    plain = re.sub(r"[^\w.,=+-]+", "_", whole, flags=re.ASCII)[:LONGEST_NAME]
    return plain if plain == whole else f"{plain}-{zlib.crc32(whole.encode(errors='replace')):08x}"


def numbers(name: str, words: Sequence[str], kind: Callable[[str], Any] = float) -> list[Any]:
    """Return the numbers of a list flag. kind: int for whole numbers."""
    try:
        return [kind(word) for word in words]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name}={','.join(words)}: they must be {what}") from None


def describe(devices: Sequence[jax.Device]) -> str:
    """Return devices in words: "2 CPU cores", "1 NVIDIA H100"."""
    kind = "CPU cores" if devices[0].platform == "cpu" else devices[0].device_kind
    processes = len({device.process_index for device in devices})
    return f"{len(devices)} {kind}" + (f" of {processes} processes" if processes > 1 else "")


def say(text: str) -> None:
    """Print a text in the first process of a job."""
    if parallel.is_first():
        print(text, flush=True)


def run(main: Callable[[Args], None]) -> None:
    """Run an app. Invalid input ends it with one line and exit code 2.

    So does an error of the system, such as a lack of permission, a full disk, or a file where a
    folder should be.
    """
    _define_cache()
    with outputs(sys.stdout, sys.stderr):
        if {"--help", "-help", "--helpshort", "-h", "-?"} & {*sys.argv[1:]}:
            print(_help())
            return
        app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _guarded(main: Callable[[Args], None], argv: Sequence[str]) -> None:
    values = flags.FLAGS
    args = Args(values)
    try:
        require(not argv[1:], f"{' '.join(argv[1:])!r} is not a flag: flags are --name=value")
        if not values["verbosity"].present:
            logging.set_verbosity(logging.FATAL)  # orbax reports each of its steps
        warnings.showwarning = _show(warnings.showwarning)
        sys.unraisablehook = _raise_no_late_writes(sys.unraisablehook)
        jax.config.update("jax_enable_x64", False)  # JAX_ENABLE_X64 changes results
        parallel.use_cpu_cores(args.cpu_devices)
        _use_cache(args.compilation_cache_dir)
        if "processes" in values and args.processes:
            _run_job(main, args)
        else:
            main(args)
    except InputError as error:
        _stop(error)
    except OSError as error:
        if error.errno is None:  # the error is not the system's
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        _stop(f"{where}{error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run_job(main: Callable[[Args], None], args: Args) -> None:
    """Run main in one process of several. If it fails, exit at once, which ends the others."""
    processes = args.processes
    print(
        f"waiting for all processes, at most {parallel.START} s: processes={processes}",
        file=sys.stderr,
        flush=True,
    )
    parallel.start_processes(processes)
    try:
        main(args)
        parallel.wait_for_all()
    except (InputError, SystemExit):
        raise
    except BaseException as error:
        if not (isinstance(error, OSError) and error.errno):  # those take one line
            traceback.print_exc()
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"error: this process of {jax.process_count()} stops, because it failed or another "
            f"one was lost: {what}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the others


def _help() -> str:
    """Return the text of --help: the app, its flags, and the components that they choose from."""
    lines = [textwrap.dedent(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for flag in _own_flags(flags.FLAGS):
        head = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        if flag.default not in (None, "") and not flag.boolean:
            head += f"={(flag.default_as_str or '').strip(chr(39))}"
        lines += _two_columns(head, flag.help)
    if SHOWN:
        lines += ["", "Options are listed with their defaults; of words with | between, the first."]
    for name, (registry, hidden) in SHOWN.items():
        where = "grid, an option of every sampler" if name == "grid" else f"--{name}"
        usage = "NAME:STEPS" if name == "sampler" else "NAME"
        lines += ["", f"{where}={usage}:OPTION=VALUE:... takes", spec.describe(registry, hidden)]
    return "\n".join(lines)


def _two_columns(head: str, text: str, indent: int = 24, width: int = 96) -> list[str]:
    """Return a flag and its help side by side, or one below the other."""
    lines = textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
    if len(head) + 4 > indent:
        return [f"  {head}", *lines]
    return [f"  {head:{indent - 2}}{lines[0].strip()}", *lines[1:]]


def _define_cache() -> None:
    if "compilation_cache_dir" not in flags.FLAGS:
        flags.DEFINE_string(
            "compilation_cache_dir",
            None,
            "where compiled programs are kept for the next time; empty: nowhere; by default "
            "JAX_COMPILATION_CACHE_DIR, or diffusion_jax in the user's cache folder",
        )


def _use_cache(folder: str | None) -> None:
    """Make JAX keep what it compiles. Its own environment variable overrides the default folder.

    Raise InputError if the folder is a file.
    """
    if folder is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(caches):  # otherwise the user has no home
            folder = str(Path(caches) / "diffusion_jax")
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"compilation_cache_dir={folder!r} is a file: name a folder")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder or None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return list(flags.FLAGS(argv))
    except flags.Error as error:
        _stop(error)
        raise


def _show(others: Callable) -> Callable:
    """Return a function that shows warnings of runs as one line, and others as before."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **kwargs: Any) -> None:
        if issubclass(category, RunWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            others(message, category, *where, **kwargs)

    return show


def _raise_no_late_writes(others: Callable) -> Callable:
    """Return a hook that hides errors of orbax's writers after a failed save, and shows others."""

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    return show


def _stop(error: object) -> None:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
