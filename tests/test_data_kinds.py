"""Each kind of data that people bring: folders, sheets, archives, tables of labels, libraries."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import Dataset, contexts
from diffusion_jax.runs.config import Config
from diffusion_jax.runs.summaries import write_summary
from diffusion_jax.typing import InputError

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (6, 8, 8, 3), np.uint8)
RED = Image.new("RGB", (8, 8), "red")


def put(path: Path, image: Image.Image = RED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# ---------------------------------------------------------------------------------- frames


def wide() -> Image.Image:
    """Return a picture of 8x4 whose left half is red, and whose right half is clear."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    return image


R, W, K = (255, 0, 0), (255, 255, 255), (0, 0, 0)
FRAMES = {
    "": [[R] * 4 + [W] * 4] * 4,
    "background=black": [[R] * 4 + [K] * 4] * 4,
    "size=2": [[R, W]] * 2,
    "size=2,4": [[R, R, W, W]] * 2,
    "size=4:fit=crop": [[R, R, W, W]] * 4,
    "size=4:fit=pad": [[W] * 4, [R, R, W, W], [R, R, W, W], [W] * 4],
    "size=6,8:fit=pad:background=#000": [[K] * 8, *[[R] * 4 + [K] * 4] * 4, [K] * 8],
    "channels=1": [[[76]] * 4 + [[255]] * 4] * 4,  # 0.299 * 255
}


@pytest.mark.parametrize("options", FRAMES)
def test_images_are_framed(tmp_path, options: str) -> None:
    put(tmp_path / "x.png", wide())
    found = data.load(f"folder:{tmp_path}:{options}".strip(":")).images
    np.testing.assert_array_equal(found, np.uint8([FRAMES[options]]))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_framed_like_pictures(tmp_path, channels: int) -> None:
    images = COLOURS[..., :channels]
    np.save(tmp_path / "x.npy", images)
    text = f"npy:{tmp_path}/x.npy:size=10,12:fit=pad:background=black"
    padded = np.pad(images, ((0, 0), (1, 1), (2, 2), (0, 0)))
    np.testing.assert_array_equal(data.load(text).images, padded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (f"size={size}", f"size={size}: give a side in 0..1024")
            for size in ("-1", "4,0", "1025")
        ),
        ("size=4,4,4", "size=4,4,4: give a side in 0..1024, or height,width"),
        ("fit=squeeze", "fit=squeeze: it must be stretch, pad, crop"),
        ("background=nocolour", "background=nocolour: give a colour such as black or #ff00ff"),
        ("channels=4", "channels=4: it must be 3, 1"),
    ],
)
def test_frames_that_cannot_be_are_refused(tmp_path, options: str, message: str) -> None:
    put(tmp_path / "x.png")
    with pytest.raises(InputError, match=message):
        data.load(f"folder:{tmp_path}:{options}")


# ---------------------------------------------------------------------------------- labels
NAMES = ["a.png", "b.png", "c/d.png"]
CAT_DOG = np.float32([[1, 0], [0, 1], [1, 0]])
VECTORS = np.float32([[0.5, 0], [0, 1], [1, 2]])
TABLES: dict[str, tuple] = {  # contents, vectors, class names; with {} as the name of an image
    "words.csv": ("{},cat\n{},dog\n{},cat\n", CAT_DOG, ("cat", "dog")),
    "head.csv": ("file,kind\n{},cat\n\n{}, dog\n{},cat\n", CAT_DOG, ("cat", "dog")),
    "excel.csv": ("\ufefffile;kind\r\n{};cat\r\n{};dog\r\n{};cat\r\n", CAT_DOG, ("cat", "dog")),
    "quoted.csv": ('{},"a, b"\n{},dog\n{},"a, b"\n', CAT_DOG, ("a, b", "dog")),
    "numbers.csv": ("{},3\n{},7\n{},3\n", CAT_DOG, ("class3", "class7")),
    "vectors.csv": ("{},0.5,0\n{},0,1\n{},1,2\n", VECTORS, ("class0", "class1")),
    "named.csv": ("file,x,y\n{},0.5,0\n{},0,1\n{},1,2\n", VECTORS, ("x", "y")),
    "words.json": (["cat", "dog", "cat"], CAT_DOG, ("cat", "dog")),
    "numbers.json": ([3, 7, 3], CAT_DOG, ("class3", "class7")),
    "vectors.json": (VECTORS.tolist(), VECTORS, ("class0", "class1")),
}


