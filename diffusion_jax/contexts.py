"""Context vectors as people write them: class names, mixtures of them, or plain numbers."""

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from diffusion_jax.typing import InputError


def parse(text: str, class_names: tuple[str, ...]) -> Float32[ndarray, "context feature"]:
    """Contexts separated by ";": "hero; food=0.6,spell=0.4; 1,0,0.6,0,0; none".

    Each is a list of class names with or without a weight, a number for each class, or none.
    Raises InputError naming the part that cannot be read, or that can be read in two ways.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        raise InputError(f"context={text!r} is empty: {_advice(class_names)}")
    with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused
        vectors = np.array([_vector(part, class_names) for part in parts], np.float32)
    for part, vector in zip(parts, vectors, strict=True):
        if not np.all(np.isfinite(vector)):
            raise InputError(f"context {part!r} is too large for float32: take numbers around 1")
    return vectors


def by_class(class_names: tuple[str, ...]) -> dict[str, Float32[ndarray, "feature"]]:
    """The one-hot context of each class."""
    return dict(zip(class_names, np.eye(len(class_names), dtype=np.float32), strict=True))


def _vector(part: str, class_names: tuple[str, ...]) -> list[float]:
    fields = [part] if part in class_names else [field.strip() for field in part.split(",")]
    vector = [0.0] * len(class_names)
    if part == "none":
        return vector
    named = all(field in class_names for field in fields)
    numbers = [_number(field) for field in fields]
    if named and len(fields) == len(class_names) > 1 and None not in numbers:
        raise InputError(
            f"context {part!r} could be names or numbers: write {fields[0]}=1 for the class, or "
            f"{numbers[0]:.2f} for the number"
        )
    if None not in numbers and not named:
        if len(numbers) != len(class_names):
            raise InputError(f"context {part!r} has {len(numbers)} numbers: {_advice(class_names)}")
        return [float(number) for number in numbers if number is not None]
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
