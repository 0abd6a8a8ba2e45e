"""The tableau: a sampler as a table of numbers, made on the host in float64 before anything runs.

Row r calls the denoiser once, at the level of the row, on the state x. It then replaces the state
and the registers z_1 .. z_K by fixed linear combinations of S:

    S = (x, x0, eps, xi, z_1 .. z_K)     x' = mix[r, 0] . S     z_k' = mix[r, k] . S

(x0, eps) is the prediction, and xi ~ N(0, I) is drawn afresh in every row. This is a general linear
method (Butcher 2006, Acta Numerica 15) with additive noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from diffusion_jax.diffusion.grids import Grid
from diffusion_jax.typing import Level, require

MOST_ROWS = 1_000_000  # in one tableau
X, X0, EPS, XI, Z = 0, 1, 2, 3, 4  # columns of mix; the registers are columns Z, Z + 1, ...


class Tableau(NamedTuple):
    """A sampler of R rows and K registers, in float64.

    (t, alpha, sigma) is the level of each row. ends_step marks the rows that complete a step.
    """

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
        """The number of registers K."""
        return self.mix.shape[1] - 1

    @property
    def noise_scale(self) -> float:
        """The standard deviation of the state before the first row, for data of unit scale."""
        return float(np.hypot(self.alpha[0], self.sigma[0]))


def check(tableau: Tableau) -> Tableau:
    """Return the tableau. If a part is invalid, raise a ValueError that names it."""
    rows, outputs, inputs = tableau.mix.shape
    if rows < 1 or outputs < 1 or inputs != outputs + 3:
        raise ValueError(f"mix has shape {tableau.mix.shape}: it must be (R, 1 + K, 4 + K), R >= 1")
    for name, column in tableau._asdict().items():
        if column.shape[:1] != (rows,) or (name != "mix" and column.ndim != 1):
            raise ValueError(f"{name} has shape {column.shape} where mix has {rows} rows")
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


def for_cfg_pp(tableau: Tableau) -> Tableau:
    """Return the same sampler in the columns that make it CFG++ (arXiv:2406.08070).

    With CFG++, x0 is guided and eps is not. A step ends in the guided image and noise without
    guidance. Registers and inner stages have no guidance: there, (x - sigma eps) / alpha replaces
    x0. For euler, 2S ancestral and 2M, this is what the authors' code does. Raise InputError if a
    step does not end in a predicted image.
    """
    mix, image = tableau.mix.copy(), np.zeros(tableau.registers + 1)
    image[0] = tableau.alpha[0]  # the factor of the image in the state and in the registers
    for weights, alpha, sigma, ends in zip(mix, *tableau[1:3], tableau.ends_step, strict=True):
        image = weights @ [image[0], 1.0, 0.0, 0.0, *image[1:]]
        free = weights[:, X0].copy()  # the part of x0 without guidance
        if ends:
            message = (
                "CFG++ with this sampler: its steps do not end in a predicted image; take ddim"
            )
            require(free[0] > 1e-9, message)
            free[0] = min(free[0] - image[0], 0)
        if alpha > 0:
            weights[:, [X, X0, EPS]] += np.outer(free, [1 / alpha, -1, -sigma / alpha])
    return tableau._replace(mix=mix)


def one_row_a_step(grid: Grid, **columns: ndarray) -> Tableau:
    """Return the tableau without registers in which each step grid[i] -> grid[i + 1] is one row.

    columns: any of x, x0, eps and xi, each (N,). A column that is not given is zero.
    """
    mix = np.zeros((grid.steps, 1, 4))
    for name, values in columns.items():
        mix[:, 0, {"x": X, "x0": X0, "eps": EPS, "xi": XI}[name]] = values
    t, alpha, sigma = (column[:-1] for column in grid)
    return check(Tableau(t, alpha, sigma, mix, np.ones(grid.steps, bool)))


class Symbols(NamedTuple):
    """The entries of S as unit vectors, in which the outputs of a row are written."""

    x: ndarray
    x0: ndarray
    eps: ndarray
    xi: ndarray
    z: list[ndarray]


def symbols(registers: int) -> Symbols:
    """Return S with K registers. DDIM is then Row(level, [alpha * s.x0 + sigma * s.eps])."""
    x, x0, eps, xi, *z = np.eye(Z + registers)
    return Symbols(x, x0, eps, xi, z)


class Row(NamedTuple):
    """A row in symbols: its level and its outputs x', z_1', z_2', ... up to the last one in use."""

    level: Level
    outputs: Sequence[ndarray]
    ends_step: bool = True


def tabulate(rows: Sequence[Row]) -> Tableau:
    """Return the tableau of rows that are written in symbols."""
    inputs = len(rows[0].outputs[0])
    mix = np.zeros((len(rows), inputs - 3, inputs))
    for place, row in zip(mix, rows, strict=True):
        place[: len(row.outputs)] = row.outputs
    t, alpha, sigma = np.array([row.level for row in rows]).T
    return check(Tableau(t, alpha, sigma, mix, np.array([row.ends_step for row in rows])))


def pad(tableau: Tableau, rows: int, registers: int) -> Tableau:
    """Return the same sampler in a larger table, so that every sampler fits one executable.

    The added rows are never run; the added registers stay zero.
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
    """Return the table in float32, as the device holds it. Each number is rounded once, here."""
    t, alpha, sigma, mix = (np.asarray(column, np.float32) for column in tableau[:4])
    return Tableau(t, alpha, sigma, mix, tableau.ends_step)