@pytest.mark.parametrize("kind", ["folder", "npy"])
@pytest.mark.parametrize("table", TABLES)
def test_labels_of_tables(tmp_path, table: str, kind: str) -> None:
    content, vectors, names = TABLES[table]
    if table.endswith(".json"):
        keyed = dict(zip(reversed(NAMES), reversed(content), strict=True))
        text = json.dumps(keyed if kind == "folder" else content)
    elif kind == "folder":
        text = content.format(*NAMES)
    else:
        text = re.sub(r"(\{\}|file)[,;]", "", content)
    (tmp_path / table).write_text(text)
    for name in NAMES:
        put(tmp_path / "images" / name)
    np.save(tmp_path / "images.npy", COLOURS[:3])
    where = f"folder:{tmp_path}/images" if kind == "folder" else f"npy:{tmp_path}/images.npy"
    found = data.load(f"{where}:labels={tmp_path}/{table}")
    np.testing.assert_array_equal(found.labels, vectors)
    assert found.class_names == names


BAD_TABLES: dict[str, tuple] = {  # for npy, and the message; or for a folder, with a file name
    "empty.csv": ("", "there are no labels in it"),
    "short.csv": ("1\n", r"3 images but labels of shape \(1,\)"),
    "long.csv": ("1\n" * 5, r"3 images but labels of shape \(5,\)"),
    "ragged.csv": ("1,2\n1\n1,2\n", "label 2 has 1 columns where label 1 has 2"),
    "mixed.csv": ("a,1\nb,2\nc,3\n", "label 'a' and others: several columns must be numbers"),
    "nan.csv": ("nan\n1\n1\n", "class number nan: it must be whole"),
    "giant.csv": (f"{'x' * 200}\na\nb\n", "a label has 200 characters: at most 100"),
    "field.csv": (f"{'x' * 200_000}\na\nb\n", r"is not a \.csv file: field larger"),
    "huge.csv": (b"1" * (2**24 + 1), "is too large: give at most 16777216 bytes, or save them as"),
    "binary.csv": (b"\x89PNG\r\n\x1a\n\xff", r"is not a \.csv file: it is a PNG image"),
    "object.json": ('{"a.png": 1}', "it must be a list, with the label of each image"),
    "cut.json": ("[1, 2", "is not JSON"),
    "null.json": ("[1, null, 2]", r"label \[None\]: it must be a number, a word or a list of"),
    "deep.json": ("[1, [[2]], 2]", r"label \[\[2\]\]: it must be a number"),
    "missing.csv": ("a.png,1\nb.png,2\n", "there is no label of c/d.png: its first column must"),
    "twice.csv": ("a.png,1\na.png,2\n", "1 file names occur twice"),
    "alone.csv": ("a.png\nb.png\nc/d.png\n", "label 1 has 0 columns"),
    "list.json": ("[1, 2, 3]", "it must be an object with file names as keys"),
}


@pytest.mark.parametrize("table", BAD_TABLES)
def test_tables_that_do_not_fit_are_named(tmp_path, table: str) -> None:
    content, message = BAD_TABLES[table]
    path = tmp_path / table
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    np.save(tmp_path / "images.npy", COLOURS[:3])
    for name in NAMES:
        put(tmp_path / "images" / name)
    keyed = table.split(".")[0] in ("missing", "twice", "alone", "list")
    where = f"folder:{tmp_path}/images" if keyed else f"npy:{tmp_path}/images.npy"
    with pytest.raises(InputError, match=f"^{path}:? {message}"):
        data.load(f"{where}:labels={path}")


def test_a_folder_without_classes_has_no_context(tmp_path) -> None:
    for name in "ba":
        put(tmp_path / f"{name}.png", Image.new("RGB", (8, 8), (ord(name), 0, 0)))
    found = data.load(f"folder:{tmp_path}")
    assert found.images[:, 0, 0, 0].tolist() == [ord("a"), ord("b")]
    np.testing.assert_array_equal(found.labels, np.zeros((2, 1)))


