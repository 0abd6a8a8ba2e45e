r"""The grammar of every choice: a component is a name and its options.

    unipc:10:order=3:grid=karras:rho=5

A registry is a plain dict of functions or dataclasses. The parameters of an entry are its options:
they give the types, the defaults and, with the docstring, the help. Values without a name fill the
parameters in order. A parameter of type Annotated[..., REGISTRY] is a part: a component of its own
(the grid of a sampler), whose options may follow in the same text. `\:` is a colon in a value.
"""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from diffusion_jax.typing import InputError, require

Component = Callable[..., Any]
Registry = Mapping[str, Component]
HIDDEN = ("parent", "name")  # fields of every Flax module


class Spec(NamedTuple):
    """A component of a registry and its options, as given; the options of a part are a Spec."""

    name: str
    component: Component
    options: dict[str, Any]
    common: Component | None = None  # its parameters are options of every entry, and come first

    def __str__(self) -> str:
        """Return the canonical text: it parses to this spec, and leaves out default values."""
        return self._text(lambda value, default: value != default)

    @property
    def full(self) -> str:
        """The text with every option, those that have their default included."""
        return self._text(lambda value, default: True)

    def _text(self, told: Callable[[Any, Any], bool]) -> str:
        first = list(parameters(self.common))[:1] if self.common else []
        words, parts = [self.name], []
        known = (parameters(self.common) if self.common else {}) | parameters(self.component)
        for key, option in known.items():
            value = self.options.get(key, option.default)
            if isinstance(value, Spec):
                parts.append(f"{key}={value._text(told)}")
            elif value is not option.empty and not callable(value) and told(value, option.default):
                words.append(_write(value) if key in first else f"{key}={_write(value)}")
        return ":".join([*words, *parts])

    @property
    def slug(self) -> str:
        """The canonical text as a file name."""
        return re.sub(r"[^\w.,=+-]+", "-", str(self))

    def bind(self) -> Component:
        """Return the component with its options bound; a part becomes a bound component."""
        values = {k: v.bind() if isinstance(v, Spec) else v for k, v in self.options.items()}
        return partial(self.component, **values) if values else self.component


def choose(registry: Mapping[str, Any], what: str, name: str) -> Any:
    """Return an entry of a registry. Raise InputError naming the nearest ones if it is missing."""
    require(name in registry, f"{what}={name!r} is unknown: {_suggest(name, registry)}")
    return registry[name]


def parse(
    text: str,
    registry: Registry,
    what: str,
    supplied: Iterable[str] = (),
    common: Component | None = None,
) -> Spec:
    """Return the spec that a text describes.

    what: the flag or field that holds the text, for errors.
    supplied: parameters that the caller fills in. common: a function whose parameters every entry
    of the registry takes, before its own.
    Raise InputError for an unknown name or option, and for a value of the wrong type.
    """
    name, *words = re.split(r"(?<!\\):", text)
    where = f"{what}={text}"
    spec = Spec(name, choose(registry, what, name), {}, common)
    options = (parameters(common) if common else {}) | parameters(spec.component, supplied)
    owners = {key: (spec, option) for key, option in options.items()}
    order = iter(options)
    for word in words:
        key, equals, value = word.replace(r"\:", ":").partition("=")
        if not equals:
            key, value = next(order, ""), key
        require(key in owners, f"{where}: {_unknown(key or value, name, owners)}")
        owner, option = owners[key]
        require(key not in owner.options, f"{where}: {key} is given twice")
        owner.options[key] = _read(value, option, where)
        if isinstance(part := owner.options[key], Spec):
            inner = parameters(part.component, supplied)
            owners = {k: (part, v) for k, v in inner.items()} | owners
    return spec


