"""amax with the least expected squared error if the values are Laplace or Gauss distributed.

Source: R. Banner, Y. Nahshan, E. Hoffer, D. Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment", NeurIPS 2019 (ACIQ). With a step of amax / qmax the error is the clipped tail on both sides plus the
rounding, (amax / qmax)^2 / 12; the paper prints the best ratio of amax to the scale of the distribution for 2 to 8 bits
and 2^bits levels. Here the ratio is the zero of the derivative, for any format.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def laplace_ratio(qmax: float) -> float:
    """Best amax / b for a Laplace distribution of scale b around 0.

    With u = amax / b the error is 2 b^2 e^-u + (u b / qmax)^2 / 12; its derivative is zero where u e^u = 12 qmax^2.

    Args:
        qmax: The largest code; 2^(bits - 1) gives the figures that the paper prints.
    """
    return _find_zero(lambda u: u - 12 * qmax**2 * math.exp(-u))


def gauss_ratio(qmax: float) -> float:
    """Best amax / sigma for a Gauss distribution of standard deviation sigma around 0.

    With u = amax / sigma, density p and upper tail Q of the normal distribution, the derivative of the error in u is
    sigma^2 (u / (6 qmax^2) - 4 (p(u) - u Q(u))).

    Args:
        qmax: As for `laplace_ratio`.
    """

    def slope(u: float) -> float:
        density = math.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        tail = math.erfc(u / math.sqrt(2)) / 2
        return u / (6 * qmax**2) - 4 * (density - u * tail)

    return _find_zero(slope)


def _find_zero(rising: Callable[[float], float]) -> float:
    """The zero of a function that rises through 0 once between 0 and 64, by bisection to the last bit."""
    low, high = 0.0, 64.0
    while (middle := (low + high) / 2) not in (low, high):
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return middle
