"""Time synchronised runs, count compilations, and measure what the hardware can do."""

from diffusion_jax.timing.clocks import (
    LEAST,
    Compilations,
    Group,
    Timing,
    counting,
    interleave,
    process_seconds,
    run_groups,
    seconds_of,
    summary,
)