def parameters(component: Component, supplied: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the options of a component by name: what can be written and is not supplied."""
    found = inspect.signature(component, eval_str=True).parameters
    hidden = {*HIDDEN, *supplied}
    return {k: v for k, v in found.items() if k not in hidden and _kinds(v.annotation)}


def check(component: Component, options: Mapping[str, Any], what: str) -> None:
    """Raise InputError unless a component takes options of these names and types."""
    known = inspect.signature(component, eval_str=True).parameters
    for key, value in options.items():
        require(key in known, f"{what}: {_unknown(key, what, known)}")
        kinds = _kinds(known[key].annotation)
        fits = not kinds or any(kind.holds(value) for kind in kinds)
        require(fits, f"{what}: {_wrong(key, value, known[key])}")


def describe(registry: Registry, supplied: Iterable[str] = (), width: int = 96) -> str:
    """Return the help of a registry: the options of each entry, their defaults, its first line."""
    lines = []
    for name, component in registry.items():
        options = parameters(component, tuple(supplied)).values()
        head = ":".join([name, *(f"{o.name}={_default(o)}" for o in options)])
        about = inspect.cleandoc(getattr(component, "func", component).__doc__ or "")
        first = " ".join(about.split("\n\n")[0].split())
        lines += textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="    ")
        lines += textwrap.wrap(first, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


class _Kind(NamedTuple):
    """A type that an option can have: its name, how to read a word, and what else is one."""

    label: str
    read: Callable[[str], Any]  # raises ValueError
    holds: Callable[[Any], bool]


def _kinds(annotation: Any) -> list[_Kind]:
    """Return the types of a parameter that a text can give, none for arrays and the like."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        registry = next(one for one in inner[1:] if isinstance(one, Mapping))
        return [_Kind(f"one of {', '.join(registry)}", partial(_part, registry), callable)]
    if origin in (Union, UnionType):
        return [kind for one in inner for kind in _kinds(one)]
    if origin is Literal:
        words = {_write(choice): choice for choice in inner}
        return [_Kind(", ".join(words), partial(_among, words), inner.__contains__)]
    if origin in (tuple, Sequence) and (parts := _kinds(inner[0])):
        label = f"{parts[0].label}, one or more, with commas between"
        return [_Kind(label, partial(_list, parts[0]), lambda v: isinstance(v, list | tuple))]
    return [PLAIN[annotation]] if annotation in PLAIN else []


def _part(registry: Registry, word: str) -> Spec:
    if word not in registry:
        raise ValueError
    return Spec(word, registry[word], {})


def _among(words: Mapping[str, Any], word: str) -> Any:
    if word not in words:
        raise ValueError
    return words[word]


def _list(kind: _Kind, word: str) -> tuple[Any, ...]:
    return tuple(kind.read(part) for part in word.split(",") if part)


def _number(word: str) -> float:
    if (value := float(word)) != value:
        raise ValueError
    return value


def _is_number(value: Any, kinds: Any = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


PLAIN = {
    bool: _Kind(
        "true or false",
        partial(_among, {"true": True, "false": False}),
        lambda value: isinstance(value, bool),
    ),
    int: _Kind("a whole number", int, partial(_is_number, kinds=int)),
    float: _Kind("a number", _number, _is_number),
    str: _Kind("a word", str, lambda value: isinstance(value, str)),
    NoneType: _Kind("none", partial(_among, {"none": None}), lambda value: value is None),
}


def _read(word: str, option: inspect.Parameter, where: str) -> Any:
    """Return the value that a word stands for. Raise InputError if it has the wrong type."""
    for kind in _kinds(option.annotation):
        try:
            return kind.read(word)
        except ValueError:
            continue
    raise InputError(f"{where}: {_wrong(option.name, word, option)}")


def _write(value: Any) -> str:
    """Return the word that stands for a value: the inverse of _read."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_write, value))
    return str(value).replace(":", r"\:")


def _wrong(key: str, value: Any, option: inspect.Parameter) -> str:
    labels = " or ".join(kind.label for kind in _kinds(option.annotation))
    return f"{key}={value}: it must be {labels}"


def _unknown(key: str, name: str, known: Iterable[str]) -> str:
    return f"{name} has no option {key}: {_suggest(key, known)}"


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}choose from {', '.join(known)}" if known else "it takes none"


def _default(option: inspect.Parameter) -> str:
    """Return an option's default for the help; of a part, the name of its entry."""
    if get_origin(option.annotation) is Annotated:
        registry = next(one for one in get_args(option.annotation) if isinstance(one, Mapping))
        return next(name for name, entry in registry.items() if entry is option.default)
    return "..." if option.default is option.empty else _write(option.default)
