"""Named configurations, for --preset."""

from collections.abc import Callable

from diffusion_jax.runs.config import Config


def course() -> Config:
    """Use the course's hyperparameters, on 89,400 sprites (hours on a CPU)."""
    return Config()


def demo() -> Config:
    """Learn a few sprites nearly by heart (minutes on a CPU)."""
    return Config(
        data="sprites:n=120:frequencies=1,1,1,1,1",
        network="context_unet:n_feat=32",
        schedule="cosine",
        prediction="x0",
        optimizer="adam:0.003:decay=cosine:warmup=50",
        ema="exponential:decay=0.995",
        epochs=900,
        batch_size=64,
    )


def best() -> Config:
    """Use the recipe of checkpoints/sprites (half an hour on 2 idle CPU cores)."""
    return demo().override(
        data="sprites:n=50000:frequencies=1,1,1,1,1",
        optimizer="adam:0.002:decay=cosine:warmup=200",
        ema="exponential:decay=0.9995",
        epochs=28,
    )


def digits() -> Config:
    """Learn grey images of 28x28, by default scikit-learn's digits."""
    return demo().override(
        data="digits:size=28",
        optimizer="adam:0.002:decay=cosine:warmup=100",
        epochs=25,
        batch_size=32,
    )


def unet() -> Config:
    """Learn colour images of 32x32, which --data names, by a residual U-Net."""
    return best().override(
        network="unet:n_feat=32:multipliers=1,2,2:blocks=1:attention=2",
        optimizer="adam:0.001:decay=cosine:warmup=100",
        batch_size=32,
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "course": course,
    "demo": demo,
    "best": best,
    "digits": digits,
    "unet": unet,
}

# Recipes with one change each: experiments.sweep trains them with --recipes=all.
CHANGES = {
    "course": (
        *(f"optimizer=adam:{rate}" for rate in (0.002, 0.0005, 0.00033)),
        *(f"ema=exponential:decay={decay}" for decay in (0.99, 0.999)),
        "optimizer=adam:decay=cosine:warmup=200",
        "schedule=cosine",
        "prediction=x0",
    ),
    "best": (
        *(f"optimizer=adam:{rate}:decay=cosine:warmup=200" for rate in (0.004, 0.001, 0.00067)),
        *("ema=none", "ema=exponential:decay=0.99", "schedule=course", "prediction=eps"),
        "optimizer=adam:0.002:decay=cosine:warmup=50",
    ),
}
BOTH = (
    *("prediction=v", "loss=mse:weighting=min_snr", "augment=flips"),
    "network=context_unet:n_feat=32:norm=group",
    *("keep_probability=1", "keep_probability=0.8", "batch_size=32", "batch_size=128"),
)
RECIPES = [
    "+".join([preset, *change])
    for preset, changes in CHANGES.items()
    for change in [(), *((each,) for each in (*changes, *BOTH))]
]
