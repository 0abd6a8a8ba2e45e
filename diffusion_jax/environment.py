"""What a run was made with: versions, commit, command and devices, for each of its starts."""

import datetime
import json
import os
import platform
import socket
import subprocess
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.files import read_json, write_atomically
from diffusion_jax.typing import InputError, RunWarning

ENVIRONMENT = "environment.json"
PACKAGES = ("diffusion_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ROOT = Path(__file__).parent.parent


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe(command: Sequence[str], devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The present environment, ready for JSON."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": commit(ROOT),
        "devices": [device.device_kind for device in devices],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "versions": versions(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))},
    }


def commit(folder: Path) -> str | None:
    """The git commit of a working tree, with + if it was changed since; None if it is none."""
    if not (folder / ".git").exists():
        return None
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if status else "")


def record(run: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a run's record of its starts."""
    entries = [*read(run), entry]
    write_atomically(run / ENVIRONMENT, (json.dumps(entries, indent=2) + "\n").encode())


def read(run: Path) -> list[dict[str, Any]]:
    """A run's record of its starts; none, with a RunWarning, if the file is damaged."""
    path = run / ENVIRONMENT
    try:
        entries = read_json(path, 2**26)
    except FileNotFoundError:
        return []
    except (InputError, OSError):
        entries = None
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        return entries
    warnings.warn(f"{path} is damaged: the starts before are forgotten", RunWarning, stacklevel=2)
    return []
