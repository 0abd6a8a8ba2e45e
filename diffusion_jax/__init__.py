"""Diffusion samplers as tables of numbers, run by one compiled loop.

from diffusion_jax import load_model, sample, samplers

model = load_model()
tableau = samplers.build("ddim", model.schedule, steps=25)
images = sample(model, tableau, n=8, seed=0).images
"""

import jax

from diffusion_jax import pictures, samplers
from diffusion_jax.diffusion import grids, schedules
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.runs import Config, load_model
from diffusion_jax.samplers import SAMPLERS, Tableau, solve
from diffusion_jax.sampling import sample
from diffusion_jax.typing import InputError, Level, Prediction

# A seed must give the same numbers in every environment. (parallel.data_parallel sets float32.)
jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_default_prng_impl", "threefry2x32")

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
