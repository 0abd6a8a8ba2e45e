"""Show on one machine that a job of several processes does what one process does.

  python -m experiments.cluster_demo

Trains and samples a tiny run over the loopback in 2 processes with 2 CPU devices each, in one
process with 4, and begun in either and continued in the other; and compares the losses and the
images. It ends with exit code 1 if they differ by more than rounding.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from diffusion_jax import metrics

FLAGS = flags.FLAGS
BOUND = 1e-5  # relative to the largest value
TRAINING = (
    *("--n_images=80", "--class_frequencies=1,1,1,1,1", "--n_feat=16", "--timesteps=50"),
    # Not BatchNorm, nor groups of one channel: the biases before have gradients that are zero, and
    # Adam would make whole steps of their rounding.
    *("--norm=group", "--epochs=4", "--batch_size=16", "--save_every=2", "--noreport"),
)
SAMPLING = ("--sampler=ddim", "--steps=10", "--n=10", "--frames=none")

flags.DEFINE_string("out", "checkpoints/cluster_demo", "the folder of the runs, written anew")


def start(
    app: str,
    *args: str,
    processes: int = 1,
    devices: int = 4,
    own: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen]:
    """Start an app in some processes of one job, on so many CPU devices in all.

    own: further flags of each process.
    """
    job = [[f"--cpu_devices={devices // processes}"] for _ in range(processes)]
    for flags_of_one, more in zip(job, own or [()] * processes, strict=True):
        flags_of_one += more
    if processes > 1:
        where = f"--coordinator=127.0.0.1:{free_port()}"
        for number, flags_of_one in enumerate(job):
            flags_of_one += [where, f"--num_processes={processes}", f"--process_id={number}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"experiments.{app}", *args, *flags_of_one],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags_of_one in job
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 1800) -> list[tuple[int, str]]:
    """The exit code and the output of each process. None is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    codes = [process.returncode for process in processes]
    return list(zip(codes, outputs, strict=True))


def run(app: str, *args: str, processes: int = 1) -> None:
    """Run an app to its end; stop with its output if it fails."""
    for code, output in finish(start(app, *args, processes=processes)):
        if code:
            sys.exit(f"{app} ended with exit code {code}:\n{output}")


def free_port() -> int:
    """A port of the loopback that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(folder: Path, processes: int) -> None:
    """Train a run to its end, and sample from it."""
    run("train", *TRAINING, f"--run={folder}", processes=processes)
    run("sample", *SAMPLING, f"--run={folder}", processes=processes)


def continue_from(source: Path, folder: Path, processes: int) -> None:
    """Train a run again from its last checkpoint but one, in another number of processes."""
    shutil.copytree(source, folder)
    shutil.rmtree(max((folder / "state").iterdir(), key=lambda path: int(path.name)))
    train(folder, processes)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def losses(folder: Path) -> np.ndarray:
    """The losses of a run."""
    return np.array([record["loss"] for record in metrics.read(folder / "metrics.jsonl")])


def images(folder: Path) -> np.ndarray:
    """The samples of a run."""
    (path,) = folder.glob("samples/*/samples.npy")
    return np.load(path)


def main(argv: Sequence[str]) -> None:
    """Train, sample, compare."""
    out = Path(FLAGS.out)
    shutil.rmtree(out, ignore_errors=True)
    one, two = out / "one", out / "two"
    train(one, 1)
    train(two, 2)
    continue_from(two, out / "two_then_one", 1)
    continue_from(one, out / "one_then_two", 2)
    print(
        f"{len(losses(one))} steps, {len(images(one))} images; one process with 4 devices against"
    )
    worst = 0.0
    for name in ("two", "two_then_one", "one_then_two"):
        seen = [difference(what(out / name), what(one)) for what in (losses, images)]
        print(f"{name:12}: losses differ by {seen[0]:.1e}, images by {seen[1]:.1e}")
        worst = max(worst, *seen)
    if not worst < BOUND:
        sys.exit(f"that is more than {BOUND}")


if __name__ == "__main__":
    app.run(main)
