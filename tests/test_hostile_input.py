"""Input from an attacker or a tired user ends in success or in one InputError.

Each property is a strategy and a function of its values. `make test` runs one round of each, and
`make test-slow` runs 100 times as many. The number of tries is printed at the end.
"""

import dataclasses
import io
import json
import os
import pickle
import resource
import signal
import string
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax import samplers, spec
from diffusion_jax.data import CLASS_NAMES, Dataset, contexts
from diffusion_jax.data import load as load_data
from diffusion_jax.data.dataset import check
from diffusion_jax.data.frames import Frame
from diffusion_jax.data.image_folders import image_folder
from diffusion_jax.data.labels import read_labels
from diffusion_jax.data.npy_files import npy_pair
from diffusion_jax.data.npz_files import load_npz
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.networks import torch_weights
from diffusion_jax.runs import checkpoints, load_config, metrics
from diffusion_jax.runs.config import REGISTRIES, SUPPLIED, Config
from diffusion_jax.runs.overview import versions
from diffusion_jax.runs.trainer import check_folder
from diffusion_jax.samplers import SAMPLERS
from diffusion_jax.tableau import interchange
from diffusion_jax.typing import InputError, RunWarning
from experiments.app import _use_cache
from experiments.terminal import outputs
from tests import conftest
from tests.apps import output_of

GIGABYTE = 2**30
PATIENCE = 60  # seconds
SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
TINY = Dataset(np.zeros((2, 8, 8, 3), np.uint8), np.eye(2, dtype=np.float32), ("a", "b"))


def refused(what: Callable[[], Any]) -> bool:
    """Return whether a call ends in InputError with a message, and count the try."""
    conftest.TRIED["inputs"] += 1
    try:
        what()
    except InputError as error:
        conftest.TRIED["refused"] += 1
        return bool(str(error))
    return False


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Fail if a test takes a gigabyte, or hangs."""

    def hang(*_: Any) -> None:
        raise TimeoutError(f"an input took over {PATIENCE} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * GIGABYTE, limits[1]))
    signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KiB
    assert grown < GIGABYTE / 1024


# ------------------------------------------------------------------------------------ strategies
NUMBERS = st.one_of(
    st.integers(-3, 100).map(str),
    st.sampled_from(["0", "-1", "1e9", "1e309", "nan", "inf", "-inf", "0x10", "1_0", "9" * 30]),
    st.sampled_from(["8", "9" * 5000, "1e-320", "0.5", "", " 1", "2147483648", "4294967296"]),
    st.floats().map(str),
    st.integers().map(str),
)
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=12),
    st.sampled_from(["true", "none", "a,b", "a,a", ",", "../..", "/dev/null", "x" * 300, "\ud800"]),
)
VALUES = st.one_of(NUMBERS, WORDS, st.lists(NUMBERS, max_size=6).map(",".join))
FIELDS = [field.name for field in dataclasses.fields(Config)]
NAMES = [*FIELDS[:-3], "preset", "devices", "save_every", "keep", "on_nan", "run", "nosuch"]


@st.composite
def specs(draw: Any, registry: spec.Registry, *supplied: str) -> str:
    """Generate the text of a component, mostly of one that exists."""
    if draw(st.integers(0, 9)) == 0:
        return draw(WORDS)
    name = draw(st.sampled_from([*registry]))
    known = [*spec.parameters(registry[name], supplied)]
    words = ["x0", "eps", "true", "none", "exact", "1", "2", "0.5", "cosine", "karras"]
    option = st.tuples(
        st.sampled_from([*known, "nosuch"]), st.sampled_from(words) | NUMBERS | VALUES
    )
    options = draw(st.lists(option.map("=".join) | NUMBERS, max_size=3))
    return ":".join([name, *options])


SPEC = st.sampled_from([*REGISTRIES.items()]).flatmap(
    lambda item: specs(item[1], *SUPPLIED.get(item[0], ())).map(f"--{item[0]}=".__add__)
)
FLAG = st.one_of(
    SPEC,
    st.tuples(st.sampled_from(NAMES), VALUES).map("--%s=%s".__mod__),
    st.sampled_from(NAMES).map("--no{}".format),
    WORDS,
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner)
    ),
    max_leaves=8,
)


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """Generate bytes of which some are changed, removed, repeated or inserted."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 12)))
        data[start:stop] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[start:]))))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@st.composite
