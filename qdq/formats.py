"""Number formats as values: width, codes, the scale of a range, and why TensorRT refuses a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdq.errors import ArgumentError, ArgumentTypeError

AMAX_FLOOR = 2.0**-64
"""Smallest range with its own scale; smaller ones get this scale, which keeps it positive for amax 0 (R-SCALE)."""

FP8_BITS = (4, 3)
"""`num_bits` of FP8 E4M3: 4 bits of exponent, 3 of mantissa, as pytorch-quantization and ModelOpt write it."""

FP8_AMAX_FLOOR = 448 * 2.0**-14
"""Smallest range that calibration gives FP8: its scale is the smallest normal float16 number (R-SCALE). Steps of FP8
are relative, so a tensor of smaller values loses nothing by it."""

FORMAT_NAMES = ("int8", "fp8")
"""The formats that TensorRT multiplies in, by the name in options and plans."""

INT8 = "int8"
"""The name of signed 8 bit."""

FLOAT = "float"
"""The name, in plans, of what is not quantized."""

PRECISIONS = (*FORMAT_NAMES, FLOAT)
"""What a plan can say of a layer."""

FP8_LEAST_SM = 89
"""Lowest compute capability with FP8, 89 for 8.9."""

FP8_LOWEST_OPSET = 19
"""First opset of ONNX whose QuantizeLinear and DequantizeLinear have FP8."""

NumBits = int | tuple[int, int]


@dataclass(frozen=True)
class Format:
    """An integer format with zero point 0, or FP8 E4M3.

    FP8 is E4M3FN (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433): no infinity, the largest
    number is 448. Its codes are the numbers that it has, so a code times the scale is a value, as for integers.

    Args:
        num_bits: Width in bits, 2 to 16; (4, 3) for FP8 E4M3.
        unsigned: Codes start at 0.
        narrow_range: Leave out the most negative code, so that the range is symmetric.

    Raises:
        ArgumentError: `num_bits` outside 2..16 and not (4, 3); FP8 without a sign or with a narrow range.
    """

    num_bits: NumBits = 8
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_bits, tuple):
            self._require_fp8(self.num_bits)
        elif not 2 <= self.num_bits <= 16:
            raise ArgumentError(
                f"num_bits is {self.num_bits}; integer formats have 2 to 16 bits.",
                "use num_bits=8 for TensorRT; other widths are simulated in torch only.",
            )

    def _require_fp8(self, num_bits: tuple[int, int]) -> None:
        has_floats = any(isinstance(number, float) for number in num_bits)  # 3.0 equals 3
        if num_bits != FP8_BITS or has_floats:
            raise ArgumentError(
                f"num_bits is {num_bits}; of the float formats only FP8 E4M3 is known, (4, 3).",
                "use num_bits=(4, 3), or an integer width.",
            )
        if self.unsigned or self.narrow_range:
            raise ArgumentError(
                "FP8 E4M3 has a sign and the same numbers on both sides of 0: it cannot be unsigned, and its range is "
                "always symmetric.",
                "leave out unsigned and narrow_range.",
            )

    @property
    def is_float(self) -> bool:
        """Whether the codes are floating-point numbers: a grid whose steps grow with the values."""
        return isinstance(self.num_bits, tuple)

    @property
    def width(self) -> int:
        """Bits of a code."""
        return 8 if isinstance(self.num_bits, tuple) else self.num_bits

    @property
    def name(self) -> str:
        """Its name: "int8", "fp8", "uint4"."""
        if self.is_float:
            return "fp8"
        sign = "u" if self.unsigned else ""
        return f"{sign}int{self.width}"

    @property
    def qmax(self) -> int:
        """The largest code, which amax is mapped to."""
        if self.is_float:
            return 448
        num_magnitude_bits = self.width if self.unsigned else self.width - 1
        return (1 << num_magnitude_bits) - 1

    @property
    def qmin(self) -> int:
        """The smallest code. TensorRT clamps to -128, not to -127 (R-RANGE)."""
        if self.unsigned:
            return 0
        if self.is_float or self.narrow_range:
            return -self.qmax
        return -self.qmax - 1

    @property
    def clip_high(self) -> float:
        """What is above rounds to a code that the format does not have, and is clipped to `qmax`."""
        return self.qmax + (16 if self.is_float else 0.5)  # half of the last step, 448 - 416

    @property
    def clip_low(self) -> float:
        """What is below is clipped to `qmin`."""
        return self.qmin - (16 if self.is_float else 0.5)

    def list_magnitudes(self) -> list[float]:
        """The codes from 0 to `qmax`, ascending."""
        if not self.is_float:
            return [float(code) for code in range(self.qmax + 1)]
        subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
        normal = [
            (1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)
        ]
        return [*subnormal, *normal[:-1]]  # the last one would be NaN

    @property
    def tensorrt_reason(self) -> str | None:
        """The reason why TensorRT cannot take this format as int8 or FP8 Q/DQ; None if it can."""
        if self.is_float:
            return None
        if self.unsigned:
            return (
                "unsigned codes above 127 saturate in TensorRT, which reads uint8 as int8 (R-SYM)"
            )
        if self.num_bits != 8:
            return f"TensorRT has int8 Q/DQ only, not {self.num_bits} bit; other widths stay a simulation"
        return None


FP8 = Format(FP8_BITS)
"""FP8 E4M3."""


def require_formats(formats: Sequence[str]) -> None:
    """Refuse names of formats that are not known, none, and one name twice.

    Raises:
        ArgumentTypeError: A text, or what is no sequence.
        ArgumentError: Other names than `FORMAT_NAMES`.
    """
    if isinstance(formats, str) or not isinstance(formats, Sequence):
        raise ArgumentTypeError(
            f"formats is {formats!r}; expected a sequence of names.", "pass ('int8',) or ('fp8',)."
        )
    unknown = [name for name in formats if name not in FORMAT_NAMES]
    if unknown or not formats or len(set(formats)) != len(formats):
        raise ArgumentError(
            f"formats is {list(formats)}; known are {', '.join(FORMAT_NAMES)}, each at most once.",
            "pass ('int8',), ('fp8',) or both.",
        )


def require_precisions(pinned: Mapping[str, str]) -> None:
    """Refuse names of precisions that are not known.

    Args:
        pinned: Layer -> precision.

    Raises:
        ArgumentError: With the first layer.
    """
    for name, precision in pinned.items():
        if precision not in PRECISIONS:
            raise ArgumentError(
                f"{name} is pinned to {precision!r}.", "pin to 'int8', 'fp8' or 'float'."
            )


def parse_formats(text: str) -> tuple[str, ...]:
    """The names in a list with commas, as in `int8,fp8`; int8 comes first.

    Raises:
        ArgumentError: Other names than `FORMAT_NAMES`, none, or one twice.
    """
    names = [name.strip() for name in text.split(",")]
    require_formats(names)
    return tuple(name for name in FORMAT_NAMES if name in names)


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
