"""Number formats as values: how many bits, which codes, which ONNX type stores them."""

from __future__ import annotations

from dataclasses import dataclass

from qdq.errors import ArgumentError


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
        """The largest code, onto which amax is mapped."""
        return int(2 ** (self.num_bits - (0 if self.unsigned else 1)) - 1)

    @property
    def qmin(self) -> int:
        """The smallest code: TensorRT clamps to -128, not -127 (R-RANGE)."""
        if self.unsigned:
            return 0
        return -self.qmax if self.narrow_range else -self.qmax - 1

    @property
    def tensorrt_reason(self) -> str | None:
        """Why TensorRT cannot take this format as int8 Q/DQ, or None if it can."""
        if self.unsigned:
            return (
                "unsigned codes above 127 saturate in TensorRT, which reads uint8 as int8 (R-SYM)"
            )
        if self.num_bits != 8:
            return f"TensorRT has int8 Q/DQ only, not {self.num_bits} bit; other widths stay a simulation"
        return None