@pytest.mark.parametrize("place", ["x.png", "class/x.png", "class"])
def test_links_out_of_a_folder_are_refused(tmp_path, place: str) -> None:
    put(tmp_path / "images" / "class" / "y.png")
    put(tmp_path / "secret" / "x.png")
    link = tmp_path / "images" / place
    if place == "class":
        (link / "y.png").unlink()
        link.rmdir()
    link.symlink_to(tmp_path / "secret" / (link.name if link.suffix else ""))
    with pytest.raises(InputError, match=f"^{link} is a link out of {tmp_path}/images: put the im"):
        data.load(f"folder:{tmp_path}/images")


def test_links_within_a_folder_are_followed(tmp_path) -> None:
    put(tmp_path / "images" / "a" / "x.png")
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "y.png").symlink_to("../a/x.png")
    (tmp_path / "link").symlink_to("images")
    assert data.load(f"folder:{tmp_path}/link").class_names == ("a", "b")


# ---------------------------------------------------------------------------- sheets, archives


@pytest.mark.parametrize("gap", [0, 1])
def test_a_sheet_is_cut_into_tiles(tmp_path, gap: int) -> None:
    """Leave out the tile of one colour in the middle."""
    whole = np.full((2 * 8 + gap, 3 * 8 + 2 * gap, 3), 255, np.uint8)
    for at, image in zip((0, 1, 2, 3, 5), COLOURS, strict=False):
        y, x = at // 3 * (8 + gap), at % 3 * (8 + gap)
        whole[y : y + 8, x : x + 8] = image
    put(tmp_path / "sheet.png", Image.fromarray(whole))
    (tmp_path / "labels.csv").write_text("cat\ncat\ndog\ndog\ndog\n")
    found = data.load(f"sheet:{tmp_path}/sheet.png:tile=8:gap={gap}:labels={tmp_path}/labels.csv")
    np.testing.assert_array_equal(found.images, COLOURS[:5])
    assert found.labels.argmax(1).tolist() == [0, 0, 1, 1, 1]
    if not gap:
        tall = data.load(f"sheet:{tmp_path}/sheet.png:tile=16,8:size=8:channels=1").images
        assert tall.shape == (3, 8, 8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "tile=16",
            r"sheet\.png has size \(8, 24\): that is not a whole number of tiles of",
        ),
        (
            "tile=8:gap=1",
            r"number of tiles of \(8, 8\) with gap=1: .* tile=N or tile=H",
        ),
        ("tile=0", "tile=0:gap=0: give pixels, at least 1 for a tile"),
        ("tile=8,8,8", "tile=8,8,8:gap=0: give pixels"),
        ("tile=8:gap=-1", "gap=-1: give pixels"),
        ("tile=8", r"sheet\.png: every tile has one colour: give a sheet of pictures"),
    ],
)
def test_sheets_that_cannot_be_cut_are_named(tmp_path, options: str, message: str) -> None:
    put(tmp_path / "sheet.png", Image.new("RGB", (24, 8)))
    with pytest.raises(InputError, match=message):
        data.load(f"sheet:{tmp_path}/sheet.png:{options}")


def test_arrays_of_an_archive(tmp_path) -> None:
    words = np.array(["b", "a", "b", "b", "a", "a"])
    np.savez_compressed(tmp_path / "x.npz", images=COLOURS, labels=words, grey=COLOURS[..., 0])
    found = data.load(f"npz:{tmp_path}/x.npz")
    np.testing.assert_array_equal(found.images, COLOURS)
    np.testing.assert_array_equal(found.labels, np.eye(2)[[1, 0, 1, 1, 0, 0]])
    assert found.class_names == ("a", "b")
    other = data.load(f"npz:{tmp_path}/x.npz:images=grey:labels=none:size=4:held_out=0.5")
    assert other.images.shape == (3, 4, 4, 1)
    assert not other.labels.any()


def bomb(path: Path) -> None:
    np.savez_compressed(path, images=np.zeros((2**12, 128, 128), np.uint8), labels=COLOURS)


