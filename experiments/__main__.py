"""The console command: `diffusion-jax train ...` is `python -m experiments.train ...`."""

import runpy
import sys

APPS = (
    "analyse",
    "benchmark",
    "convert",
    "edit",
    "evaluate",
    "learn_sampler",
    "likelihood",
    "sample",
    "sweep",
    "train",
)


def main() -> None:
    """Run the app that the first argument names, with the arguments after it."""
    app = sys.argv[1] if sys.argv[1:] else ""
    if app not in APPS:
        sys.exit(f"diffusion-jax APP [flags]: APP={app!r}: choose from {', '.join(APPS)}")
    del sys.argv[0]
    runpy.run_module(f"experiments.{app}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