def mutated_config(draw: Any) -> Any:
    """Generate a stored configuration with some fields replaced, removed or added."""
    values = json.loads(json.dumps(Config().to_dict()))
    for name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        value = draw(st.one_of(JUNK, st.sampled_from([10**400, -1, 10**12, "demo", [[]], [None]])))
        kind = draw(st.sampled_from(["field", "field", "spec", "gone", "new"]))
        if kind == "gone":
            values.pop(name, None)
        elif kind == "spec" and name in REGISTRIES:
            values[name] = draw(specs(REGISTRIES[name], *SUPPLIED.get(name, ())))
        else:
            values["of_a_later_version" if kind == "new" else name] = value
    return values


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy(header: str, version: int, body: bytes) -> bytes:
    """Return a .npy file with any header."""
    text = header.encode("latin1", "replace")
    size = struct.pack("<H" if version == 1 else "<I", len(text) % 2**16)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + body


DTYPES = ["|u1", "|O", "<f8", "<f4", "|b1", "<U9", "|V0", "|S0", "<M8[s]", ">i8", "<c16", "u1,f4"]
LENGTHS = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**62, 2**63, 10**30, True, 0.5]))
SHAPES = st.one_of(st.lists(LENGTHS, max_size=5).map(tuple), LENGTHS, st.text(max_size=3))
HEADERS = st.one_of(
    st.builds(
        lambda descr, shape, order: repr({"descr": descr, "fortran_order": order, "shape": shape}),
        st.one_of(st.sampled_from(DTYPES), JUNK),
        SHAPES,
        st.sampled_from([False, True, 0, "no"]),
    ),
    st.text(max_size=40),
    st.sampled_from(["(" * 9000, "{" * 300, "[]", "{'shape': (1L,)}", "\t", "1" * 5000]),
)
NPY = st.one_of(
    mutated(saved(TINY.images)),
    mutated(saved(np.arange(2))),
    st.builds(npy, HEADERS, st.sampled_from([1, 2, 3]), st.binary(max_size=600)),
    st.builds(
        lambda kind, shape: saved(np.ones(shape, kind)),
        st.sampled_from(["u1", "f8", "U1", "c8", "i4", "M8[s]", "b1"]),
        st.lists(st.integers(0, 9), max_size=5),
    ),
)