def archive_of(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def cut(path: Path) -> None:
    np.savez(path, images=COLOURS)
    path.write_bytes(path.read_bytes()[:-30])


def changed(path: Path) -> None:
    np.savez(path, images=COLOURS)
    held = bytearray(path.read_bytes())
    held[300] ^= 255
    path.write_bytes(held)


BAD_ARCHIVES: dict[str, tuple] = {
    "missing": (lambda path: None, "No such file"),
    "folder": (Path.mkdir, "is not a file"),
    "empty": (Path.touch, r"is not a \.npz file: it is empty: give arrays, as np\.savez"),
    "array": (
        lambda path: np.save(path.open("wb"), COLOURS),
        r"is not a \.npz file: it is a \.npy array: .* npy:images=FILE",
    ),
    "cut": (cut, r"is not a \.npz file of numbers: "),
    "changed": (changed, r"is not a \.npz file of numbers: Bad CRC"),
    "other names": (
        archive_of(x_train=COLOURS, y_train=COLOURS),
        r"holds no array images: choose from x_train, y_train with images=NAME:labels=NAME",
    ),
    "no labels": (archive_of(images=COLOURS), "holds no array labels: .*, or labels=none"),
    "bomb": (bomb, r"has \d+ bytes, but images claims 67108992: save it as a \.npy"),
    "objects": (
        archive_of(images=np.array([{}, None]), labels=np.arange(2)),
        r"is not a \.npz file of numbers: Object arrays cannot be loaded",
    ),
    "floats": (
        archive_of(images=COLOURS / 255, labels=np.arange(6)),
        "images: images of type float64: they must be uint8",
    ),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_archives_that_do_not_fit_are_named(tmp_path, kind: str) -> None:
    write, message = BAD_ARCHIVES[kind]
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(InputError, match=f"^{path}:? {message}"):
        data.load(f"npz:{path}")


# ---------------------------------------------------------------------------------- libraries


def test_digits_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    found = data.load("digits")
    assert found.images.shape == (1797, 8, 8, 1)
    np.testing.assert_allclose(found.images[..., 0] / 255, sklearn.images / 16, atol=1 / 500)
    assert [found.class_names[at] for at in found.labels.argmax(1)] == [*map(str, sklearn.target)]
    assert data.load("digits:size=12:fit=pad").images[0, :2].max() == 0


@pytest.mark.parametrize(
    ("kind", "module"), [("digits", "sklearn.datasets"), ("hf:name=x", "datasets")]
)
def test_a_library_that_is_not_installed_is_named(monkeypatch, kind: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"is not installed: pip install '\.\[(digits|hf)\]'"):
        data.load(kind)


@pytest.fixture(scope="module")
def hugging(tmp_path_factory) -> Path:
    """Make the data set in each form that it has on a disk."""
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hugging")
    features = library.Features(
        image=library.Image(),
        label=library.ClassLabel(names=["cat", "dog"]),
        word=library.Value("string"),
        vector=library.List(library.Value("float32")),
    )
    columns = {
        "image": [Image.fromarray(image) for image in COLOURS],
        "label": [0, 1, 1, 0, 0, 1],
        "word": [*"bababa"],
        "vector": [[0.5, number] for number in range(6)],
    }
    whole = library.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(folder / "one")
    library.DatasetDict(train=whole, test=whole.select([1, 0])).save_to_disk(folder / "two")
    (folder / "parquet").mkdir()
    whole.to_parquet(folder / "parquet" / "train.parquet")
    for name, image in zip(("cat/x.png", "dog/y.png"), COLOURS, strict=False):
        put(folder / "images" / name, Image.fromarray(image))
    return folder


HUGGING: dict[str, tuple] = {  # which images, their labels, class names
    "one": (range(6), [0, 1, 1, 0, 0, 1], ("cat", "dog")),
    "two:split=test": ([1, 0], [1, 0], ("cat", "dog")),
    "parquet": (range(6), [0, 1, 1, 0, 0, 1], ("cat", "dog")),
    "images": ([0, 1], [0, 1], ("cat", "dog")),
    "one:label=word": (range(6), [1, 0, 1, 0, 1, 0], ("a", "b")),
}


@pytest.mark.parametrize("name", HUGGING)
def test_data_of_hugging_face(hugging, name: str) -> None:
    chosen, labels, names = HUGGING[name]
    found = data.load(f"hf:name={hugging}/{name}")
    np.testing.assert_array_equal(found.images, COLOURS[list(chosen)])
    np.testing.assert_array_equal(found.labels, np.eye(2)[labels])
    assert found.class_names == names


def test_vectors_of_hugging_face(hugging) -> None:
    found = data.load(f"hf:name={hugging}/one:label=vector:size=4:channels=1")
    assert found.images.shape == (6, 4, 4, 1)
    np.testing.assert_array_equal(found.labels, [[0.5, number] for number in range(6)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("one:image=photo", "no column photo: choose from image, label, word, vector with image=N"),
        ("one:image=word", "there are no images in column word: give image=NAME"),
        ("two:split=valid", "has no split valid: choose from train, test"),
        ("nowhere", "nowhere:split=train cannot be read: "),
    ],
)
def test_data_of_hugging_face_that_do_not_fit(hugging, options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load(f"hf:name={hugging}/{options}")


# ----------------------------------------------------------------------------------- summary


def dataset(count: int, labels: np.ndarray, *names: str) -> Dataset:
    images = np.zeros((count, 16, 12, 1), np.uint8)
    return Dataset(images, np.float32(labels), names)


WIDE = [f"class{number}" for number in range(20)]
SUMMARIES = {  # data, the line, and counts of classes
    "classes": (
        dataset(1000, np.eye(2)[[0] * 999 + [1]], "cat", "dog"),
        "1,000 images of 16x12, grey; 2 classes: cat 999, dog 1",
        {"cat": 999, "dog": 1},
    ),
    "none": (dataset(3, np.zeros((3, 1)), "class0"), "3 images of 16x12, grey; no classes", {}),
    "mixed": (
        dataset(2, [[0.5, 0.5], [1, 0]], "cat", "dog"),
        "2 images of 16x12, grey; contexts of 2 numbers",
        {},
    ),
    "many": (
        dataset(20, np.eye(20), *WIDE),
        f"20 images of 16x12, grey; 20 classes: {' 1, '.join(WIDE[:16])} 1, ...",
        dict.fromkeys(WIDE, 1),
    ),
}


@pytest.mark.parametrize("kind", SUMMARIES)
def test_a_summary_counts_images_and_classes(tmp_path, kind: str) -> None:
    found, line, counts = SUMMARIES[kind]
    assert data.describe(found) == line
    write_summary(tmp_path, found)
    written = json.loads((tmp_path / "data.json").read_text())
    assert written["classes"] == counts
    assert [written[key] for key in ("images", "height", "width", "channels")] == [
        *found.images.shape
    ]
    with Image.open(tmp_path / "data.png") as picture:
        assert picture.width >= 12


def test_the_picture_of_a_summary_has_a_row_for_each_class(tmp_path) -> None:
    colours = np.uint8([[255, 0, 0], [0, 255, 0]])
    owner = np.array([0] * 20 + [1] * 3)
    images = np.broadcast_to(colours[owner][:, None, None], (23, 16, 16, 3))
    write_summary(tmp_path, Dataset(images, np.eye(2, dtype=np.float32)[owner], ("a", "b")))
    with Image.open(tmp_path / "data.png") as picture:
        pixels = np.asarray(picture).reshape(-1, 3)
    shown = [np.all(pixels == colour, 1).sum() / 96**2 for colour in colours]
    assert shown == [8, 3], "images of a class at 6 times their size"


# ------------------------------------------------------------------------------ docs/data.md
PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
ROWS = dict(re.findall(r"^\| .+ \| `--data=(.+?)` \| (.+) \|$", PAGE, re.MULTILINE))
LIBRARIES = {"digits": "sklearn", "hf": "datasets"}


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory) -> Path:
    """Run the lines of the page that make its files."""
    folder, before = tmp_path_factory.mktemp("page"), Path.cwd()
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    os.chdir(folder)
    try:
        exec(compile(code[1], "docs/data.md", "exec"), {})
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("text", ROWS)
def test_the_page_states_what_each_command_finds(monkeypatch, page_folder, text: str) -> None:
    assert len(ROWS) > 30
    if library := LIBRARIES.get(text.split(":")[0]):
        pytest.importorskip(library)
    monkeypatch.chdir(page_folder)
    try:
        found = data.load(text)
        Config().fill_in(found)
        outcome = data.describe(found)
    except InputError as error:
        outcome = f"refused: {error}".replace(f"{page_folder}/", "")
    assert outcome == ROWS[text]


def test_the_vectors_of_the_page_fit_its_images(page_folder) -> None:
    names = tuple(f"class{number}" for number in range(32))
    wanted = contexts.parse(f"{page_folder}/wanted.npy", names)
    stored = data.load(f"npy:{page_folder}/images.npy:{page_folder}/sentences.npy").labels
    assert np.any(np.all(np.isclose(stored, wanted[0]), axis=1)), "a hero was seen in training"
    assert not np.any(np.all(np.isclose(stored, wanted[1]), axis=1))
