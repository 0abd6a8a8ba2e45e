"""Labels of images: class numbers, words or vectors, from .npy, .csv and .json files."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from diffusion_jax.data.dataset import FEATURES, LONGEST, check_rows
from diffusion_jax.data.sprites import CLASS_NAMES
from diffusion_jax.files import explain, load_npy, open_file, read_json
from diffusion_jax.typing import InputError, require

MOST = 2**24  # bytes of a .csv or .json file
Labels = tuple[ndarray, tuple[str, ...]]  # context vectors (N, feature), and names


def default_class_names(count: int) -> tuple[str, ...]:
    """Return names for a number of classes: the course's names if there are five."""
    return CLASS_NAMES if count == len(CLASS_NAMES) else tuple(f"class{i}" for i in range(count))


def read_labels(
    path: str, count: int, names: Sequence[str] = (), files: Sequence[str] = ()
) -> Labels:
    """Read the labels of `count` images from a file. Without a path, every label is zero.

    A .npy file holds an array as in context_vectors. The rows of a .csv file hold the same: a class
    number, a word, or a vector; a first row above them names the features. A .json file is a list
    of such rows. files: the names of the images. The first column of a .csv file must then be a
    file name, and a .json file must be an object with file names as keys.
    Raise InputError naming the file and the fault.
    """
    if not path:
        return context_vectors(None, path, count, names)
    kind = Path(path).suffix.lower()
    if kind not in (".csv", ".json"):
        return context_vectors(load_npy(path), path, count, names)
    rows = _csv_rows(path) if kind == ".csv" else _json_rows(path, keyed=bool(files))
    require(rows, f"{path}: there are no labels in it: give a row for each image")
    head: list[Any] = []
    if files:
        head, rows = _by_file(rows, files, path)
    elif kind == ".csv" and len(rows) == count + 1:
        head, *rows = rows
    values = _values(rows, path)
    if values.ndim == 2 and not names:
        names = tuple(map(str, head))
    return context_vectors(values, path, count, names)


def context_vectors(
    labels: ndarray | None, path: str, count: int, names: Sequence[str] = ()
) -> Labels:
    """Return context vectors from stored labels, and the names of their features.

    labels: (count, feature) numbers, or (count,) class numbers or words; None for zeros. Without
    names, the classes are the words or numbers that occur. They are named after these, or have the
    course's names if they are 0..4.
    """
    names = tuple(names)
    if labels is None:
        return np.zeros((count, len(names) or 1), np.float32), names or default_class_names(1)
    shape = f"{path}: labels of shape {labels.shape}"
    known = labels.dtype.kind in "biufU"
    require(known, f"{path}: labels of type {labels.dtype}: they must be numbers or words")
    must = "they must be (N, features), or (N,) class numbers or words"
    require(labels.ndim in (1, 2), f"{shape}: {must}")
    check_rows(count, labels, path)
    if labels.dtype.kind == "U":
        require(labels.ndim == 1, f"{shape} of words: {must}")
        return _one_hot_of_words(labels, path, names)
    require(
        labels.ndim == 1 or labels.shape[1] <= FEATURES, f"{shape}: at most {FEATURES} features"
    )
    with np.errstate(all="ignore"):  # overflow gives infinity, which is refused
        vectors = np.asarray(labels, np.float32)
        whole = np.all(labels == np.rint(labels)) and np.any(labels > 1)
    if labels.ndim == 2 and labels.shape[1] == 1:
        clear = labels.dtype.kind != "f" or not whole
        advice = "give class numbers as integers, or scale a feature to around 1"
        require(clear, f"{shape} of whole numbers: {advice}")
        labels = labels if labels.dtype.kind == "f" else labels[:, 0]
    if labels.ndim == 1:
        return _one_hot(labels, path, names)
    return vectors, names or default_class_names(vectors.shape[1])