def picture(mode: str, kind: str, size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def archive(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, **TINY._asdict() | {"fingerprint": 0})
    return file.getvalue()


ARCHIVES = [archive(np.savez), archive(np.savez_compressed)]
CELLS = st.lists(st.lists(NUMBERS | WORDS, max_size=3).map(",".join), max_size=4)
TABLE = st.one_of(
    CELLS.map(lambda rows: "\n".join(rows).encode(errors="surrogatepass")),
    (JUNK | st.lists(NUMBERS | WORDS, max_size=3)).map(json.dumps).map(str.encode),
    mutated(b"a.png,cat\nb.png,dog\n"),
    mutated(b'{"a.png": [0.5, 1], "b.png": [1, 0]}'),
    mutated(b"[3, 7]"),
)
SHEET_OPTIONS = st.lists(
    st.tuples(st.sampled_from(["tile", "gap", "size", "fit", "background"]), VALUES).map("=".join),
    max_size=2,
).map(lambda words: ":".join(["tile=4", *words]).replace("tile=4:tile", "tile"))
PICTURES = [
    *(picture(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(picture(mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
    *(picture("RGB", kind) for kind in ("GIF", "BMP", "WEBP", "TIFF", "EPS", "PPM")),
    picture("P", "GIF", save_all=True, append_images=[Image.new("P", (8, 8), 1)]),
    picture("RGB", "PNG", (1, 1)),
]
SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".gif", ".bmp", ".webp", ".txt", ""])


def tensors(header: Any, size: int | None, body: bytes) -> bytes:
    """Return a .safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size % 2**64) + text + body


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X", "U64", "C64"]
        ),
        "shape": st.lists(st.one_of(st.integers(-1, 4), st.just(2**62)), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3),
    }
)
NAME = st.sampled_from(["init_conv.conv1.0.weight", "up0.0.weight", "x", "__metadata__", ""])
STATE = {"init_conv.conv1.0.weight": np.ones((8, 3, 3, 3), np.float32)}
STATE_DICTS = st.one_of(
    st.builds(
        tensors,
        st.one_of(st.dictionaries(NAME, TENSOR), JUNK, st.binary(max_size=30)),
        st.one_of(st.none(), st.none(), st.integers()),
        st.binary(max_size=64),
    ),
    mutated(safetensors.numpy.save(STATE)),
)
CLASSES = st.one_of(st.just(CLASS_NAMES), st.lists(WORDS, max_size=4, unique=True).map(tuple))
CONTEXT = st.one_of(
    st.text(string.ascii_lowercase + "=,;. -1e9", max_size=30),
    st.lists(
        st.sampled_from([*CLASS_NAMES, "=", ",", ";", "none", "1e300", "1e39", "0.5", " "])
    ).map("".join),
)
RECORD = json.dumps({"step": 1, "epoch": 0, "loss": 0.5}).encode()


# ------------------------------------------------------------------------------------ properties
def on_flags(words: list[str], folder: Path) -> None:
    """Run a command line of training with existing data, up to the start of training."""
    patches = {
        "diffusion_jax.data.load": lambda text: TINY,
        "diffusion_jax.runs.trainer.train_run": lambda *_: None,
        "diffusion_jax.parallel.make_deterministic": lambda: None,
    }
    with ExitStack() as stack:
        for name, stub in patches.items():
            stack.enter_context(mock.patch(name, stub))
        try:
            output_of("train", f"--run={folder}", "--noreport", *words)
        except flags.Error as error:  # the apps print it like an InputError
            raise InputError(str(error)) from None


def on_sampler(given: tuple[str, int, str], folder: Path) -> None:
    """Build the sampler of --sampler."""
    sampler, steps, grid = given
    name, *options = sampler.split(":")
    table = samplers.build(":".join([name, str(steps), f"grid={grid}", *options]), SCHEDULE)
    assert table.rows < 100 * SCHEDULE.steps


def on_sampler_file(data: bytes, folder: Path) -> None:
    (folder / "a.json").write_bytes(data)
    assert samplers.build(f"file:path={folder}/a.json", SCHEDULE).rows == 3


@cache
def sampler_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        interchange.write(path, samplers.build("unipc:3", SCHEDULE), "unipc:3", "linear:steps=20")
        return path.read_bytes()


@st.composite
def sampler_files(draw: Any) -> bytes:
    """Generate a sampler file with bytes or values changed, the latter with a hash that fits."""
    whole = sampler_file()
    if draw(st.booleans()):
        return draw(mutated(whole))
    content = json.loads(whole)
    name = draw(st.sampled_from(list(content)))
    content[name] = draw(JUNK | st.lists(st.floats() | st.integers(), min_size=3, max_size=3))
    with suppress(ValueError, TypeError, OverflowError):
        columns = [np.array(content[each], np.float64) for each in samplers.Tableau._fields]
        content["hash"] = interchange.digest_of(samplers.Tableau(*columns))
    return json.dumps(content).encode()


def on_context(both: tuple[str, tuple[str, ...]], folder: Path) -> None:
    vectors = contexts.parse(*both)
    assert np.all(np.isfinite(vectors))
    assert vectors.shape[1] == len(both[1])


def on_config(values: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(values))
    read = Config.from_dict(checkpoints.read_config(folder), "config.json")
    assert Config.from_dict(json.loads(json.dumps(read.to_dict())), "back") == read


def on_config_text(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    Config.from_dict(checkpoints.read_config(folder), "config.json")


def on_images(data: bytes, folder: Path) -> None:
    (folder / "images.npy").write_bytes(data)
    assert npy_pair(str(folder / "images.npy")).images.dtype == np.uint8


def on_labels(data: bytes, folder: Path) -> None:
    np.save(folder / "images.npy", TINY.images)
    (folder / "labels.npy").write_bytes(data)
    dataset = npy_pair(str(folder / "images.npy"), str(folder / "labels.npy"))
    assert dataset.labels.shape[0] == 2
    assert np.all(np.isfinite(dataset.labels))


def on_table(given: tuple[bytes, str, bool], folder: Path) -> None:
    data, suffix, keyed = given
    path = folder / f"x{suffix}"
    path.write_bytes(data)
    files = ["a.png", "b.png"] if keyed else []
    vectors, names = read_labels(str(path), 2, files=files)
    found = check(Dataset(TINY.images, vectors, names), str(path))
    assert found.labels.shape == (2, len(names))


def on_archive(data: bytes, folder: Path) -> None:
    (folder / "x.npz").write_bytes(data)
    assert len(load_npz(str(folder / "x.npz"), ["images", "labels"])) == 2


def on_sheet(given: tuple[bytes, str], folder: Path) -> None:
    data, options = given
    (folder / "x.png").write_bytes(data)
    assert len(load_data(f"sheet:{folder}/x.png:{options}").images)


def on_pictures(given: tuple[bytes, str, int], folder: Path) -> None:
    data, suffix, size = given
    path = folder / "a" / f"x{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        frame = Frame((size, size) if size else None)
        assert image_folder(str(folder), frame).images.dtype == np.uint8
    finally:
        path.unlink()


def on_state_dict(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    torch_weights.infer_fields(torch_weights.read_state_dict(folder / "x.safetensors"))


def on_metrics(lines: bytes, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(lines)
    records = [record for record in metrics.read(path) if record["loss"] is not None]
    assert np.all(np.isfinite(np.array([[r["step"], r["loss"]] for r in records], float)))


MUTATED_PICTURES = st.sampled_from(PICTURES).flatmap(
    lambda data: st.one_of(st.just(data), mutated(data))
)
METRICS = st.fixed_dictionaries({"step": st.integers() | JUNK, "loss": st.floats() | JUNK})
HUGE = [{"step": 10**400, "loss": 1}, {"step": 1, "loss": 10**400}, {"step": True, "loss": None}]
LINE = st.one_of(
    st.just(RECORD),
    mutated(RECORD),
    (JUNK | METRICS | st.sampled_from(HUGE)).map(json.dumps).map(str.encode),
)
SCHEDULE = schedules.build("linear:steps=20")
SAMPLER = st.tuples(
    specs(SAMPLERS, "schedule", "grid"),
    st.integers(-2, 22) | st.integers(),
    specs(GRIDS, "schedule", "n"),
)
PROPERTIES: dict[str, tuple[st.SearchStrategy, Callable[[Any, Path], None]]] = {
    "flags": (st.lists(FLAG, min_size=1, max_size=4), on_flags),
    "sampler": (SAMPLER, on_sampler),
    "sampler-file": (sampler_files(), on_sampler_file),
    "context": (st.tuples(CONTEXT, CLASSES), on_context),
    "config": (mutated_config(), on_config),
    "config-text": (mutated(json.dumps(Config().to_dict()).encode()), on_config_text),
    "images": (NPY, on_images),
    "labels": (NPY, on_labels),
    "table": (st.tuples(TABLE, st.sampled_from([".csv", ".json"]), st.booleans()), on_table),
    "archive": (st.sampled_from(ARCHIVES).flatmap(mutated), on_archive),
    "sheet": (st.tuples(MUTATED_PICTURES, SHEET_OPTIONS), on_sheet),
    "pictures": (st.tuples(MUTATED_PICTURES, SUFFIXES, st.sampled_from([0, 8])), on_pictures),
    "state-dict": (STATE_DICTS, on_state_dict),
    "metrics": (st.lists(LINE).map(b"\n".join), on_metrics),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NumPy's files
@pytest.mark.filterwarnings("ignore::diffusion_jax.typing.RunWarning")  # unstable samplers warn
@pytest.mark.parametrize(
    "examples", [pytest.param(50, id="few"), pytest.param(2000, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", PROPERTIES)
def test_bad_input_is_refused_in_one_way(tmp_path, name: str, examples: int) -> None:
    strategy, check = PROPERTIES[name]
    seen = []

    @settings(SETTINGS, max_examples=examples)
    @given(strategy)
    def run(value: Any) -> None:
        signal.alarm(PATIENCE)
        seen.append(refused(lambda: check(value, tmp_path)))

    run()
    assert len(seen) >= examples
    assert any(seen), "some of it must be bad"


# ---------------------------------------------------------------------------------- single cases


def put(folder: Path, name: str, data: bytes = PICTURES[4]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def png_claiming(width: int, height: int) -> bytes:
    """Return the start of a PNG whose header states this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", crc32(chunk))


@pytest.mark.parametrize("side", [8196, 10_000, 20_000, 2**31 - 1])
def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, side: int) -> None:
    put(tmp_path, "a/x.png", png_claiming(side, side))
    assert refused(lambda: image_folder(str(tmp_path), Frame((8, 8))))


def test_a_whole_bomb_is_refused(tmp_path) -> None:
    """Use 20,000 x 20,000 white pixels: 49 kB as a file, 1.6 GB as RGBA."""
    put(tmp_path, "a/x.png", picture("1", "PNG", (20_000, 20_000)))
    assert refused(lambda: image_folder(str(tmp_path), Frame((8, 8))))


def test_hidden_files_and_folders_without_images_are_no_classes(tmp_path) -> None:
    for name in (".git/x.png", "b/.x.png", "b/x.png", "d/x.gif", "e/notes.txt", "f/x.png/y.txt"):
        put(tmp_path, name)
    (tmp_path / "c").mkdir()
    with pytest.warns(RunWarning, match=r"left out, because not an image: .*/e/notes\.txt$"):
        dataset = image_folder(str(tmp_path))
    assert dataset.class_names == ("b", "d")
    np.testing.assert_array_equal(dataset.labels, np.eye(2, dtype=np.float32))


@pytest.mark.parametrize(
    "name", ["images.npy", "labels.npy", "a/x.png", "x.safetensors", "config.json"]
)
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path, name: str) -> None:
    """Use a pipe that would block for ever when opened."""
    signal.alarm(PATIENCE)
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / name)
    np.save(tmp_path / "good.npy", TINY.images)
    good, path = str(tmp_path / "good.npy"), str(tmp_path / name)
    read = {
        "images.npy": lambda: npy_pair(path),
        "labels.npy": lambda: npy_pair(good, path),
        "a/x.png": lambda: image_folder(str(tmp_path)),
        "x.safetensors": lambda: torch_weights.read_state_dict(path),
        "config.json": lambda: checkpoints.read_config(tmp_path),
    }
    assert refused(read[name])


