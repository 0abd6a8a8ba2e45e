"""Write tests/fixtures/context_unet_*.npz with PyTorch: python -m tests.make_fixtures.

Weights and inputs are not stored. RandomState, whose streams NumPy has frozen, draws them from the
names. PyTorch's results are stored, under the reference's names and in NCHW.
"""

import zlib
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
BATCH, STEPS, RATE = 2, 5, 1e-3
CASES = {
    "16_none": {"height": 16, "shortcut": "none", "norm": "batch"},
    "20_conv": {"height": 20, "shortcut": "conv", "norm": "batch"},
    "24_group": {"height": 24, "shortcut": "none", "norm": "group"},
    "28_none": {"height": 28, "shortcut": "none", "norm": "batch"},
}
# With these seeds, arguments of ReLU are at least 1e-4 from 0, and the two largest values in a max
# pool at least 1e-4 apart. At a tie, two correct gradients differ by the whole part of a pixel.
SEEDS = {"16_none": 14, "20_conv": 9, "24_group": 14, "28_none": 12}
FIELDS = {"in_channels": 3, "n_feat": 8, "n_cfeat": 5}


def draw_weights(shapes, seed=0):
    """Return a state_dict without default values, so that no two tensors can be confused."""
    return {name: draw_tensor(name, shape, seed) for name, shape in shapes.items()}


def draw_tensor(name, shape, seed):
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    values = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).uniform(-1, 1, shape)
    if name.endswith("running_var"):
        values = 1 + 0.5 * values
    elif name.endswith("weight") and len(shape) == 1:
        values = 1 + 0.3 * values
    elif name.endswith("weight"):
        values = values * 1.5 / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.3 * values
    return values.astype(np.float32)


def draw_batch(height, in_channels=3, n_cfeat=5, batch=BATCH, seed=1):
    """Return images (NCHW), times, contexts and targets (NCHW)."""
    rng = np.random.RandomState(seed)
    shape = (batch, in_channels, height, height)
    x, target = rng.standard_normal(shape), rng.standard_normal(shape)
    t, context = rng.uniform(0, 1, batch), rng.uniform(0, 1, (batch, n_cfeat))
    return tuple(a.astype(np.float32) for a in (x, t, context, target))


def run_reference(network, batch, steps=STEPS):
    """Compute the reference results: both modes, gradients, and a few steps of Adam.

    The network must hold the drawn weights. Keys: eval, eval_none (without context), train,
    grad/<name>, stats/<name> (after one step), losses, and, after the steps, param/<name> and
    last (the output in training mode).
    """
    import torch

    x, t, context, target = map(torch.from_numpy, batch)
    with torch.no_grad():
        found = {"eval": network.eval()(x, t, context).numpy()}
        found["eval_none"] = network(x, t, None).numpy()
    network.train()
    adam = torch.optim.Adam(network.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        output = network(x, t, context)
        loss = torch.nn.functional.mse_loss(output, target)
        adam.zero_grad()
        loss.backward()
        if step == 0:
            found["train"] = output.detach().numpy()
            found |= {f"grad/{k}": p.grad.numpy().copy() for k, p in network.named_parameters()}
            stats = {k: v for k, v in network.named_buffers() if v.is_floating_point()}
            found |= {f"stats/{k}": v.numpy().copy() for k, v in stats.items()}
        adam.step()
        losses.append(loss.item())
    found |= {f"param/{k}": p.detach().numpy().copy() for k, p in network.named_parameters()}
    with torch.no_grad():
        found["last"] = network(x, t, context).numpy()
    return found | {"losses": np.float32(losses)}


def thin(values):
    """Return every 11th entry of a large tensor. 11 divides no axis, so every row occurs."""
    return values.ravel()[:: 11 if values.size > 300 else 1]


def pack(found):
    """Replace each tree <tree>/<name> by its thinned tensors and norms, in the names' order."""
    packed = {k: v for k, v in found.items() if "/" not in k}
    for tree in ("grad", "stats", "param"):
        tensors = [found[k] for k in sorted(found) if k.startswith(f"{tree}/")]
        packed[tree] = np.concatenate([np.zeros(0), *map(thin, tensors)]).astype(np.float32)
        packed[f"{tree}_norms"] = np.float32([np.linalg.norm(v) for v in tensors])
    return packed


def load_drawn(network):
    import torch

    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    drawn = draw_weights(shapes)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in drawn.items()})
    return network


def main():
    from experiments.peers.context_unet import ContextUnet

    for name, fields in CASES.items():
        network = load_drawn(ContextUnet(**FIELDS, **fields))
        found = run_reference(network, draw_batch(fields["height"], seed=SEEDS[name]))
        np.savez_compressed(FIXTURES / f"context_unet_{name}.npz", **pack(found))


if __name__ == "__main__":
    main()
