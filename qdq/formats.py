"""Number formats as values: width, codes, the scale of a range, and why TensorRT refuses a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdq.errors import ArgumentError

AMAX_FLOOR = 2.0**-64
"""Smallest range with its own scale; smaller ones get this scale, which keeps it positive for amax 0 (R-SCALE)."""


@dataclass(frozen=True)
class Format:
    """An integer format with zero point 0.

    Args:
        num_bits: Width in bits, 2 to 16.
        unsigned: Codes start at 0.
        narrow_range: Leave out the most negative code, so that the range is symmetric.

    Raises:
        ArgumentError: `num_bits` outside 2..16.
    """

    num_bits: int = 8
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 16:
            raise ArgumentError(
                f"num_bits is {self.num_bits}; integer formats have 2 to 16 bits.",
                "use num_bits=8 for TensorRT; other widths are simulated in torch only.",
            )

    @property
    def qmax(self) -> int:
        """The largest code, which amax is mapped to."""
        num_magnitude_bits = self.num_bits if self.unsigned else self.num_bits - 1
        return (1 << num_magnitude_bits) - 1

    @property
    def qmin(self) -> int:
        """The smallest code. TensorRT clamps to -128, not to -127 (R-RANGE)."""
        if self.unsigned:
            return 0
        if self.narrow_range:
            return -self.qmax
        return -self.qmax - 1

    @property
    def tensorrt_reason(self) -> str | None:
        """The reason why TensorRT cannot take this format as int8 Q/DQ; None if it can."""
        if self.unsigned:
            return (
                "unsigned codes above 127 saturate in TensorRT, which reads uint8 as int8 (R-SYM)"
            )
        if self.num_bits != 8:
            return f"TensorRT has int8 Q/DQ only, not {self.num_bits} bit; other widths stay a simulation"
        return None


def scale_from_amax(amax: Any, fmt: Format) -> Any:
    """Scale of a range: max(amax, AMAX_FLOOR) / qmax, a divisor as in ONNX.

    A tensor of torch, on any device, and an array of numpy give the same bits.

    Args:
        amax: A float tensor, or a float array with at least one axis, or a numpy float.
        fmt: The format.

    Returns:
        Positive numbers of the type, the precision and the shape of `amax`; NaN where `amax` is NaN.
    """
    clipped = amax.clip(min=AMAX_FLOOR)
    if getattr(clipped, "is_cpu", True):  # numpy too
        return clipped / fmt.qmax
    # CUDA multiplies by the reciprocal of a number, which rounds twice.
    return clipped / clipped.new_full((), fmt.qmax)
