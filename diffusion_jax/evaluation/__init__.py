"""Measure sample quality, with standard errors, and the same of real against real images."""

from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.estimate import Estimate
from diffusion_jax.evaluation.likelihood import bits_per_dim
from diffusion_jax.evaluation.quality import Row, measure_against
from diffusion_jax.evaluation.real import LEAST, MOST, RealImages, check_shape, real_images
from diffusion_jax.evaluation.samples import check_samples, draw_like, to_pixels