def test_few_labels_that_would_take_much_memory_are_refused(tmp_path) -> None:
    """Use ten million class numbers, which take 10 MB, and 10 GB as vectors."""
    np.save(tmp_path / "images.npy", TINY.images)
    np.save(tmp_path / "labels.npy", np.full(10**7, 255, np.uint8))
    assert refused(lambda: npy_pair(str(tmp_path / "images.npy"), str(tmp_path / "labels.npy")))


@pytest.mark.parametrize("target", ["nowhere", "run", "/dev/null", "/dev/zero", "..", "/"])
@pytest.mark.parametrize("name", ["run", "run/config.json", "run/metrics.jsonl"])
def test_links_in_place_of_a_run_or_its_files(tmp_path, name: str, target: str) -> None:
    signal.alarm(PATIENCE)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(target)
    run = tmp_path / "run"
    refused(lambda: check_folder(run, Config().fill_in(TINY)))
    assert refused(lambda: load_config(run))
    refused(lambda: metrics.read(run / "metrics.jsonl"))
    if name == "run/config.json":
        refused(lambda: checkpoints.write_config(run, Config().to_dict()))
        assert (run / "config.json").is_symlink() is False, "it is replaced, not followed"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file" / "run", tmp_path / ("x" * 300), tmp_path / "file"):
        assert refused(lambda run=run: checkpoints.write_config(run, {}))
        assert refused(lambda run=run: checkpoints.read_config(run))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\033[2J\x9b\x07b\n", "a\\x1b[2J\\x9b\\x07b\n"),
        ("bar\r\tgr\xfc\xdfe\n", "bar\r\tgr\xfc\xdfe\n"),
        ("folder \udcff", "folder \\udcff"),
    ],
)
def test_names_cannot_steer_the_terminal(written: str, shown: str) -> None:
    text = io.StringIO()
    with outputs(text, None):
        print(written, end="")
        print("into a closed stream", file=sys.stderr)
    assert text.getvalue() == shown


