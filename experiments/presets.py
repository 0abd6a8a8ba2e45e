"""Named configurations, for --preset."""

from collections.abc import Callable

from diffusion_jax.config import Config


def notes() -> Config:
    """The hyperparameters of the course notes, on 89,400 sprites (hours on a CPU)."""
    return Config()


def demo() -> Config:
    """A few minutes on 2 CPU cores: a small network that learns 120 sprites nearly by heart."""
    return Config().override(
        n_images=120,
        class_frequencies=(1.0, 1.0, 1.0, 1.0, 1.0),
        n_feat=32,
        schedule="cosine",
        parameterization="x0",
        epochs=900,
        batch_size=64,
        learning_rate=3e-3,
        lr_schedule="cosine",
        warmup_steps=50,
        ema_decay=0.995,
    )


def best() -> Config:
    """Half an hour on 2 quiet CPU cores: the recipe of checkpoints/sprites."""
    return demo().override(
        n_images=50_000,
        epochs=28,
        learning_rate=2e-3,
        warmup_steps=200,
        ema_decay=0.9995,
    )


PRESETS: dict[str, Callable[[], Config]] = {"notes": notes, "demo": demo, "best": best}