def _one_hot(labels: ndarray, path: str, names: tuple[str, ...]) -> Labels:
    """Return one-hot rows and class names. With names, class numbers (N,) count from 0 or 1."""
    values = np.asarray(labels, np.float64)
    bad = values[~((values >= 0) & (values < FEATURES) & (values == np.rint(values)))]
    if len(bad):
        must = f"it must be whole, in 0..{FEATURES - 1}"
        raise InputError(f"{path}: class number {bad[0]:g}: {must}")
    found, place = np.unique(values.astype(int), return_inverse=True)
    if not names:
        course = np.array_equal(found, np.arange(len(CLASS_NAMES)))
        names = CLASS_NAMES if course else tuple(f"class{number}" for number in found)
        return np.eye(len(found), dtype=np.float32)[place], names
    first = int(0 not in found and found.max(initial=0) == len(names))
    if found.max(initial=0) - first >= len(names):
        raise InputError(
            f"{path}: class number {found[-1]}, but there are {len(names)} class names: "
            f"it must be in 0..{len(names) - 1}"
        )
    return np.eye(len(names), dtype=np.float32)[found[place] - first], names


def _one_hot_of_words(words: ndarray, path: str, names: tuple[str, ...]) -> Labels:
    """Return one-hot rows and class names, in alphabetical order if none are given."""
    found = sorted(set(words.tolist()))
    names = names or tuple(found)
    number = {name: at for at, name in enumerate(names)}
    strange = [word for word in found if word not in number]
    must = f"it must be one of {', '.join(names)}"
    require(not strange, f"{path}: class {strange[:1]}: {must}")
    require(len(names) <= FEATURES, f"{path}: {len(names)} classes: at most {FEATURES}")
    return np.eye(len(names), dtype=np.float32)[[number[word] for word in words.tolist()]], names


def _csv_rows(path: str) -> list[list[str]]:
    """Return the rows of a .csv file, with commas, semicolons or tabs between cells."""
    try:
        with open_file(path) as file:
            data = file.read(MOST + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    most = f"at most {MOST} bytes, or save them as a .npy file"
    require(len(data) <= MOST, f"{path} is too large: give {most}")
    try:
        text = data.decode("utf-8-sig")
        mark = max(",;\t", key=text.partition("\n")[0].count)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        return [[cell.strip() for cell in row] for row in rows if any(row)]
    except UnicodeDecodeError:
        advice = explain(data, "save it as CSV in UTF-8")
        raise InputError(f"{path} is not a .csv file: {advice}") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a .csv file: {error}") from None


def _json_rows(path: str, keyed: bool) -> list[list[Any]]:
    """Return the rows of a .json file. keyed: the file is an object, and keys are first cells."""
    try:
        content = read_json(path, MOST)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    kind, must = (dict, "an object with file names as keys") if keyed else (list, "a list")
    require(isinstance(content, kind), f"{path}: it must be {must}, with the label of each image")
    found = content.values() if keyed else content
    rows = [each if isinstance(each, list) else [each] for each in found]
    bad = [cell for row in rows for cell in row if not isinstance(cell, str | int | float)]
    require(not bad, f"{path}: label {bad[:1]}: it must be a number, a word or a list of numbers")
    return [[key, *row] for key, row in zip(content, rows, strict=True)] if keyed else rows


def _by_file(
    rows: list[list[Any]], files: Sequence[str], path: str
) -> tuple[list[Any], list[list[Any]]]:
    """Return the rows of these files, without their names, and the row that names the columns."""
    table = {row[0]: row[1:] for row in rows}
    count = len(rows) - len(table)
    require(not count, f"{path}: {count} file names occur twice: give one row for each image")
    missing = [file for file in files if file not in table]
    if missing:
        words = "its first column must hold the name of each image in the folder"
        raise InputError(f"{path}: there is no label of {missing[0]}: {words}")
    head = [] if rows[0][0] in {*files} else rows[0][1:]
    return head, [table[file] for file in files]


def _values(rows: list[list[Any]], path: str) -> ndarray:
    """Return cells as numbers (N, feature), or as class numbers or words (N,)."""
    width = len(rows[0])
    for at, row in enumerate(rows, 1):
        fits = len(row) == width > 0
        require(fits, f"{path}: label {at} has {len(row)} columns where label 1 has {width}")
    try:
        numbers = np.array([[float(cell) for cell in row] for row in rows])
        return numbers[:, 0] if width == 1 else numbers
    except (ValueError, OverflowError):
        cells = [str(cell) for row in rows for cell in row]
    if width > 1:
        must = "several columns must be numbers; words take one column"
        raise InputError(f"{path}: label {cells[0]!r} and others: {must}")
    long = max(map(len, cells))
    require(long <= LONGEST, f"{path}: a label has {long} characters: at most {LONGEST}")
    return np.array(cells)
