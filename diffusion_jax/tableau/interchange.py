"""A sampler as one small JSON file, which docs/read_sampler.py runs without this library.

docs/convert.md describes the format. hash is the SHA-256 of t, alpha, sigma, mix and ends_step, one
after the other, as little-endian float64.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from diffusion_jax.diffusion.schedules import NoiseSchedule
from diffusion_jax.files import read_json, write_atomically
from diffusion_jax.tableau import XI, Tableau, check, check_rows
from diffusion_jax.tableau.analysis import Gaussian, error
from diffusion_jax.typing import InputError, require

SCHEMA, VERSION = "diffusion_jax.sampler", 1
MOST_REGISTERS = 64
MOST_BYTES = 2**27  # bytes of a file
DATA = Gaussian(np.array([0.0, 0.5]), np.array([0.1, 0.5]) ** 2)


def digest_of(tableau: Tableau) -> str:
    """Return the hash of a tableau: equal tables have equal hashes on every machine."""
    columns = (np.asarray(column, "<f8").tobytes() for column in tableau)
    return hashlib.sha256(b"".join(columns)).hexdigest()


def write(path: Path, tableau: Tableau, sampler: str, schedule: str) -> None:
    """Write a tableau as a file. sampler, schedule: the texts that it was built from.

    The file states the exact error on Gaussian data, against which other programs can check
    themselves.
    """
    stated = {"mean": DATA.mean.tolist(), "variance": DATA.variance.tolist()}
    content = {"schema": SCHEMA, "version": VERSION, "sampler": sampler, "schedule": schedule}
    content |= {name: column.tolist() for name, column in tableau._asdict().items()}
    content |= {"hash": digest_of(tableau), "error": stated | {"w2": error(tableau, DATA)}}
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read(path: Path) -> Tableau:
    """Return the tableau in a file. Raise InputError if it is damaged or of a different version."""
    found = read_json(path, MOST_BYTES)
    known = isinstance(found, dict) and found.get("schema") == SCHEMA
    require(known, f'{path} is not a sampler file: it must be JSON with "schema": "{SCHEMA}"')
    version = f"{path} is of version {found.get('version')!r}: this library reads version {VERSION}"
    require(found.get("version") == VERSION, version)
    try:
        tableau = check(Tableau(*(np.array(found[name], np.float64) for name in Tableau._fields)))
    except (KeyError, TypeError, ValueError, OverflowError) as fault:
        reason = f"it has no {fault}" if isinstance(fault, KeyError) else fault
        raise InputError(" ".join(f"{path} is damaged: {reason}".split())) from None
    require(found.get("hash") == digest_of(tableau), f"{path} is damaged: it does not fit its hash")
    check_rows(tableau.rows)
    held = f"{path} has {tableau.registers} registers: they must be at most {MOST_REGISTERS}"
    require(tableau.registers <= MOST_REGISTERS, held)
    return tableau._replace(ends_step=tableau.ends_step != 0)


def file(schedule: NoiseSchedule, path: Path | None = None, digest: str = "") -> Tableau:
    """The sampler in a JSON file, written by convert --to=FILE.json or by a different program.

    digest: the first digits of the file's hash; a file that changed since is refused.
    """
    if path is None:
        raise InputError("sampler=file: give path=FILE.json")
    tableau = read(path)
    changed = f"{path} has changed: its hash is {digest_of(tableau)}, not {digest}..."
    require(digest_of(tableau).startswith(digest), changed)
    t, alpha, sigma, mix, ends = tableau
    inside = (t > 0) & (t <= schedule.steps) & (sigma > 0)
    rows = f"rows {np.flatnonzero(~inside)[:5]} of {path} have levels outside the schedule: "
    require(inside.all(), rows + f"t must be in (0, {schedule.steps}] and sigma above 0")
    own = schedule.level(t)
    off = np.flatnonzero(~(np.isclose(alpha, own.alpha) & np.isclose(sigma, own.sigma)))
    if len(off):
        pair = f"{alpha[off[0]]:.6g} and {sigma[off[0]]:.6g} at t={t[off[0]]:g}"
        its = f"{own.alpha[off[0]]:.6g} and {own.sigma[off[0]]:.6g}"
        raise InputError(f"{path} is for a different schedule: alpha, sigma are {pair}, not {its}")
    begins = np.flatnonzero(np.append(True, ends[:-1]))
    rises = (np.diff(t[begins]) >= 0) & ~(mix[begins[1:] - 1, :, XI] != 0).any(1)
    rows = f"rows {begins[1:][rises][:5]} of {path} begin a step that does not descend: "
    require(not rises.any(), rows + "only a row that adds noise may be followed by a higher level")
    return tableau
