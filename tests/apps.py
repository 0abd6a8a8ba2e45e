"""Run an app's main in the test's own process."""

import importlib
import sys

from absl import flags


def call(app: str, *argv: str) -> None:
    """Run experiments.APP with these flags, apart from the flags that other modules defined.

    Errors are raised, not printed. All devices of the process are there.
    """
    others, module = _take_away(), f"experiments.{app}"
    before = sys.modules.pop(module, None)
    try:
        main = importlib.import_module(module).main
        flags.FLAGS([app, *argv])
        main()
    finally:
        _take_away()
        sys.modules.pop(module, None)
        if before is not None:
            sys.modules[module] = before
        for owner, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(owner, flag)


def _take_away() -> list[tuple[str, flags.Flag]]:
    """Unregister the flags of the apps, and return them with their modules."""
    modules = flags.FLAGS.flags_by_module_dict().items()
    taken = [(m, flag) for m, of in modules if m.startswith("experiments") for flag in of]
    for _, flag in taken:
        delattr(flags.FLAGS, flag.name)
    return taken
