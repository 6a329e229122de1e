"""The constants of ACIQ: how many deviations from the mean to clip at (Banner et al., arXiv 1810.05723).

For M bits the error of clipping equals that of rounding at the c with

    Laplace, in units of mean |x - mu|:          c * exp(c) = 3 * 4^M
    Gauss, in units of the standard deviation:   pdf(c) - c * (1 - cdf(c)) = c / (6 * 4^M)

A tensor that a ReLU will cut at 0 has all its codes on one side, as M + 1 bits would have. Up to 8 bits the published
table is used, which has these numbers to one or two digits.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Literal, get_args

from qdq.errors import ArgumentError
from qdq.systems.settings import require_bits

Distribution = Literal["laplace", "gauss"]

_LAPLACE = (1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89)
_LAPLACE_HALF = (1.86, 2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16)
_GAUSS = (None, 1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92)
_GAUSS_HALF = (None, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2)

_TABLES: dict[tuple[Distribution, bool], tuple[float | None, ...]] = {
    ("laplace", False): _LAPLACE,
    ("laplace", True): _LAPLACE_HALF,
    ("gauss", False): _GAUSS,
    ("gauss", True): _GAUSS_HALF,
}
_HIGHEST = 64.0  # above the constants of 32 bits
_NUM_HALVINGS = 60  # of 64, until float64 has no more digits


def find_clip_constant(
    distribution: Distribution, num_bits: int, half_range: bool = False
) -> float:
    """The constant c.

    Args:
        distribution: What the values are spread like.
        num_bits: The width M, 0 to 32; Gauss has none for 0 bits in the table.
        half_range: Whether a ReLU follows.

    Raises:
        ArgumentError: Another distribution or width.
        ArgumentTypeError: The width is no integer.
    """
    known = get_args(Distribution)
    if distribution not in known:
        raise ArgumentError(
            f"the distribution is {reprlib.repr(distribution)}; known are {', '.join(known)}.",
            "give one of these.",
        )
    require_bits(num_bits, "find_clip_constant", least=0)
    table = _TABLES[distribution, half_range]
    constant = table[num_bits] if num_bits < len(table) else None
    return (
        solve_clip_constant(distribution, num_bits + half_range) if constant is None else constant
    )


def solve_clip_constant(distribution: Distribution, num_bits: int) -> float:
    """The solution of the equation, for any width.

    Args:
        distribution: What the values are spread like.
        num_bits: The width M.
    """
    excess = {"laplace": _laplace_excess, "gauss": _gauss_excess}[distribution]
    return _bisect(lambda constant: excess(constant, num_bits))


def _laplace_excess(constant: float, num_bits: int) -> float:
    """Above 0 where the constant is too large."""
    return math.log(constant) + constant - math.log(3 * 4.0**num_bits)


def _gauss_excess(constant: float, num_bits: int) -> float:
    """Above 0 where the constant is too large."""
    density = math.exp(-(constant**2) / 2) / math.sqrt(2 * math.pi)
    tail = math.erfc(constant / math.sqrt(2)) / 2
    return constant / (6 * 4.0**num_bits) - density + constant * tail


def _bisect(excess: Callable[[float], float]) -> float:
    """The zero of a rising function."""
    low, high = 0.0, _HIGHEST
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if excess(middle) > 0:
            high = middle
        else:
            low = middle
    return high
