"""Named configurations, for --preset."""

from collections.abc import Callable

from diffusion_jax.config import Config


def notes() -> Config:
    """The hyperparameters of the course notes, on 89,400 sprites (hours on a CPU)."""
    return Config()


def demo() -> Config:
    """A small network and a short training, for a few minutes on 2 CPU cores."""
    return Config().override(
        n_images=20_000,
        class_frequencies=(1.0, 1.0, 1.0, 1.0, 1.0),
        n_feat=32,
        epochs=4,
        batch_size=64,
        learning_rate=2e-3,
        lr_schedule="cosine",
        warmup_steps=50,
        ema_decay=0.995,
    )


PRESETS: dict[str, Callable[[], Config]] = {"notes": notes, "demo": demo}
