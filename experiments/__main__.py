"""The console command: `diffusion-jax train ...` is `python -m experiments.train ...`."""

import runpy
import sys

APPS = (
    "analyse",
    "benchmark",
    "convert",
    "edit",
    "evaluate",
    "likelihood",
    "sample",
    "sweep",
    "train",
)


def main() -> None:
    """Run the app that the first argument names, with the arguments after it."""
    if len(sys.argv) < 2 or sys.argv[1] not in APPS:
        sys.exit(f"usage: diffusion-jax APP [flags], where APP is one of {', '.join(APPS)}")
    del sys.argv[0]
    runpy.run_module(f"experiments.{sys.argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
