"""Networks: functions (variables, x, t, context) -> prediction, and the weights of others."""

import flax.linen as nn

from diffusion_jax.networks.context_unet import ContextUnet
from diffusion_jax.networks.folding import fold_batch_norm
from diffusion_jax.networks.torch_weights import (
    export_state_dict,
    import_state_dict,
    infer_fields,
    read_state_dict,
    write_state_dict,
)

NETWORKS: dict[str, type[nn.Module]] = {"context_unet": ContextUnet}

__all__ = [
    "NETWORKS",
    "ContextUnet",
    "export_state_dict",
    "fold_batch_norm",
    "import_state_dict",
    "infer_fields",
    "read_state_dict",
    "write_state_dict",
]
