"""Data from files: valid and refused input, messages, and the images of each step."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data.batches import indices
from diffusion_jax.data.frames import Frame
from diffusion_jax.data.image_folders import image_folder
from diffusion_jax.data.npy_files import npy_pair
from diffusion_jax.runs.config import Config
from diffusion_jax.typing import InputError, RunWarning

N = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
NUMBERS = np.array([0, 2, 1, 1, 0, 2])
ONE_HOT = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
MIXED = np.array([[0.5, 0.5, 0]] * 5 + [[0, -1, 2.5]])


def save(folder: Path, images=PIXELS, labels=None) -> tuple[str, str]:
    np.save(folder / "images.npy", images)
    if labels is None:
        return str(folder / "images.npy"), ""
    np.save(folder / "labels.npy", labels)
    return str(folder / "images.npy"), str(folder / "labels.npy")


# ------------------------------------------------------------------------------- .npy pairs


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (PIXELS, (N, 8, 8, 3)),
        (PIXELS[..., :1], (N, 8, 8, 1)),
        (PIXELS[..., 0], (N, 8, 8, 1)),
        (np.asfortranarray(PIXELS), (N, 8, 8, 3)),
    ],
    ids=["colour", "one-channel", "grey", "fortran"],
)
def test_images_are_the_files_own_and_in_memory(tmp_path, images, shape) -> None:
    read = npy_pair(*save(tmp_path, images)).images
    os.truncate(tmp_path / "images.npy", 100)  # a memory map of this file would end in SIGBUS
    assert read.dtype == np.uint8
    assert read.shape == shape
    np.testing.assert_array_equal(read.reshape(images.shape), images)


CLASSES = ("class0", "class1", "class2")
CYCLE = np.arange(N) % 5
COURSE = ("hero", "non-hero", "food", "spell", "side-facing")
LABELS: dict[str, tuple] = {  # (labels, given names) -> (context vectors, names)
    **{
        np.dtype(kind).name: (NUMBERS.astype(kind), (), ONE_HOT, CLASSES)
        for kind in (np.int8, np.uint8, np.int64, np.float16, np.float64)
    },
    "bool": (NUMBERS == 1, (), np.eye(2)[(NUMBERS == 1).astype(int)], CLASSES[:2]),
    "column": (NUMBERS[:, None], (), ONE_HOT, CLASSES),
    "bool column": (NUMBERS[:, None] > 0, (), np.eye(2)[np.minimum(NUMBERS, 1)], CLASSES[:2]),
    "feature": (NUMBERS[:, None] / 4, (), NUMBERS[:, None] / 4, ("class0",)),
    "flag": (np.minimum(NUMBERS, 1.0)[:, None], (), np.minimum(NUMBERS, 1)[:, None], ("class0",)),
    "from 1": (NUMBERS + 1, (), ONE_HOT, ("class1", "class2", "class3")),
    "gaps": (NUMBERS * 2 + 3, (), ONE_HOT, ("class3", "class5", "class7")),
    "from 1, named": (NUMBERS + 1, ("a", "b", "c"), ONE_HOT, ("a", "b", "c")),
    "more names": (NUMBERS, ("a", "b", "c", "d"), np.eye(4)[NUMBERS], ("a", "b", "c", "d")),
    "five from 1": (CYCLE + 1, (), np.eye(5)[CYCLE], tuple(f"class{i}" for i in range(1, 6))),
    "five from 0": (CYCLE, (), np.eye(5)[CYCLE], COURSE),
    "rows": (ONE_HOT.astype(np.float64), (), ONE_HOT, CLASSES),
    "mixed": (MIXED, (), MIXED, CLASSES),
    "half": (MIXED.astype(np.float16), (), MIXED, CLASSES),
    "words": (np.array(list("bcccab")), (), np.eye(3)[[1, 2, 2, 2, 0, 1]], (*"abc",)),
    "words, named": (np.array(list("baaaba")), ("b", "a"), np.eye(2)[[0, 1, 1, 1, 0, 1]], (*"ba",)),
    "five features": (np.zeros((N, 5)), (), np.zeros((N, 5)), COURSE),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_become_context_vectors_and_names(tmp_path, kind) -> None:
    labels, given, vectors, names = LABELS[kind]
    dataset = npy_pair(*save(tmp_path, labels=labels), given)
    np.testing.assert_array_equal(dataset.labels, np.float32(vectors), strict=True)
    assert dataset.class_names == names


def test_without_labels_every_context_is_zero(tmp_path) -> None:
    for given, names in (((), ("class0",)), (("a", "b"), ("a", "b"))):
        dataset = npy_pair(*save(tmp_path), given)
        np.testing.assert_array_equal(dataset.labels, np.zeros((N, len(names))))
        assert dataset.class_names == names


@pytest.mark.parametrize("size", [(8, 12), (20, 8)])
def test_images_may_be_rectangles(tmp_path, size) -> None:
    """Expect (height, width), in this order, from files, folders, and the configuration."""
    images = (np.arange(N * size[0] * size[1] * 3) % 251).astype(np.uint8).reshape(N, *size, 3)
    dataset = npy_pair(*save(tmp_path, images))
    np.testing.assert_array_equal(dataset.images, images)
    assert Config().fill_in(dataset).build_network().image_shape == (*size, 3)
    for index, image in enumerate(images):
        put(tmp_path / "folder" / "class" / f"{index}.png", Image.fromarray(image))
    np.testing.assert_array_equal(image_folder(str(tmp_path / "folder")).images, images)


def test_sizes_that_the_network_does_not_take_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"^width=10: give a multiple of 4 from 8 up; .* size=N"):
        Config().fill_in(npy_pair(*save(tmp_path, np.zeros((N, 8, 10), np.uint8))))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((N, 8, 8, 4), np.uint8), r"images of shape \(6, 8, 8, 4\): they must be"),
        (np.zeros((8, 8), np.uint8), r"images of shape \(8, 8\)"),
        (np.zeros((1, N, 8, 8, 3), np.uint8), r"images of shape \(1, 6, 8, 8, 3\)"),
        (np.uint8(3), r"images of shape \(\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "there are no images in it"),
        (PIXELS / 255, "images of type float64: they must be uint8, 0..255"),
        (PIXELS.astype(np.int16), "images of type int16: they must be uint8"),
        (np.full((N, 8, 8), "a"), "images of type <U1: they must be uint8"),
        ((PIXELS > 127).astype(np.uint8), "images of only 0 and 1: they must be 0..255"),
        (np.zeros((N, 0, 4), np.uint8), "there are no images in it"),
    ],
)
def test_images_that_do_not_fit_are_named(tmp_path, images, message) -> None:
    path, _ = save(tmp_path, images)
    with pytest.raises(InputError, match=f"^{path}: .*{message}"):
        npy_pair(path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (NUMBERS[:5], r"6 images but labels of shape \(5,\).*one row of labels for each image"),
        (np.zeros((7, 3)), r"6 images but labels of shape \(7, 3\)"),
        (np.zeros(0), r"6 images but labels of shape \(0,\)"),
        (np.int64(3), r"labels of shape \(\): they must be \(N, features\)"),
        (np.zeros((N, 3, 1)), r"labels of shape \(6, 3, 1\): they must be \(N, features\)"),
        (np.full((N, 3), np.nan), "labels must be finite numbers, some are NaN or infinite"),
        (np.full((N, 3), 1e300), "labels must be finite numbers, some are NaN or infinite"),
        (np.array([0, 1, np.nan, 0, 0, 0]), "class number nan: it must be whole, in 0..1023"),
        (np.array([0, 1, 2, 0, 0, -1]), "class number -1: it must be whole"),
        (np.array([0, 1, 2, 0, 0, 70_000]), "class number 70000: it must be whole"),
        (np.array([0, 0.5, 2, 0, 0, 0]), "class number 0.5: it must be whole"),
        (NUMBERS[:, None] * 1.0, r"labels of shape \(6, 1\) of whole numbers: give class numbers"),
        (np.full((N, 3), 1j), "labels of type complex128: they must be numbers"),
        (np.array([list("abcdef")] * N), r"labels of shape \(6, 6\) of words: .*\(N,\) class"),
        (np.array([*"abcde", "x" * 101]), "class name 'x*': give it a different one, of at most"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, message) -> None:
    images, path = save(tmp_path, labels=labels)
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        npy_pair(images, path)


def test_names_that_do_not_fit_the_labels_are_listed(tmp_path) -> None:
    with pytest.raises(InputError, match=r"2 class names \(a, b\) for 3 label columns"):
        npy_pair(*save(tmp_path, labels=ONE_HOT), ["a", "b"])
    with pytest.raises(InputError, match=r"class number 2, but there are 2 class names: .* 0\.\.1"):
        npy_pair(*save(tmp_path, labels=NUMBERS), ["a", "b"])


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("pickled", ["array", "bare"])
@pytest.mark.parametrize("where", ["images", "labels"])
def test_pickled_objects_are_refused_and_never_run(tmp_path, where, pickled) -> None:
    sprung = tmp_path / "sprung"
    paths = dict(zip(("images", "labels"), save(tmp_path, labels=NUMBERS), strict=True))
    if pickled == "array":
        np.save(paths[where], np.array([Trap(sprung)], object), allow_pickle=True)
    else:
        Path(paths[where]).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match=rf"{paths[where]} is not a \.npy file of numbers"):
        npy_pair(**paths)
    assert not sprung.exists()


def write_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, PIXELS)


def write_cut(path: Path, size: int) -> None:
    np.save(path, PIXELS)
    path.write_bytes(path.read_bytes()[:size])


NO_ARRAYS: dict[str, tuple] = {  # how to write the file, and the message
    "missing": (lambda path: path.unlink(), "there is no such file"),
    "folder": (lambda path: path.unlink() or path.mkdir(), "is not .* it is not a file"),
    "empty": (b"", "is not .* it is empty"),
    "text": (b"1,0,0\n", "is not .* it is a text file: give one array"),
    "broken zip": (b"PK\x03\x04 cut", "is not .* it is a ZIP archive"),
    "cut": (lambda path: write_cut(path, 700), r"is not .*: \S"),
    "cut header": (lambda path: write_cut(path, 60), "is not "),
    "archive": (write_archive, "is not .* it is a ZIP archive: give one array, as np.save writes"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "is not .* an HTML page: .* download the file itself"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is not .*: .* git lfs pull"),
    "png": (
        lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"),
        "is not .* it is a PNG image",
    ),
    "zeros": (bytes(9), "is not .* it is of an unknown kind"),
    "objects": (
        lambda path: np.save(path, np.array([PIXELS, None], object)),
        "is not .* it holds Python objects: make one array of numbers of them",
    ),
}


@pytest.mark.parametrize("where", ["images", "labels"])
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_files_that_are_no_arrays_are_named(tmp_path, where, kind) -> None:
    write, message = NO_ARRAYS[kind]
    paths = dict(zip(("images", "labels"), save(tmp_path, labels=NUMBERS), strict=True))
    if isinstance(write, bytes):
        Path(paths[where]).write_bytes(write)
    else:
        write(Path(paths[where]))
    with pytest.raises(InputError, match=f"^{paths[where]}:? {message}") as caught:
        npy_pair(**paths)
    assert "allow_pickle" not in str(caught.value)


# -------------------------------------------------------------------------- folders of images


def put(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_classes_and_files_are_in_alphabetical_order(tmp_path) -> None:
    for name, shade in (("wolf/b.png", 4), ("ant/z.png", 1), ("wolf/a.BMP", 3), ("cat/x.png", 2)):
        put(tmp_path / name, Image.new("RGB", (8, 8), (shade, 0, 0)))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    with pytest.warns(RunWarning, match=r"left out, because not an image: .*cat/notes\.txt$"):
        dataset = image_folder(str(tmp_path))
    assert dataset.class_names == ("ant", "cat", "wolf")
    assert dataset.images.shape == (4, 8, 8, 3)
    assert dataset.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(dataset.labels.argmax(1), [0, 1, 2, 2])
    np.testing.assert_array_equal(dataset.labels.sum(1), 1)


PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, 10, 20, 30])


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("RGB", (8, 8), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (55, 155, 255, 102)), (175, 215, 255)),  # 0.4 c + 0.6 * 255
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (Image.new("LA", (8, 8), (77, 0)), (255, 255, 255)),
        (Image.new("1", (8, 8), 0), (0, 0, 0)),
        (PALETTE, (10, 20, 30)),
    ],
    ids=["colour", "opaque", "clear", "translucent", "grey", "clear-grey", "bits", "palette"],
)
def test_every_kind_of_image_becomes_rgb_on_white(tmp_path, image, pixel) -> None:
    put(tmp_path / "a" / "x.png", image)
    images = image_folder(str(tmp_path)).images
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, np.broadcast_to(pixel, (1, 8, 8, 3)))


def test_a_transparent_colour_of_a_palette_is_white(tmp_path) -> None:
    put(tmp_path / "a" / "x.png", PALETTE, transparency=1)
    assert np.all(image_folder(str(tmp_path)).images == 255)


def test_image_size_scales_every_image(tmp_path) -> None:
    """Average blocks of 2 x 2 from 16 to 8, and repeat pixels from 4 to 8."""
    large = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    small = np.random.default_rng(2).integers(0, 256, (4, 4, 3), np.uint8)
    put(tmp_path / "a" / "large.png", Image.fromarray(large))
    put(tmp_path / "a" / "small.png", Image.fromarray(small))
    images = image_folder(str(tmp_path), Frame((8, 8))).images
    means = large.reshape(8, 2, 8, 2, 3).mean((1, 3))
    np.testing.assert_allclose(images[0], means, atol=1)  # Pillow rounds after each axis
    np.testing.assert_array_equal(images[1], small.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("kind", [".jpg", ".tif", ".png", ".webp"])
def test_images_are_turned_as_their_exif_data_say(tmp_path, kind: str) -> None:
    """Use orientation 6: the right side of the camera is the top of the scene."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # the left is white, and becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "a" / f"x{kind}", Image.fromarray(pixels), exif=exif)
    read = image_folder(str(tmp_path)).images[0]
    np.testing.assert_array_equal(read > 127, np.swapaxes(pixels, 0, 1) > 127)


