"""The integers of acoustic models: 8 or 16 bits with an integer offset (Alvarez et al., Interspeech 2016).

For the range [low, high] of a matrix or a batch, with n = 2^b - 1:

    Q = n / (high - low), Q = 1 for an empty range;  offset = round_half_even(Q * low)
    code = clamp(round_half_even(Q * x) - offset, 0, n),  value = (code + offset) / Q

Both roundings use the same Q, so the offset is an integer, and real 0 is exact if it is in the range
(arXiv 1607.04683).
"""

from __future__ import annotations

import torch

from qdq.errors import ArgumentError, StateError
from qdq.systems.affine import cast_like
from qdq.systems.arithmetic import pass_gradient, require_batch, require_values
from qdq.systems.grid import Grid
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.ranged import MOVING_RANGE, RangedQuantizer
from qdq.systems.settings import require_choice, require_integer

_BITS = (8, 16)
_SYSTEM = "acoustic"


def solve_acoustic(
    low: torch.Tensor, high: torch.Tensor, num_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor Q and the integer offset of a range, in float64.

    Args:
        low: Lower end.
        high: Upper end.
        num_bits: 8 or 16.
    """
    width = high.double() - low.double()
    is_empty = width == 0
    factor = torch.where(is_empty, 1, (2**num_bits - 1) / torch.where(is_empty, 1, width))
    return factor, (factor * low).round()


def acoustic_quantize(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, num_bits: int
) -> torch.Tensor:
    """The quantized values, with the gradient straight through.

    Args:
        values: Any shape.
        low: Lower end of the range, one number.
        high: Upper end.
        num_bits: 8 or 16.

    Raises:
        ArgumentError: Empty or non-finite values or ends, ends in the wrong order, or another width.
        NumberTypeError: Not a float tensor, or a width that is no integer.
    """
    for tensor, name in ((values, "values"), (low, "low"), (high, "high")):
        require_values(tensor, f"acoustic_quantize, {name}")
    require_width(num_bits, "acoustic_quantize")
    if low.numel() > 1 or high.numel() > 1 or bool(low > high):
        raise ArgumentError(
            f"acoustic_quantize: the range is from {low.tolist()} to {high.tolist()}.",
            "give one number each, the lower end first.",
        )
    return _quantize(values, low.reshape(()), high.reshape(()), num_bits)


def _quantize(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, num_bits: int
) -> torch.Tensor:
    """`acoustic_quantize` for arguments that have been checked."""
    factor, offset = solve_acoustic(low, high, num_bits)
    codes = ((factor * values.double()).round() - offset).clamp(0, 2**num_bits - 1)
    return pass_gradient(values, cast_like((codes + offset) / factor, values))


class AcousticWeight(SystemQuantizer):
    """Quantizes a matrix by its own range.

    Args:
        num_bits: 8 or 16.
        name: Name of the layer, for messages.

    Raises:
        ArgumentError: Another width.
        NumberTypeError: A width that is no integer.
    """

    def __init__(self, num_bits: int = 8, name: str = "AcousticWeight") -> None:
        super().__init__(name)
        require_width(num_bits, name)
        self.num_bits = num_bits

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized weight. See `acoustic_quantize`."""
        require_batch(values, self.label)
        return _quantize(values, *values.detach().aminmax(), self.num_bits)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of a weight."""
        assert values is not None  # noqa: S101  # a weight
        return _describe(*values.detach().aminmax(), self.num_bits, "")


class AcousticInput(RangedQuantizer):
    """Quantizes a batch by its own range, or by that of all calibration batches.

    Args:
        num_bits: 8 or 16.
        is_static: Refuse to quantize before it has a range of calibration batches.
        name: Name of the layer, for messages.

    Attributes:
        low: Lower end of the static range; above `high` before calibration.
        high: Upper end.
        is_collecting: Return the input and widen the range instead.

    Raises:
        ArgumentError: Another width.
        NumberTypeError: A width that is no integer.
    """

    def __init__(
        self, num_bits: int = 8, *, is_static: bool = False, name: str = "AcousticInput"
    ) -> None:
        super().__init__(name)
        require_width(num_bits, name)
        self.num_bits = num_bits
        self.is_static = is_static

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized batch. See `acoustic_quantize`.

        Raises:
            ArgumentError: An empty batch, NaN or Inf.
            StateError: The range is to be static, and it has none.
        """
        if self.is_collecting:
            self.widen(values)
            return values
        require_batch(values, self.label)
        if self._is_moving():
            low, high = values.detach().aminmax()
        else:
            low, high = self.low, self.high
        return _quantize(values, low, high, self.num_bits)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of the input; that of a dynamic range has scale 1 and an obstacle."""
        if self._is_moving():
            zero = torch.zeros_like(self.low)
            return _describe(zero, zero, self.num_bits, MOVING_RANGE)
        return _describe(self.low, self.high, self.num_bits, "")

    def _is_moving(self) -> bool:
        """Whether its range is that of each batch.

        Raises:
            StateError: It is to be static, and has no range.
        """
        if self.has_range:
            return False
        if self.is_static:
            raise StateError(
                f"{self.label}: its input has no range.",
                "calibrate on batches that reach the layer.",
            )
        return True


def _describe(low: torch.Tensor, high: torch.Tensor, num_bits: int, obstacle: str) -> Grid:
    """The grid of a range: scale 1 / Q, zero point -offset."""
    factor, offset = solve_acoustic(low, high, num_bits)
    if num_bits > 8:
        obstacle = f"{num_bits} bits" + (f", and {obstacle}" if obstacle else "")
    scale = (1 / factor).float().reshape(1)
    zero_point = (0 - offset).float().reshape(1)
    return Grid(_SYSTEM, scale, zero_point, 0, 2**num_bits - 1, obstacle)


def require_width(num_bits: int, name: str) -> None:
    """Refuse a width other than 8 and 16.

    Args:
        num_bits: The width.
        name: Name of the layer, for the message.

    Raises:
        ArgumentError: It is another one.
        NumberTypeError: It is no integer.
    """
    require_integer(num_bits, "bits", name)
    require_choice(num_bits, _BITS, "bits", name)
