"""Run a sampler file with any model, in NumPy or PyTorch: copy this file, it needs nothing else."""

import hashlib
import json

import numpy as np


def read(path):
    """Return the contents of a sampler file."""
    with open(path) as file:
        sampler = json.load(file)
    assert (sampler["schema"], sampler["version"]) == ("diffusion_jax.sampler", 1)
    names = ("t", "alpha", "sigma", "mix", "ends_step")
    numbers = b"".join(np.array(sampler[name], "<f8").tobytes() for name in names)
    assert hashlib.sha256(numbers).hexdigest() == sampler["hash"], "the file is damaged"
    return sampler


def run(sampler, denoise, noise):
    """Return the images that a sampler draws.

    denoise: (x, t, alpha, sigma) -> (x0, eps), where x = alpha * x0 + sigma * eps. With a network
    that predicts noise: eps = network(x, t); x0 = (x - sigma * eps) / alpha.
    noise: a function without arguments that returns new standard normal noise, such as
    lambda: torch.randn(16, 3, 64, 64). PyTorch: call run under torch.no_grad().
    """
    x = (sampler["alpha"][0] ** 2 + sampler["sigma"][0] ** 2) ** 0.5 * noise()
    registers = [0 * x] * (len(sampler["mix"][0]) - 1)
    for row, mix in enumerate(sampler["mix"]):
        x0, eps = denoise(x, *(sampler[name][row] for name in ("t", "alpha", "sigma")))
        xi = noise() if any(weights[3] for weights in mix) else 0 * x
        held = [x, x0, eps, xi, *registers]
        x, *registers = [sum(w * s for w, s in zip(ws, held, strict=True)) for ws in mix]
    return x
