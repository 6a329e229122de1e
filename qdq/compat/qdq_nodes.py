"""The operators that both exporters write as QuantizeLinear and DequantizeLinear, with constant scales."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qdq.compat.tensor_quant import E4M3, E4M3_MAX, NumBits, divide_by_number
from qdq.formats import Format
from qdq.quantize import compute_scale


class Constants(NamedTuple):
    """Scale (ONNX's, a divisor) and zero point of one call of a quantizer, 0-D or 1-D, and the axis of the latter."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    axis: int | None


def make_constants(
    amax: torch.Tensor, num_bits: NumBits, unsigned: bool, axis: int | None
) -> Constants:
    """The constants for a range; one element is 0-D (R-SHAPE), and a scale is never 0 (R-SCALE)."""
    if num_bits == E4M3:
        scale = divide_by_number(amax.detach().float(), E4M3_MAX)
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return Constants(
            scale.reshape(()).clone(), torch.zeros((), dtype=torch.float8_e4m3fn), None
        )
    scale = compute_scale(amax.detach(), Format(8, unsigned))
    if axis is None or scale.numel() == 1:
        scale = scale.reshape(())
        axis = None
    else:
        scale = scale.flatten()
    return Constants(scale.clone(), torch.zeros_like(scale, dtype=torch.int32), axis)


def write_qdq(
    inputs: torch.Tensor, constants: Constants, num_bits: NumBits, unsigned: bool
) -> torch.Tensor:
    """Quantize and dequantize with the operators that become one pair of nodes.

    Args:
        inputs: Any shape; half and bfloat16 get a Cast to float32 before and a Cast back after.
        constants: As `make_constants` made them.
        num_bits: 8, or (4, 3).
        unsigned: Codes start at 0.
    """
    scale = constants.scale.to(inputs.device)
    zero_point = constants.zero_point.to(inputs.device)
    values = inputs
    if inputs.dtype != torch.float32:  # the tracer would write a Cast even to the same type
        values = inputs.float()
    fmt = Format(8, unsigned)
    if num_bits == E4M3:
        result = _write_fp8(values, scale, zero_point)
    elif constants.axis is None:
        result = torch.fake_quantize_per_tensor_affine(
            values, scale, zero_point, fmt.qmin, fmt.qmax
        )
    else:
        axis = constants.axis % inputs.dim()
        result = torch.fake_quantize_per_channel_affine(
            values, scale, zero_point, axis, fmt.qmin, fmt.qmax
        )
    if inputs.dtype == torch.float32:
        return result
    return result.to(inputs.dtype)


def _write_fp8(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Write FP8 with ONNX operators by name, because torch has no operator for it."""
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (values, scale, zero_point),
        dtype=torch.float8_e4m3fn,
        shape=values.shape,
        version=19,
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        dtype=torch.float32,
        shape=values.shape,
        version=19,
    )
