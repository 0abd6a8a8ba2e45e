"""The app that prints exact errors: its table, its picture, and its errors in one line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def analyse(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.analyse",
            f"--out={folder / 'new' / 'a.png'}",
            "--compilation_cache_dir=",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_prints_the_orders_and_draws(tmp_path: Path) -> None:
    flags = ("--samplers=ddim,heun", "--steps=20,40,80,160", "--grid=karras", "--options=rho=5")
    done = analyse(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert 0.8 < float(rows["ddim"][1]) < 1.2
    assert 1.6 < float(rows["heun"][1]) < 2.4
    assert (rows["ddim"][-1], rows["heun"][-1]) == ("(160)", "(320)")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    done = analyse(tmp_path, "--samplers=lms", "--options=order=9")
    assert done.returncode == 2
    assert done.stderr == "error: order=9: it must be in 1..4\n"
