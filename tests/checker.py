"""Check annotations at run time with beartype, which accepts int where float is expected."""

from typing import Any

from beartype import BeartypeConf, beartype

beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(made: Any) -> Any:
    """Check a function or class, except closures of samplers, which each step of a table makes."""
    if made.__module__.startswith("diffusion_jax.samplers") and "<locals>" in made.__qualname__:
        return made
    return beartyped(made)
