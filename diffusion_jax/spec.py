r"""Specs: texts that choose a component by its name and options.

    unipc:10:order=3:grid=karras:rho=5

A registry is a plain dict of functions or dataclasses. The parameters of an entry are its options:
their annotations are the types, and together with the docstring they make the help. Values without
a name fill the parameters in order. A parameter of type Annotated[..., REGISTRY] is a part: a
component of its own, such as the grid of a sampler. The options of a part may follow in the same
text. Write `\:` for a colon in a value.
"""

import difflib
import inspect
import numbers
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from diffusion_jax.typing import InputError, require

Component = Callable[..., Any]
Registry = Mapping[str, Component]
FLAX = {"parent", "name"}  # fields of every Flax module, which are no options


class Spec(NamedTuple):
    """A component of a registry and the options given to it. The value of a part is also a Spec.

    known: all options that the component takes. unnamed: the option whose name is left out of the
    text.
    """

    name: str
    component: Component
    options: dict[str, Any]
    known: Mapping[str, inspect.Parameter]
    unnamed: str | None = None

    def __str__(self) -> str:
        """Return the canonical text, which parses to this spec and omits default values."""
        return self._text(lambda value, default: value != default)

    @property
    def full(self) -> str:
        """The text with every option, including those that have their default value."""
        return self._text(lambda value, default: True)

    def _text(self, shown: Callable[[Any, Any], bool]) -> str:
        words, parts = [self.name], []
        for key, option in self.known.items():
            value = self.options.get(key, option.default)
            if value is option.empty:
                continue
            if callable(value):  # a part left at its default
                value = _default_part(option)
            if isinstance(value, Spec):
                if shown(str(value), str(_default_part(option))):
                    parts.append(f"{key}={value._text(shown)}")
            elif shown(value, option.default):
                words.append(_write(value) if key == self.unnamed else f"{key}={_write(value)}")
        return ":".join([*words, *parts])

    @property
    def slug(self) -> str:
        """The canonical text, made safe as a file name."""
        return re.sub(r"[^\w.,=+-]+", "-", str(self))

    def bind(self) -> Component:
        """Return the component with its options bound. A part becomes a bound component."""
        values = {k: v.bind() if isinstance(v, Spec) else v for k, v in self.options.items()}
        return partial(self.component, **values) if values else self.component


def choose(registry: Mapping[str, Any], what: str, name: str) -> Any:
    """Return an entry of a registry.

    If the entry is missing, raise an InputError that suggests the nearest name.
    """
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

    what: the flag or field that holds the text; errors name it.
    supplied: names of parameters that the caller fills in.
    common: a function whose parameters every entry of the registry takes before its own.
    Raise InputError if a name or an option is unknown, an option is given twice, or a value has the
    wrong type.
    """
    name, *words = re.split(r"(?<!\\):", text)
    where, component = f"{what}={text}", choose(registry, what, name)
    first = parameters(common) if common else {}
    known = first | parameters(component, supplied)
    spec = Spec(name, component, {}, known, next(iter(first), None))
    owners, order = {key: spec for key in known}, iter(known)
    for word in words:
        key, equals, value = word.replace(r"\:", ":").partition("=")
        if not equals:
            key, value = next(order, ""), key
        require(key in owners, f"{where}: {_unknown(key or value, name, owners)}")
        owner = owners[key]
        require(key not in owner.options, f"{where}: {key} is given twice")
        owner.options[key] = _read(value, owner.known[key], where)
        if isinstance(part := owner.options[key], Spec):
            owners = dict.fromkeys(part.known, part) | owners
    return spec


def build(text: str, registry: Registry, what: str, **supplied: Any) -> Any:
    """Build the component that a text describes, from its options and the supplied arguments."""
    return parse(text, registry, what, supplied).bind()(**supplied)


def parameters(component: Component, supplied: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the options of a component by name: what a text can set and `supplied` does not."""
    known = _known(component, supplied)
    return {key: option for key, option in known.items() if _kinds(option.annotation)}


