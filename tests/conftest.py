"""All tests: 8 CPU devices, strict promotion of types, shapes checked, warnings as errors."""

import jax
from jaxtyping import install_import_hook

from tests import checker

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
install_import_hook("diffusion_jax", f"{checker.__name__}.check")
