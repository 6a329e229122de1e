"""Scale and zero point of a range, in the modes of range-linear quantization.

The scale s is a multiplier, the inverse of a scale of ONNX:

    code = clamp(round_half_even(s * x - zp)),  value = (code + zp) / s

    SYMMETRIC             s = (2^b - 1) / 2 / sat,     zp = 0,                         codes -2^(b-1) to 2^(b-1) - 1
    SYMMETRIC_RESTRICTED  s = (2^(b-1) - 1) / sat,     zp = 0,                         codes +-(2^(b-1) - 1)
    ASYMMETRIC_UNSIGNED   s = (2^b - 1) / (max - min), zp = round(s * min),            codes 0 to 2^b - 1
    ASYMMETRIC_SIGNED     as before,                   zp = round(s * min) + 2^(b-1),  codes -2^(b-1) to 2^(b-1) - 1

All is float32, and a quotient n / x is n times the inverse of x. Published codes lie on exact ties, which this
arithmetic keeps: a division that is rounded once gives other codes. Ranges in float64 keep all of them: there a scale
and its products are float64, and a product is rounded to float32 before it is rounded to a code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qdq.distiller.ranges.modes import LinearQuantMode, get_quantized_range
from qdq.distiller.ranges.number_tensors import Numbers, read_numbers
from qdq.errors import ArgumentError
from qdq.systems.affine import cast_like
from qdq.systems.grid import Grid, name_width
from qdq.systems.settings import require_bits

_LIMITS = torch.finfo(torch.float32)


@dataclass(frozen=True)
class LinearParams:
    """The scale and zero point of a tensor.

    Args:
        scale: s, a multiplier; float32 or float64, of a shape that broadcasts to the values.
        zero_point: zp, in the same shape.
        num_bits: The width b.
        mode: The mode.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    num_bits: int
    mode: LinearQuantMode

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return get_quantized_range(self.num_bits, self.mode.is_signed, self.mode.is_restricted)[0]

    @property
    def highest(self) -> int:
        """The largest code."""
        return get_quantized_range(self.num_bits, self.mode.is_signed, self.mode.is_restricted)[1]

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """The codes, in float32.

        Args:
            values: Any float type.
        """
        scaled = (self.scale * values.to(self.scale.dtype)).float()
        return (scaled - self.zero_point).round().clamp(self.lowest, self.highest)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, in float32.

        Args:
            codes: From `quantize`.
        """
        return ((codes + self.zero_point) / self.scale).clamp(_LIMITS.min, _LIMITS.max).float()

    def fake_quantize(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values, in the type of the values; without a gradient.

        Args:
            values: Any float type.
        """
        return cast_like(self.dequantize(self.quantize(values.detach())), values)

    def describe(self, system: str) -> Grid:
        """The grid for `qdq.systems.to_tensorrt`.

        Args:
            system: Name of the number system.
        """
        return Grid(
            system=system,
            scale=self.scale.reciprocal().float().flatten(),
            zero_point=-self.zero_point.flatten(),
            lowest=self.lowest,
            highest=self.highest,
            obstacle=name_width(self.num_bits),
        )


def solve_params(low: Numbers, high: Numbers, num_bits: int, mode: LinearQuantMode) -> LinearParams:
    """The scale and zero point of ranges.

    Args:
        low: Lower ends, float64 for a scale in float64; the range is widened to contain 0.
        high: Upper ends.
        num_bits: The width b.
        mode: The mode; a symmetric one takes the larger absolute end.

    Returns:
        The parameters, in the shape of the ends.

    Raises:
        ArgumentError: A lower end above the upper one, an end that is not finite, shapes that do not fit, or no such
            width.
        ArgumentTypeError: The width is no integer, or an end is no number.
    """
    require_bits(num_bits, "range-linear quantization", 2 if mode.is_restricted else 1)
    lower, upper = _order_ends(low, high)
    if mode.is_symmetric:
        num_steps = 2 ** (num_bits - 1) - 1 if mode.is_restricted else (2**num_bits - 1) / 2
        scale = _divide(num_steps, torch.maximum(-lower, upper))
        return LinearParams(scale, torch.zeros_like(scale).float(), num_bits, mode)
    scale = _divide(2**num_bits - 1, upper - lower)
    zero_point = (scale * lower).float().round()
    if mode.is_signed:
        zero_point = zero_point + 2 ** (num_bits - 1)
    return LinearParams(scale, zero_point, num_bits, mode)


def _order_ends(low: Numbers, high: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of ranges that contain 0: of one type, on one device, broadcast.

    Raises:
        ArgumentError: A lower end above the upper one, an end that is not finite, or shapes that do not fit.
        NumberTypeError: Ends that are no numbers.
    """
    device = low.device if isinstance(low, torch.Tensor) else getattr(high, "device", None)
    is_wide = getattr(low, "dtype", None) == torch.float64
    dtype = torch.float64 if is_wide else torch.float32
    lower = read_numbers(low, "min", dtype, device)
    upper = read_numbers(high, "max", dtype, device)
    try:
        lower, upper = torch.broadcast_tensors(lower, upper)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ArgumentError(
            f"min has the shape {list(lower.shape)}, and max {list(upper.shape)}.",
            "give ends of the same shape, or one number.",
        ) from None
    is_wrong = ~((lower <= upper) & lower.isfinite() & upper.isfinite())  # NaN is wrong, too
    if bool(is_wrong.any()):
        first = int(is_wrong.flatten().to(torch.uint8).argmax())
        ends = f"min {float(lower.flatten()[first])} and max {float(upper.flatten()[first])}"
        raise ArgumentError(
            f"a range has {ends}; both must be finite, and min not above max.",
            "mend the statistics or the data.",
        )
    return lower.clamp(max=0), upper.clamp(min=0)


def _divide(num_steps: float, width: torch.Tensor) -> torch.Tensor:
    """The quotient n / width as n times the inverse, 1 for no width; finite and above 0."""
    is_empty = width == 0
    inverse = torch.where(is_empty, 1.0, width).clamp(max=_LIMITS.max).reciprocal()
    scale = (inverse * num_steps).clamp(_LIMITS.tiny, _LIMITS.max)
    return torch.where(is_empty, 1.0, scale)