def _known(component: Component, supplied: Iterable[str]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a component by name, without those that are supplied."""
    found = inspect.signature(component, eval_str=True).parameters
    hidden = {*supplied, *(FLAX if found.keys() >= FLAX else ())}
    return {key: option for key, option in found.items() if key not in hidden}


def check(
    component: Component, options: Mapping[str, Any], name: str, supplied: Iterable[str] = ()
) -> None:
    """Raise InputError unless a component takes options of these names and types."""
    known = _known(component, supplied)
    for key, value in options.items():
        require(key in known, _unknown(key, name, known))
        kinds = _kinds(known[key].annotation)
        fits = not kinds or any(kind.holds(value) for kind in kinds)
        require(fits, f"{name}: {_wrong(key, value, known[key])}")


def describe(registry: Registry, supplied: Iterable[str] = (), width: int = 96) -> str:
    """Return the help of a registry: the first line of each entry, and the choices for the parts.

    Options are shown with their defaults. If an option has a few fixed choices, all are shown, and
    the default comes first.
    """
    lines: list[str] = []
    parts: dict[str, Registry] = {}
    for name, component in registry.items():
        options = parameters(component, tuple(supplied)).values()
        parts |= {o.name: _registry(o) for o in options if get_origin(o.annotation) is Annotated}
        about = inspect.cleandoc(getattr(component, "func", component).__doc__ or "")
        first = " ".join(about.split("\n\n")[0].split())
        head = "  ".join(_head(name, options))
        lines += textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="      ")
        lines += textwrap.wrap(first, width, initial_indent="      ", subsequent_indent="      ")
    for name, part in parts.items():
        heads = (":".join(_head(entry, parameters(make).values())) for entry, make in part.items())
        lines += textwrap.wrap(f"{name} is {', '.join(heads)}", width, initial_indent="  ")
    return "\n".join(lines)


def _head(name: str, options: Iterable[inspect.Parameter]) -> list[str]:
    """Return an entry's name and its options, each with its default."""
    return [name, *(f"{o.name}={_default(o)}" for o in options if o.default is not o.empty)]


class _Kind(NamedTuple):
    """A type that an option can have: its label, the reader of a word, and the test of a value."""

    label: str
    read: Callable[[str], Any]  # raises ValueError
    holds: Callable[[Any], bool]


def _kinds(annotation: Any) -> list[_Kind]:
    """Return the types of a parameter that a text can give: none for arrays and the like."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        registry = next(one for one in inner[1:] if isinstance(one, Mapping))
        return [_Kind(f"one of {', '.join(registry)}", partial(_part, registry), callable)]
    if origin in (Union, UnionType):
        ordered = sorted(inner, key=lambda one: one is not NoneType)  # read "none" before str does
        return [kind for one in ordered for kind in _kinds(one)]
    if origin is Literal:
        words = {_write(choice): choice for choice in inner}
        return [_Kind(", ".join(words), partial(_among, words), inner.__contains__)]
    if origin in (tuple, Sequence) and (parts := _kinds(inner[0])):
        label = f"{parts[0].label}, one or more, with commas between"
        return [_Kind(label, partial(_list, parts[0]), partial(_are, parts[0].holds))]
    return [PLAIN[annotation]] if annotation in PLAIN else []


def _part(registry: Registry, word: str) -> Spec:
    if word not in registry:
        raise ValueError
    options = parameters(registry[word]).items()  # the caller supplies those without default
    return Spec(word, registry[word], {}, {k: v for k, v in options if v.default is not v.empty})


def _among(words: Mapping[str, Any], word: str) -> Any:
    if word not in words:
        raise ValueError
    return words[word]


def _list(kind: _Kind, word: str) -> tuple[Any, ...]:
    return tuple(kind.read(part) for part in word.split(",") if part)


def _are(holds: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list | tuple) and all(map(holds, values))


def _number(word: str) -> float:
    if (value := float(word)) != value:
        raise ValueError
    return value


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _absolute(word: str) -> Path:
    if not word:
        raise ValueError
    return Path(os.path.abspath(word))


PLAIN = {
    bool: _Kind(
        "true or false",
        partial(_among, {"true": True, "false": False}),
        lambda value: isinstance(value, bool),
    ),
    int: _Kind("a whole number", int, partial(_is_number, kind=numbers.Integral)),
    float: _Kind("a number", _number, _is_number),
    Path: _Kind("a path", _absolute, lambda value: isinstance(value, Path)),
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
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
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
    """Return an option's default as the help shows it; for a part, the name of its entry."""
    if get_origin(option.annotation) is Annotated:
        return _default_part(option).name
    if get_origin(option.annotation) is Literal:
        others = [_write(each) for each in get_args(option.annotation) if each != option.default]
        return "|".join([_write(option.default), *others])
    if isinstance(option.default, float):
        return f"{option.default:.4g}"
    return "..." if option.default is option.empty else _write(option.default)


def _default_part(option: inspect.Parameter) -> Spec:
    registry = _registry(option)
    name = next(name for name, entry in registry.items() if entry is option.default)
    return _part(registry, name)


def _registry(option: inspect.Parameter) -> Registry:
    return next(one for one in get_args(option.annotation) if isinstance(one, Mapping))
