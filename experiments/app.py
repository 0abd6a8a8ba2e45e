"""The shared part of all apps: flags, help, start, and errors as one line."""

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
from diffusion_jax.runs.models import SHIPPED
from diffusion_jax.samplers import FILES, SAMPLERS
from diffusion_jax.typing import InputError, RunWarning, require
from experiments.presets import PRESETS
from experiments.terminal import outputs

flags.disclaim_key_flags()  # the flags belong to the app that defines them
WORTH_KEEPING = 0.1  # the fewest seconds of compilation
LONGEST_NAME = 120  # the most characters of a file's or folder's name
# The registries that --help explains, and the parameters in them that are not options.
Shown = dict[str, tuple[spec.Registry, tuple[str, ...]]]
CATALOGUES: dict[str, Shown] = {
    "preset": {name: (registry, SUPPLIED.get(name, ())) for name, registry in REGISTRIES.items()},
    "sampler": {
        "sampler": (SAMPLERS | FILES, ("schedule", "grid")),
        "grid": (GRIDS, ("schedule", "n")),
    },
    "guidance": {"guidance": (GUIDANCES, ())},
    "threshold": {"threshold": (THRESHOLDS, ("x0",))},
}
SHOWN: Shown = {}  # the registries of this app
FIELDS = {each.name: each for each in dataclasses.fields(Config) if each.metadata}
MAKERS: dict[Any, Any] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
COUNT = "how many devices to use; by default as many as give each an equal part of the images"
JOIN = (
    "join a job of several processes: HOST:PORT,COUNT,NUMBER are the address of process 0, the "
    "number of processes and the number of this process; auto takes them from Slurm, Open MPI, "
    "Kubernetes or the TPU pod"
)
RUN = (
    "the run folder; by default the model of this project, which is found from any folder, and "
    "whose results go to this path in the current one"
)
SHARED: dict[str, tuple[type, Any, str]] = {  # flags of several apps
    "run": (str, str(SHIPPED), RUN),
    "step": (int, None, "the training step of the checkpoint; by default the newest"),
    "sampler": (str, "sa_solver:10", "the sampler and its options, such as ddim:25"),
    "guidance": (str, None, "the scale of guidance, such as 2, or a kind of it and its options"),
    "threshold": (str, "none", "how to keep predicted images within [-1, 1]"),
    "devices": (int, None, COUNT),
    "cpu_devices": (int, None, "how many CPU cores to use as devices; by default all"),
    "processes": (str, None, JOIN),
}


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

    def flag(self, name: str) -> flags.Flag:
        """Return a flag without counting it as read."""
        return self._values[name]

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


def define(*names: str, **defaults: Any) -> None:
    """Define flags of SHARED, some with different defaults.

    The name "preset" defines --preset and a flag for each field of Config that has a help text.
    """
    for name in (*names, *defaults):
        SHOWN.update(CATALOGUES.get(name, {}))
        if name in SHARED:
            kind, default, about = SHARED[name]
            MAKERS[kind](name, defaults.get(name, default), about)
            continue
        about = " ".join(f"{name}: {make.__doc__}" for name, make in PRESETS.items())
        flags.DEFINE_enum("preset", "course", list(PRESETS), f"the settings to start from. {about}")
        for field in FIELDS.values():
            about = f"{field.metadata['help']} (course: {field.default})"
            MAKERS[field.type](field.name, None, about)


def define_seed(about: str, name: str = "seed") -> None:
    """Define a flag for a seed."""
    flags.DEFINE_integer(name, 0, about, 0, 2**32 - 1)


def config(args: Args) -> Config:
    """Return the configuration that the flags describe. Raise InputError if it is invalid."""
    return PRESETS[args.preset]().refine(**fields(args))


def fields(args: Args) -> dict[str, Any]:
    """Return the fields of Config that the command line gives."""
    return {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}


def read_fields(words: Sequence[Sequence[str]], what: str) -> dict[str, Any]:
    """Return fields of Config from pairs of name and text. Raise InputError if one is invalid."""
    found = {}
    for name, text in words:
        kind = spec.PLAIN[spec.choose(FIELDS, what, name).type]
        try:
            found[name] = kind.read(text)
        except ValueError:
            raise InputError(f"{what}: {name}={text}: it must be {kind.label}") from None
    return found


def output_folder(path: str | None, default: Path, name: str = "out") -> Path:
    """Return the folder that a flag names, or a default. Raise InputError if it is not writable."""
    folder = Path(path or default)
    fits = not os.path.exists(folder) or folder.is_dir()
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
    guide_model = load_model(guide.run, guide.step) if guide.run else None
    return {"guidance": guide.guidance, "guide_model": guide_model}


