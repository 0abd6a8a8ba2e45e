"""Training: one step, written for one device, and the loop that runs many on all devices."""

from diffusion_jax.training.loop import CHUNK, Chunk, fit, measure_speed, train_chunk
from diffusion_jax.training.optimizers import Length
from diffusion_jax.training.step import Task, TrainState, init, train_step

__all__ = [
    "CHUNK",
    "Chunk",
    "Length",
    "Task",
    "TrainState",
    "fit",
    "init",
    "measure_speed",
    "train_chunk",
    "train_step",
]
