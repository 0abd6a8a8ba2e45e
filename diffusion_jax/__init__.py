"""Diffusion samplers as tables of numbers, run by one compiled loop.

from diffusion_jax import load_model, sample, samplers

model = load_model("checkpoints/sprites")
tableau = samplers.build("ddim", model.schedule, steps=25)
images = sample(model, tableau, n=8, seed=0).images
"""

from diffusion_jax import grids, pictures, samplers, schedules
from diffusion_jax.config import Config
from diffusion_jax.runs import Model, load_model
from diffusion_jax.samplers import SAMPLERS, Tableau, solve
from diffusion_jax.sampling import sample
from diffusion_jax.typing import InputError, Level, Prediction

__all__ = [
    "SAMPLERS",
    "Config",
    "InputError",
    "Level",
    "Model",
    "Prediction",
    "Tableau",
    "grids",
    "load_model",
    "pictures",
    "sample",
    "samplers",
    "schedules",
    "solve",
]