@pytest.mark.parametrize("name", ["none", "x" * 101, "a\x1b[31m", "b\udcff"])
def test_class_folders_whose_names_cannot_be_shown_or_written(tmp_path, name: str) -> None:
    put(tmp_path / name / "x.png", Image.new("RGB", (8, 8)))
    with pytest.raises(
        InputError, match=r"class name '.*': give it a different one, of at most 100"
    ) as e:
        image_folder(str(tmp_path))
    assert str(e.value).removeprefix(str(tmp_path)).isascii()
    assert "\x1b" not in str(e.value)
    with pytest.raises(InputError, match=r"class name '.*': give it a different one"):
        Config(class_names=("x", name))


def nested(folder: Path) -> None:
    put(folder / "a" / "y.png", Image.new("RGB", (8, 8)))
    put(folder / "a" / "b" / "x.tif", Image.new("RGB", (8, 8)))


def two_sizes(folder: Path) -> None:
    put(folder / "a" / "x.png", Image.new("RGB", (8, 8)))
    put(folder / "b" / "y.png", Image.new("RGB", (12, 12)))


def mixed(folder: Path) -> None:
    put(folder / "a" / "x.png", Image.new("RGB", (8, 8)))
    put(folder / "y.png", Image.new("RGB", (8, 8)))


