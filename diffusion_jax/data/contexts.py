"""Context vectors as people write them: class names, mixtures of them, or plain numbers."""

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from diffusion_jax.files import load_npy
from diffusion_jax.typing import InputError, require


def parse(text: str, class_names: tuple[str, ...]) -> Float32[ndarray, "context feature"]:
    """Return contexts separated by ";": "hero; food=0.6,spell=0.4; 1,0,0.6,0,0; none".

    Each context is a list of class names with or without weights, a number for each class, or
    none. The name of a .npy file stands for its rows. Raise InputError naming a part that is
    invalid or ambiguous.
    """
    if text.endswith(".npy") and text not in class_names:
        return _rows(text, len(class_names))
    parts = [part.strip() for part in text.split(";") if part.strip()]
    require(parts, f"context={text!r} is empty: {_advice(class_names)}")
    with np.errstate(over="ignore"):  # overflow gives infinity, which is refused
        vectors = np.array([_vector(part, class_names) for part in parts], np.float32)
    for part, vector in zip(parts, vectors, strict=True):
        fits = np.all(np.isfinite(vector))
        require(fits, f"context {part!r} is too large for float32: take numbers around 1")
    return vectors


def by_class(class_names: tuple[str, ...]) -> dict[str, Float32[ndarray, "feature"]]:
    """Return the one-hot context of each class."""
    return dict(zip(class_names, np.eye(len(class_names), dtype=np.float32), strict=True))


def _rows(path: str, width: int) -> Float32[ndarray, "context feature"]:
    stored = load_npy(path)
    fits = stored.ndim == 2 and len(stored) and stored.dtype.kind in "biuf"
    fits = fits and stored.shape[1] == width
    words = f"{stored.dtype} of shape {stored.shape}: give numbers of shape (contexts, {width})"
    require(fits, f"context={path}: {words}")
    with np.errstate(over="ignore"):
        vectors = stored.astype(np.float32)
    require(np.all(np.isfinite(vectors)), f"context={path}: some numbers are not finite")
    return vectors


def _vector(part: str, class_names: tuple[str, ...]) -> list[float]:
    if part == "none":
        return [0.0] * len(class_names)
    fields = [part] if part in class_names else [field.strip() for field in part.split(",")]
    named = all(field in class_names for field in fields)
    numbers = [value for field in fields if (value := _number(field)) is not None]
    numeric = len(numbers) == len(fields)
    if named and numeric and len(fields) == len(class_names) > 1:
        raise InputError(
            f"context {part!r} could be names or numbers: write {fields[0]}=1 for the class, or "
            f"{numbers[0]:.2f} for the number"
        )
    if numeric and not named:
        fits = len(numbers) == len(class_names)
        require(fits, f"context {part!r} has {len(numbers)} numbers: {_advice(class_names)}")
        return numbers
    return _mixture(fields, class_names)


def _mixture(fields: list[str], class_names: tuple[str, ...]) -> list[float]:
    """Return the sum of weighted classes. A field is a name, or name=weight."""
    vector = [0.0] * len(class_names)
    for field in fields:
        name, equals, weight = (word.strip() for word in field.partition("="))
        if field in class_names:
            name, equals = field, ""
        value = _number(weight) if equals else 1.0
        if name not in class_names or value is None:
            raise InputError(f"context {field!r} is not understood: {_advice(class_names)}")
        vector[class_names.index(name)] += value
    return vector


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _advice(class_names: tuple[str, ...]) -> str:
    if not class_names:
        return "this model has no classes: write none"
    names = ", ".join(class_names)
    return f"write {len(class_names)} numbers, or names of {names}, such as {class_names[0]}=0.6"
