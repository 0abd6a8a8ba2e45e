"""Networks: functions (variables, x, t, context) -> prediction, and import of PyTorch weights.

Each network is one file that defines a Network, and one line in NETWORKS.
"""

from diffusion_jax import spec
from diffusion_jax.networks.context_unet import ContextUnet
from diffusion_jax.networks.network import Network, init_variables, variable_shapes
from diffusion_jax.networks.torch_weights import (
    export_state_dict,
    import_state_dict,
    infer_fields,
    read_state_dict,
    write_state_dict,
)
from diffusion_jax.networks.unet import Unet

SUPPLIED = ("image_shape", "n_cfeat", "axis_name", "dtype")  # fields that are not options
NETWORKS: dict[str, type[Network]] = {"context_unet": ContextUnet, "unet": Unet}


def build(text: str, image_shape: tuple[int, ...], n_cfeat: int) -> Network:
    """Return the network that a spec describes. Raise InputError as spec.parse does."""
    supplied = {"image_shape": image_shape, "n_cfeat": n_cfeat}
    return spec.parse(text, NETWORKS, "network", SUPPLIED).bind()(**supplied)