def cut_png(folder: Path) -> None:
    put(folder / "a" / "x.png", Image.effect_noise((64, 64), 50))
    data = (folder / "a" / "x.png").read_bytes()
    (folder / "a" / "x.png").write_bytes(data[: len(data) // 2])


def text_png(folder: Path) -> None:
    put(folder / "a" / "a.png", Image.new("RGB", (8, 8)))
    (folder / "a" / "x.png").write_text("no image")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: None, "no images in it: it must hold images, or one subfolder"),
        (lambda folder: (folder / "a").mkdir(), "no images in it"),
        (mixed, r"y\.png is not in the subfolder of a class: it must hold images, or one sub"),
        (nested, r"a/b/x\.tif is not in the subfolder of a class: it must hold images, or one su"),
        (
            two_sizes,
            r"b/y\.png has size \(12, 12\) where .*a/x\.png has \(8, 8\): .*size=N",
        ),
        (text_png, r"a/x\.png cannot be read as an image"),
        (cut_png, r"a/x\.png cannot be read as an image"),
        (lambda folder: put(folder / "a/x.png", Image.new("I;16", (8, 8))), "8 bits a channel"),
    ],
    ids=[
        *(
            "empty",
            "empty-class",
            "loose-and-class",
            "nested",
            "two-sizes",
            "text",
            "cut",
            "16-bit",
        ),
    ],
)
def test_folders_that_do_not_fit_are_named(tmp_path, fill, message) -> None:
    fill(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path}.*{message}"):
        image_folder(str(tmp_path))


