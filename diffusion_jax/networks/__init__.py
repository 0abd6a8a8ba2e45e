"""Networks: functions (variables, x, t, context) -> prediction, and the weights of others.

A network is one file with a Network, and one line in NETWORKS.
"""

from diffusion_jax.networks.context_unet import ContextUnet
from diffusion_jax.networks.network import Network
from diffusion_jax.networks.torch_weights import (
    export_state_dict,
    import_state_dict,
    infer_fields,
    read_state_dict,
    write_state_dict,
)
from diffusion_jax.networks.unet import Unet

NETWORKS: dict[str, type[Network]] = {"context_unet": ContextUnet, "unet": Unet}

__all__ = [
    "NETWORKS",
    "ContextUnet",
    "Network",
    "Unet",
    "export_state_dict",
    "import_state_dict",
    "infer_fields",
    "read_state_dict",
    "write_state_dict",
]
