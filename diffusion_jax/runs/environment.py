"""The record of a run's starts: versions, commit, command and devices of each."""

import datetime
import json
import os
import platform
import re
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
ROOT = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe(command: Sequence[str], devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Return the present environment, ready for JSON."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": commit(ROOT),
        "devices": [device.device_kind for device in devices],
        "platform": platform.platform(),
        "processor": processor(),
        "host": socket.gethostname(),
        "versions": versions(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))},
    }


def processor() -> str:
    """Return the processor's name, where the system has one."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def commit(folder: Path) -> str | None:
    """Return a working tree's git commit, with + if files differ from it; None without git."""
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
        status = subprocess.check_output([*git, "status", "--porcelain"], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.decode().strip() + ("+" if status else "")


def record(run: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a run's record of its starts."""
    entries = [*read(run), entry]
    write_atomically(run / ENVIRONMENT, (json.dumps(entries, indent=2) + "\n").encode())


def read(run: Path) -> list[dict[str, Any]]:
    """Return a run's record of its starts. Warn and return [] if the file is damaged."""
    path = run / ENVIRONMENT
    try:
        entries = read_json(path, 2**26)
    except FileNotFoundError:
        return []
    except (InputError, OSError):
        entries = None
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        return entries
    warnings.warn(f"{path} is damaged: its earlier entries are lost", RunWarning, stacklevel=2)
    return []