# ------------------------------------------------------------------------------------- load


def test_load_finds_the_kind_of_data_by_what_lies_there(tmp_path) -> None:
    images, labels = save(tmp_path, labels=NUMBERS)
    names = ("x", "y", "z")
    pair = data.load(f"npy:{images}:{labels}:class_names=x,y,z")
    assert pair.class_names == names
    np.testing.assert_array_equal(pair.images, PIXELS)
    put(tmp_path / "folder" / "only" / "x.png", Image.new("RGB", (16, 16)))
    folder = data.load(f"folder:{tmp_path / 'folder'}:size=12")
    assert folder.class_names == ("only",)
    assert folder.images.shape == (1, 12, 12, 3)
    drawn = data.load("sprites:10:frequencies=0,0,1,0,0")
    assert drawn.class_names == data.CLASS_NAMES
    assert drawn.images.shape == (10, 16, 16, 3)
    assert drawn.labels.argmax(1).tolist() == [2] * 10


def test_held_out_images_are_no_training_images(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    images, labels = save(tmp_path, pixels, np.arange(10) % 5)
    text = f"npy:{images}:{labels}"
    whole = data.load(text)
    parts = data.split(whole, 0.3)
    assert [len(part.images) for part in parts] == [7, 3]
    rows = [row for part in parts for row in zip(part.images, part.labels, strict=True)]
    rows = {(image.tobytes(), label.tobytes()) for image, label in rows}
    assert rows == {
        (image.tobytes(), label.tobytes())
        for image, label in zip(whole.images, whole.labels, strict=True)
    }
    np.testing.assert_array_equal(data.load(f"{text}:held_out=0.3").images, parts[0].images)
    with pytest.raises(InputError, match=r"held_out=0\.04: that is 0 of 10 images: it must be nei"):
        data.load(f"{text}:held_out=0.04")
    with pytest.raises(InputError, match="sprites has no option held_out"):
        data.load("sprites:held_out=0.3")


def test_equal_images_stay_on_one_side_of_the_split(tmp_path) -> None:
    """Hold out 6 of 20 images, each with all of its 50 copies."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    images, _ = save(tmp_path, np.tile(pixels, (50, 1, 1, 1)))
    whole = data.load(f"npy:{images}")
    training, held_out = data.split(whole, 0.3)
    assert [len(part.images) for part in (training, held_out)] == [700, 300]
    sides = [{image.tobytes() for image in part.images} for part in (training, held_out)]
    assert [len(side) for side in sides] == [14, 6]
    assert not sides[0] & sides[1]
    images, _ = save(tmp_path, pixels[[0] * 10])
    with pytest.raises(InputError, match=r"held_out=0\.3: that is 3 of 10 .* 1 of the images dif"):
        data.load(f"npy:{images}:held_out=0.3")


CHANGED = {
    "fewer": (PIXELS[:4], NUMBERS[:4], "4 images, where there were 6"),
    "more": (np.tile(PIXELS, (2, 1, 1, 1)), np.tile(NUMBERS, 2), "12 images, where there were 6"),
    "one pixel": (
        PIXELS ^ (np.arange(PIXELS.size) == 7).reshape(PIXELS.shape),
        NUMBERS,
        "other images",
    ),
    "one label": (PIXELS, np.array([0, 2, 1, 1, 0, 1]), "other labels"),
    "labels' order": (PIXELS, NUMBERS[::-1], "other labels"),
    "order": (PIXELS[::-1], NUMBERS[::-1], "the same images in a different order"),
    "images' order": (PIXELS[::-1], NUMBERS, "other images"),
    "both": (255 - PIXELS, 2 - NUMBERS, "other images and other labels"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_data_that_changed_under_a_run_is_refused(tmp_path, change: str) -> None:
    images, labels = save(tmp_path, labels=NUMBERS)
    given = Config(data=f"npy:{images}:{labels}")
    run = given.fill_in(data.load(given.data))
    assert data.load(run.data, run.fingerprint).fingerprint == run.fingerprint
    pixels, numbers, message = CHANGED[change]
    save(tmp_path, pixels.astype(np.uint8), numbers)
    with pytest.raises(InputError, match=f"{message}: this is not the data of the run any more"):
        data.load(run.data, run.fingerprint)
    new = given.fill_in(data.load(given.data))
    assert f"data: {message}" in run.differences(new)


def test_the_same_data_may_be_moved_and_paths_become_absolute(tmp_path, monkeypatch) -> None:
    runs = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        save(Path(), labels=NUMBERS)
        given = Config(data="npy:images.npy:labels.npy")
        runs.append(given.fill_in(data.load(given.data)))
        here = tmp_path / place
        assert f"images={here / 'images.npy'}:labels={here / 'labels.npy'}" in runs[-1].data
    assert not runs[0].differences(runs[1])
    np.testing.assert_array_equal(data.load(runs[0].data).images, PIXELS)


def test_weights_from_elsewhere_have_no_training_images() -> None:
    with pytest.raises(InputError, match="these images are not recorded: name others with --data"):
        data.load("unknown")


# ---------------------------------------------------------------------------------- batches


def stream(seed: int, n: int, batch: int, epochs: int) -> np.ndarray:
    """Return epochs, one in each row, as training sees them in batches."""
    steps = -(-epochs * n // batch)
    order = indices(seed, n, batch, 0, steps)
    assert order.shape == (steps, batch)
    assert order.dtype == np.int32
    return order.reshape(-1)[: epochs * n].reshape(epochs, n)


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (3, 8), (1, 5), (7, 7), (101, 100)])
def test_every_epoch_visits_every_image_once(n: int, batch: int) -> None:
    np.testing.assert_array_equal(np.sort(stream(0, n, batch, 5), axis=1), [np.arange(n)] * 5)


def test_the_order_is_shuffled_anew_in_every_epoch_and_by_every_seed() -> None:
    orders = np.concatenate([stream(seed, 50, 8, 4) for seed in range(3)])
    assert len(np.unique(orders, axis=0)) == 12
    assert not np.any(np.all(orders == np.arange(50), axis=1))
    moved = np.abs(orders - np.arange(50)).mean()
    assert 12 < moved < 21, "a uniform shuffle moves an image by 50 / 3 places on average"


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (3, 8)])
def test_a_batch_does_not_depend_on_where_training_starts(n: int, batch: int) -> None:
    whole = indices(7, n, batch, 0, 30)
    for start, steps in ((0, 1), (1, 29), (13, 4), (29, 1)):
        np.testing.assert_array_equal(indices(7, n, batch, start, steps), whole[start:][:steps])
