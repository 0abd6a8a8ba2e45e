"""Learn the numbers of a sampler for a given model, without changing the network."""

from diffusion_jax.learning.fit import FREE, Learned, fit
from diffusion_jax.learning.numbers import Numbers, from_tableau, to_tableau
from diffusion_jax.learning.objectives import OBJECTIVES, Objective

__all__ = [
    "FREE",
    "OBJECTIVES",
    "Learned",
    "Numbers",
    "Objective",
    "fit",
    "from_tableau",
    "to_tableau",
]
