"""Sampling and editing with a model, by any tableau, on all devices, from any start."""

from diffusion_jax.sampling.draw import Samples, Start, frame_rows, initial_noise, sample

__all__ = ["Samples", "Start", "frame_rows", "initial_noise", "sample"]