def variant(label: str, args: Args, *names: str) -> str:
    """Return a name for results that has the flags that differ from defaults: ddim-25-seed=3.

    Characters that are awkward in file names become _, and a checksum then keeps names distinct.
    """
    words = [label]
    for flag in map(args.flag, names):
        value = ",".join(flag.value) if isinstance(flag.value, list) else flag.value
        words += [f"{flag.name}={value}"] * (flag.value != flag.default)
    whole = "-".join(words)
    plain = re.sub(r"[^\w.,=+-]+", "_", whole, flags=re.ASCII)[:LONGEST_NAME]
    return plain if plain == whole else f"{plain}-{zlib.crc32(whole.encode(errors='replace')):08x}"


def numbers(name: str, words: Sequence[str], kind: Callable[[str], Any] = float) -> list[Any]:
    """Return the numbers of a list flag. kind: int for whole numbers."""
    try:
        return [kind(word) for word in words]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name}={','.join(words)}: they must be {what}") from None


def devices(args: Args) -> list[jax.Device]:
    """Return the devices that --devices asks for, by default all of this process."""
    count = args.devices
    return jax.local_devices() if count is None else parallel.choose_devices(max(count, 1), count)


def describe(devices: Sequence[jax.Device]) -> str:
    """Return devices in words: "2 CPU cores", "1 NVIDIA H100"."""
    kind = "CPU cores" if devices[0].platform == "cpu" else devices[0].device_kind
    processes = len({device.process_index for device in devices})
    return f"{len(devices)} {kind}" + (f" of {processes} processes" if processes > 1 else "")


def print_once(text: str) -> None:
    """Print a text in the first process of a job."""
    if parallel.is_first():
        print(text, flush=True)


def run(main: Callable[[Args], None]) -> None:
    """Run an app. Invalid input ends it with one line and exit code 2.

    So does an error of the system, such as a lack of permission, a full disk, or a file where a
    folder should be.
    """
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
        sys.unraisablehook = _without_orbax(sys.unraisablehook)
        jax.config.update("jax_enable_x64", False)  # JAX_ENABLE_X64 changes results
        parallel.use_cpu_cores(args.cpu_devices)
        _use_cache()
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
    words = f"waiting for all processes, at most {parallel.START} s: processes={args.processes}"
    print(words, file=sys.stderr, flush=True)
    parallel.start_processes(args.processes)
    try:
        main(args)
        parallel.wait_for_all()
    except (InputError, SystemExit):
        raise
    except BaseException as error:
        if not (isinstance(error, OSError) and error.errno):  # those take one line
            traceback.print_exc()
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        count = jax.process_count()
        words = f"error: this process of {count} stops, because it or one of the others failed"
        print(f"{words}: {what}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # an orderly end would wait for the others


def _help() -> str:
    """Return the text of --help: the app, its flags, and the components that they choose from."""
    lines = [textwrap.dedent(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for flag in _own_flags(flags.FLAGS):
        head = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        if flag.default not in (None, "", []) and not flag.boolean:
            head += f"={(flag.default_as_str or '').strip(chr(39))}"
        lines += _two_columns(head, flag.help)
    if SHOWN:
        lines += ["", "Options have the defaults shown; of choices a|b, the first is the default."]
    for name, (registry, hidden) in SHOWN.items():
        where = "grid, an option of every sampler" if name == "grid" else f"--{name}"
        usage = "NAME:STEPS" if name == "sampler" else "NAME"
        lines += ["", f"{where}={usage}:OPTION=VALUE:... takes", spec.describe(registry, hidden)]
    return "\n".join(lines)


def _two_columns(head: str, text: str, indent: int = 24, width: int = 96) -> list[str]:
    """Return a flag and its help side by side, or one below the other."""
    text = " ".join(text.split())
    lines = textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
    if len(head) + 4 > indent:
        return [f"  {head}", *lines]
    return [f"  {head:{indent - 2}}{lines[0].strip()}", *lines[1:]]


def _use_cache() -> None:
    """Make JAX keep compiled programs in the user's cache, unless its variables name a folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if os.path.isabs(caches):  # otherwise the user has no home
            jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "diffusion_jax"))
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


def _without_orbax(others: Callable) -> Callable:
    """Return a hook that hides what a failed save or restore of orbax leaves, and shows others.

    The failure itself was raised before.
    """

    def show(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        left = code is not None and "orbax" in Path(code.co_filename).parts
        if not left and str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    return show


def _stop(error: object) -> None:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
