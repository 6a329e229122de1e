"""Distances between two runs of a network, in steps of the scale of each tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdq.formats import Format
from qdq.metrics import Array

_CODES = 127  # steps from zero to the largest value of a tensor without a quantizer
_FAR = 10
_MANTISSA_BITS, _LEAST_EXPONENT = 3, -6  # of FP8 (E4M3)
_SAME_CODE = 0.01  # LSB; codes differ by at least one


@dataclass(frozen=True)
class Grid:
    """The numbers that a tensor is rounded to.

    Args:
        scale: Step, of a shape that broadcasts with the tensor.
        lowest: Lowest code.
        highest: Highest code.
        is_float: Whether the codes are FP8 (E4M3) numbers, else integers.
    """

    scale: Array
    lowest: float
    highest: float
    is_float: bool = False

    def clip(self, values: Array) -> Array:
        """Values in steps, those out of range as the nearest code; NaN as the lowest one."""
        with np.errstate(over="ignore", invalid="ignore"):
            steps = values.astype(np.float64) / self.scale
        steps = np.nan_to_num(steps, nan=self.lowest, posinf=self.highest, neginf=self.lowest)
        clipped: Array = np.clip(steps, self.lowest, self.highest)
        return clipped

    def round(self, steps: Array) -> Array:
        """The nearest codes of values in steps, ties to even."""
        spacing = self.spacing(steps)
        rounded: Array = np.rint(steps / spacing) * spacing
        return rounded

    def spacing(self, steps: Array) -> Array:
        """Distance in steps between the codes next to values in steps: 1 for integers."""
        if not self.is_float:
            return np.ones_like(steps)
        _, exponents = np.frexp(np.abs(steps))  # the magnitude is in [2^(e-1), 2^e)
        exponents = np.where(steps == 0, _LEAST_EXPONENT, exponents - 1)
        spacing: Array = np.ldexp(1.0, np.maximum(exponents, _LEAST_EXPONENT) - _MANTISSA_BITS)
        return spacing


def make_grid(scale: Array, fmt: Format, axis: int | None, dimensions: int) -> Grid:
    """The grid of a quantizer.

    Args:
        scale: One number, or one for each index of the axis.
        fmt: Its format.
        axis: The axis of the scales, None for one.
        dimensions: Number of dimensions of the tensor.
    """
    shape = [1] * dimensions
    if axis is not None and scale.size > 1:
        shape[axis] = scale.size
    return Grid(scale.astype(np.float64).reshape(shape), fmt.qmin, fmt.qmax, fmt.is_float)


def grid_of_values(values: Array) -> Grid:
    """The grid that 8 bits would give a tensor without a quantizer."""
    finite = values[np.isfinite(values)]
    largest = float(np.max(np.abs(finite), initial=0.0)) or 1.0
    return Grid(np.array(largest / _CODES), -_CODES, _CODES)


def measure_lsb(grid: Grid, expected: Array, actual: Array) -> Array:
    """Distance of each element in steps, flat; where only the expected one is finite, the whole range."""
    distances = np.abs(grid.clip(expected) - grid.clip(actual))
    is_lost = np.isfinite(expected) & ~np.isfinite(actual)
    return np.where(is_lost, grid.highest - grid.lowest, distances).ravel()


def measure_code_steps(grid: Grid, values: Array, rounded: Array, near_tie: float) -> Array:
    """Distance of what a file made of values from their codes, in codes; 0 for values that are next to a tie.

    Args:
        grid: The grid of the quantizer.
        values: What Q read.
        rounded: What DQ wrote.
        near_tie: How near, in steps.
    """
    steps = grid.clip(values)
    codes, spacing = grid.round(steps), grid.spacing(steps)
    with np.errstate(over="ignore", invalid="ignore"):
        written = np.nan_to_num(rounded.astype(np.float64) / grid.scale)
    distances: Array = np.abs(written - codes) / spacing
    is_near_tie = np.abs(np.abs(steps - codes) - 0.5 * spacing) < near_tie
    distances[is_near_tie & (distances < 1 + _SAME_CODE)] = 0.0
    return distances.ravel()


def measure_cell_steps(grid: Grid, values: Array, rounded: Array) -> Array:
    """How far values are outside of the cell that was rounded to a code, in steps.

    Args:
        grid: The grid of the quantizer.
        values: What torch computes.
        rounded: What DQ wrote.
    """
    steps = grid.clip(values)
    with np.errstate(over="ignore", invalid="ignore"):
        written = np.nan_to_num(rounded.astype(np.float64) / grid.scale)
    distances: Array = np.maximum(np.abs(written - steps) - 0.5 * grid.spacing(written), 0.0)
    return distances.ravel()


def largest_rounding(grid: Grid, values: Array, rounding: float) -> float:
    """The distance in steps that arithmetic alone may leave: a fraction of the largest value, or of the range.

    Args:
        grid: The grid of the tensor.
        values: The tensor. Values far out of range count as `_FAR` times the range.
        rounding: The fraction.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.nan_to_num(np.abs(values.astype(np.float64) / grid.scale))
    largest = float(np.max(steps, initial=0.0))
    return rounding * min(max(largest, grid.highest), _FAR * grid.highest)
