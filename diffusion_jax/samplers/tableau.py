"""What a sampler is: a table of numbers, made on the host in float64 before anything runs.

Row r of a tableau calls the denoiser once, at a level, on the state x, and then replaces the state
and the registers z_1 .. z_K by fixed linear combinations of what it holds:

    S = (x, x0, eps, xi, z_1 .. z_K)     x' = mix[r, 0] . S     z_k' = mix[r, k] . S

(x0, eps) is the prediction and xi ~ N(0, I) is fresh in every row: a general linear method
(Butcher 2006, Acta Numerica 15) with additive noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from diffusion_jax.grids import Grid
from diffusion_jax.typing import Level, require

MOST_ROWS = 1_000_000  # of one tableau
X, X0, EPS, XI, Z = 0, 1, 2, 3, 4  # columns of mix; the registers are columns Z, Z + 1, ...


class Tableau(NamedTuple):
    """R rows and K registers, in float64. ends_step marks the rows that complete a step."""

    t: Float64[ndarray, "R"]
    alpha: Float64[ndarray, "R"]
    sigma: Float64[ndarray, "R"]
    mix: Float64[ndarray, "R 1+K 4+K"]
    ends_step: Bool[ndarray, "R"]

    @property
    def rows(self) -> int:
        """The number of rows, which is the number of network evaluations."""
        return len(self.t)

    @property
    def registers(self) -> int:
        """K, the number of registers."""
        return self.mix.shape[1] - 1

    @property
    def noise_scale(self) -> float:
        """The standard deviation of the state before the first row, for data of unit scale."""
        return float(np.hypot(self.alpha[0], self.sigma[0]))


def check(tableau: Tableau) -> Tableau:
    """Return the tableau if it is one. Raises ValueError naming the part that is not."""
    rows, outputs, inputs = tableau.mix.shape
    if rows < 1 or outputs < 1 or inputs != outputs + 3:
        raise ValueError(f"mix has shape {tableau.mix.shape}: it must be (R, 1 + K, 4 + K), R >= 1")
    for name, column in tableau._asdict().items():
        if len(column) != rows:
            raise ValueError(f"{name} has {len(column)} rows where mix has {rows}")
        bad = ~np.isfinite(column).reshape(rows, -1).all(1)
        if bad.any():
            raise ValueError(f"{name} is not finite in rows {np.flatnonzero(bad)}")
    if not tableau.ends_step[-1]:
        raise ValueError("the last row must end a step")
    return tableau


def check_rows(rows: int) -> None:
    """Raise InputError if a tableau would have too many rows, before it is built."""
    require(
        rows <= MOST_ROWS,
        f"{rows} network evaluations for each image: they must be at most {MOST_ROWS}; take fewer "
        "steps, repeats or iterations",
    )


def is_ddim(tableau: Tableau) -> bool:
    """Whether every row is DDIM's: x' = alpha_j x0 + sigma_j eps, for the next row's level j."""
    ahead = np.stack([tableau.alpha[1:], tableau.sigma[1:]], 1)
    plain = tableau.mix.copy()
    plain[:-1, 0, [X0, EPS]] -= ahead
    plain[-1, 0, [X0, EPS]] = 0
    return bool(np.allclose(plain[:, 0], 0, rtol=0, atol=1e-9))


def one_row_a_step(grid: Grid, **columns: ndarray) -> Tableau:
    """The tableau without registers whose step over grid[i] -> grid[i + 1] is one row.

    columns: any of x, x0, eps and xi, each (N,); what is not given is zero.
    """
    mix = np.zeros((grid.steps, 1, 4))
    for name, values in columns.items():
        mix[:, 0, {"x": X, "x0": X0, "eps": EPS, "xi": XI}[name]] = values
    t, alpha, sigma = (column[:-1] for column in grid)
    return check(Tableau(t, alpha, sigma, mix, np.ones(grid.steps, bool)))


class Symbols(NamedTuple):
    """S as unit vectors, in which the outputs of a row are written."""

    x: ndarray
    x0: ndarray
    eps: ndarray
    xi: ndarray
    z: list[ndarray]


def symbols(registers: int) -> Symbols:
    """S with K registers. For DDIM: Row(level, [alpha * s.x0 + sigma * s.eps])."""
    x, x0, eps, xi, *z = np.eye(Z + registers)
    return Symbols(x, x0, eps, xi, z)


class Row(NamedTuple):
    """A level, and what the row makes of S: x' and as many of z_1', z_2', .. as are used later."""

    level: Level
    outputs: Sequence[ndarray]
    ends_step: bool = True


def tabulate(rows: Sequence[Row]) -> Tableau:
    """The tableau of rows that are written in symbols."""
    inputs = len(rows[0].outputs[0])
    mix = np.zeros((len(rows), inputs - 3, inputs))
    for place, row in zip(mix, rows, strict=True):
        place[: len(row.outputs)] = row.outputs
    t, alpha, sigma = np.array([row.level for row in rows]).T
    return check(Tableau(t, alpha, sigma, mix, np.array([row.ends_step for row in rows])))


def pad(tableau: Tableau, rows: int, registers: int) -> Tableau:
    """The same sampler in a larger table, so that every sampler fits one executable.

    The rows appended are never run; the registers appended stay zero.
    """
    more_rows, more_registers = rows - tableau.rows, registers - tableau.registers
    if more_rows < 0 or more_registers < 0:
        raise ValueError(
            f"a tableau of {tableau.rows} rows and {tableau.registers} registers "
            f"does not fit into {rows} and {registers}"
        )
    outer, inner = (0, more_rows), (0, more_registers)
    columns = (np.pad(column, [outer, inner, inner][: column.ndim]) for column in tableau)
    return Tableau(*columns)


def to_float32(tableau: Tableau) -> Tableau:
    """The table as the device holds it: every number rounded once, here."""
    t, alpha, sigma, mix = (np.asarray(column, np.float32) for column in tableau[:4])
    return Tableau(t, alpha, sigma, mix, tableau.ends_step)