def test_an_app_goes_on_where_nobody_reads_what_it_prints(tmp_path) -> None:
    """Print to a pipe without a reader, and to a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, open("/dev/full", "w") as full, outputs(pipe, full):
        for _ in range(3):
            print("x" * 10_000, flush=True)
            print("lost", file=sys.stderr)


@pytest.mark.parametrize("text", [None, "[" * 10**5, "[]", '[{"devices": 7, "versions": 7}]'])
@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_report_needs_no_record_of_starts(tmp_path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "environment.json").write_text(text)
    assert "<table>" in versions(tmp_path)


def test_without_a_home_nothing_is_cached(monkeypatch) -> None:
    """Act like a user without an entry in the system's list."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    _use_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_log_file_gets_few_lines_and_no_backend_of_a_notebook() -> None:
    program = (
        "import experiments, os; print(os.environ['MPLBACKEND'], os.environ['TQDM_MININTERVAL'])"
    )
    command = [sys.executable, "-c", program]
    env = os.environ | {"MPLBACKEND": "module://not_here"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "agg 60\n"


# ------------------------------------------------------------------------- pickles, with PyTorch


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def zipped(entries: dict[str, bytes], how: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.peers
@pytest.mark.parametrize("form", ["bare", "zip", "deflated", "nested"])
def test_code_in_a_state_dict_is_refused_and_never_run(tmp_path, form: str) -> None:
    sprung = tmp_path / "sprung"
    code = pickle.dumps({"x": Trap(sprung)} if form == "nested" else Trap(sprung), 2)
    how = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
    whole = {"archive/data.pkl": code, "archive/version": b"3", "archive/byteorder": b"little"}
    (tmp_path / "x.pth").write_bytes(code if form == "bare" else zipped(whole, how))
    assert refused(lambda: torch_weights.read_state_dict(tmp_path / "x.pth"))
    assert not sprung.exists()


@pytest.mark.peers
def test_a_state_dict_that_unfolds_to_gigabytes_is_refused(tmp_path) -> None:
    whole = io.BytesIO(torch_weights.encode_torch({"x": np.zeros(10**7, np.uint8)}))
    with zipfile.ZipFile(whole) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    (tmp_path / "x.pth").write_bytes(zipped(entries, zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="is compressed"):
        torch_weights.read_state_dict(tmp_path / "x.pth")


@pytest.mark.peers
@pytest.mark.parametrize("legacy", [False, True])
def test_one_number_that_claims_to_be_billions_is_refused(tmp_path, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.ones(1, dtype=torch.float16).expand(40_000, 20_000)
    torch.save({"x": whole}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"holds \d+ bytes, and claims tensors of 1600000000"):
        torch_weights.read_state_dict(tmp_path / "x.pth")


@pytest.mark.peers
def test_a_legacy_file_that_claims_gigabytes_is_refused(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    path, count = tmp_path / "x.pth", 70_000
    torch.save({"x": torch.ones(count)}, path, _use_new_zipfile_serialization=False)
    told, claimed = (b"J" + number.to_bytes(4, "little") for number in (count, 2**31 - 1))
    assert told in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(told, claimed))
    assert refused(lambda: torch_weights.read_state_dict(path))


@pytest.mark.peers
@pytest.mark.parametrize("examples", [50, 2000], ids=["few", "many"])
def test_damaged_state_dicts_of_pytorch_are_refused(tmp_path, examples: int) -> None:
    path = tmp_path / "x.pth"

    @settings(SETTINGS, max_examples=examples)
    @given(mutated(torch_weights.encode_torch(STATE)))
    def run(data: bytes) -> None:
        signal.alarm(PATIENCE)
        path.write_bytes(data)
        refused(lambda: torch_weights.infer_fields(torch_weights.read_state_dict(path)))

    run()
