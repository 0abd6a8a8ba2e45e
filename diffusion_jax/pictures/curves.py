"""Curves of losses over steps, as PNG."""

import io
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.files import FilePath, write_atomically
from diffusion_jax.pictures.sheets import ACCENT, GROUND, INK
from diffusion_jax.typing import require


def loss_curve(
    path: FilePath | None, steps: ArrayLike, losses: ArrayLike, ylabel: str = "loss"
) -> bytes:
    """Draw losses (n,) over increasing steps (n,), with the medians of neighbours in bold.

    Return the PNG, and write it if a path is given. Values that are not finite are left out. The
    axis is logarithmic if all values are positive and span a factor of 3.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    fits = x.ndim == 1 and x.shape == y.shape
    require(fits, f"losses: shape {y.shape} for steps of shape {x.shape}: give (n,) twice")
    finite = np.isfinite(x) & np.isfinite(y)
    require(finite.any(), f"losses: none of {y.size} values is finite: give at least one that is")
    figure = Figure(figsize=(6.4, 3), dpi=200, facecolor=GROUND, layout="constrained")
    _plot_losses(figure.add_subplot(facecolor=GROUND), x[finite], y[finite], ylabel)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    if path is not None:
        write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def _plot_losses(axes: Any, x: np.ndarray, y: np.ndarray, ylabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    many = len(x) >= 60
    bins = np.array_split(np.arange(len(x)), min(len(x) // 10, 100) if many else len(x))
    single: dict[str, Any] = {"alpha": 0.45} if many else {"marker": "o", "ms": 3}
    axes.plot(x, y, color=ACCENT, lw=0.5, **single)
    axes.plot([x[b].mean() for b in bins], [np.median(y[b]) for b in bins], color=ACCENT, lw=1.6)
    if y.min() > 0 and y.max() > 3 * y.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(labelcolor=INK, color=INK, which="both", length=3)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
