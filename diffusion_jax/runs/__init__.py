"""What keeps a run whole: its folder, configuration, checkpoints, metrics and environment."""

from diffusion_jax.runs.config import Config
from diffusion_jax.runs.models import (
    check_new,
    load_config,
    load_model,
    reconstruct,
    save_model,
    untrained,
)

__all__ = [
    "Config",
    "check_new",
    "load_config",
    "load_model",
    "reconstruct",
    "save_model",
    "untrained",
]
