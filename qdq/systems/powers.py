"""Weights that are 0 or powers of two (Zhou, Yao, Guo, Xu, Chen: ICLR 2017, arXiv 1702.03044)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qdq.systems.arithmetic import require_values
from qdq.systems.binary import SMALLEST_SCALE
from qdq.systems.grid import INT8_HIGHEST, Grid, name_width
from qdq.systems.settings import require_bits, require_count, require_integer


@dataclass(frozen=True)
class PowerLevels:
    """The values 0 and +-2^k, k from `smallest` to `largest` (arXiv 1702.03044, section 2.1).

    Args:
        smallest: n2 = n1 + 1 - 2^(b - 1) / 2.
        largest: n1 = floor(log2(4 / 3 * max |W|)).

    Raises:
        ArgumentError: The smallest one is above the largest one.
        NumberTypeError: Not integers.
    """

    smallest: int
    largest: int

    def __post_init__(self) -> None:
        require_integer(self.smallest, "smallest", "PowerLevels")
        require_count(self.largest, "largest", "PowerLevels", least=self.smallest)

    @property
    def bits(self) -> int:
        """The width: one code for 0, and each level with both signs."""
        return 2 + (self.largest - self.smallest).bit_length()

    @classmethod
    def of(cls, values: torch.Tensor, bits: int, name: str = "PowerLevels") -> PowerLevels:
        """The levels for a weight.

        Args:
            values: The weight.
            bits: The width, from 2.
            name: Name of the weight, for messages.

        Raises:
            ArgumentError: As for `arithmetic.require_values` and `settings.require_bits`.
            NumberTypeError: Likewise.
        """
        require_bits(bits, name, least=2)
        require_values(values, name)
        maximum = float(values.detach().abs().max())
        # frexp gives m in [0.5, 1) and e with x = m * 2^e, without the rounding of a logarithm.
        largest = math.frexp(4 * maximum / 3)[1] - 1 if maximum else 0
        smallest = largest + 1 - 2 ** (bits - 2)
        limits = torch.finfo(values.dtype)  # beyond them the type has no such value
        least = math.frexp(limits.smallest_normal)[1] - 1
        most = math.frexp(limits.max)[1] - 1
        return cls(min(max(smallest, least), most), min(max(largest, least), most))

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest levels: +-beta if (alpha + beta) / 2 <= |w| < 3 / 2 * beta, alpha < beta neighbours.

        Args:
            values: Any shape.

        Raises:
            ArgumentError: As for `arithmetic.require_values`.
            NumberTypeError: Likewise.
        """
        require_values(values, "PowerLevels")
        magnitudes = values.detach().double().abs()
        exponents = torch.frexp(4 * magnitudes / 3).exponent - 1
        exponents = exponents.clamp(self.smallest, self.largest)
        levels = torch.tensor(
            [2.0**k for k in range(self.smallest, self.largest + 1)],
            dtype=torch.float64,
            device=values.device,
        )
        nearest = levels[(exponents - self.smallest).long()]
        nearest = torch.where(magnitudes < 2.0 ** (self.smallest - 1), 0.0, nearest)
        return torch.copysign(nearest, values.detach()).to(values.dtype)

    def describe(self, quantized: torch.Tensor) -> Grid:
        """The grid of quantized values: S = 2^n2, doubled while codes are too large and the smallest level is unused.

        Args:
            quantized: The result of `quantize`.
        """
        exponent = self.smallest
        exact = quantized.detach().double()
        while bool((exact.abs() > INT8_HIGHEST * 2.0**exponent).any()):
            if bool((exact.abs() == 2.0**exponent).any()):
                break
            exponent += 1
        codes = exact / 2.0**exponent
        scale = torch.tensor([2.0**exponent], device=quantized.device).clamp_min(SMALLEST_SCALE)
        return Grid(
            "powers of two",
            scale,
            torch.zeros_like(scale),
            int(codes.min()),
            int(codes.max()),
            obstacle=name_width(self.bits),
        )
