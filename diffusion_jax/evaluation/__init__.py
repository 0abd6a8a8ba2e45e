"""Measures of sample quality, each with its standard error and beside real against real."""

from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.distances import (
    frechet,
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)
from diffusion_jax.evaluation.estimate import Estimate
from diffusion_jax.evaluation.likelihood import bits_per_dim
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.evaluation.measure import (
    Row,
    check_samples,
    class_accuracy,
    evaluate,
    measure,
    memorised,
    recognised,
    to_pixels,
)
from diffusion_jax.evaluation.neighbours import (
    balls,
    density_coverage,
    nearest,
    precision_recall,
)
from diffusion_jax.evaluation.real import LEAST, MOST, Real, check_shape, real_images
from diffusion_jax.evaluation.spaces import Space, spaces
from diffusion_jax.evaluation.yardstick import Yardstick, yardstick

__all__ = [
    "LEAST",
    "MOST",
    "Estimate",
    "Real",
    "Row",
    "Space",
    "Yardstick",
    "balls",
    "bits_per_dim",
    "check_samples",
    "check_shape",
    "class_accuracy",
    "classifier",
    "density_coverage",
    "evaluate",
    "frechet",
    "frechet_distance",
    "kernel_distance",
    "map_rows",
    "measure",
    "memorised",
    "nearest",
    "precision_recall",
    "real_images",
    "recognised",
    "sliced_wasserstein",
    "spaces",
    "to_pixels",
    "yardstick",
]
