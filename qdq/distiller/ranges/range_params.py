"""Scale and zero point of a range, under the names that users of Distiller know; `linear_params` has the formulas."""

from __future__ import annotations

import torch

from qdq.distiller.ranges.linear_params import solve_params
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.ranges.number_tensors import Numbers, like_given, read_numbers
from qdq.errors import ArgumentError


def symmetric_linear_quantization_params(
    num_bits: int, saturation_val: Numbers, restrict_qrange: bool = False
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Scale and zero point for the range from -saturation_val to saturation_val.

    Args:
        num_bits: The width b.
        saturation_val: At least 0; the scale of 0 is 1.
        restrict_qrange: Whether the mode is SYMMETRIC_RESTRICTED, which has 2 bits or more.

    Returns:
        Tensors of the shape of the argument, or floats for one number.

    Raises:
        ArgumentError: A negative or non-finite saturation, or no such width.
        ArgumentTypeError: The width is no integer, or the saturation is no number.
    """
    mode = LinearQuantMode.SYMMETRIC_RESTRICTED if restrict_qrange else LinearQuantMode.SYMMETRIC
    saturation = read_numbers(saturation_val, "saturation_val")
    if bool((saturation < 0).any()):
        raise ArgumentError(
            f"saturation_val is {float(saturation.min())}; it must be at least 0.",
            "give the largest absolute value.",
        )
    params = solve_params(-saturation, saturation, num_bits, mode)
    return like_given(params.scale, saturation_val), like_given(params.zero_point, saturation_val)


def asymmetric_linear_quantization_params(
    num_bits: int,
    saturation_min: Numbers,
    saturation_max: Numbers,
    integral_zero_point: bool = True,
    signed: bool = False,
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Scale and zero point for a range, which is widened to contain 0.

    Args:
        num_bits: The width b.
        saturation_min: The lower end.
        saturation_max: The upper end; the scale of an empty range is 1.
        integral_zero_point: Round the zero point, so that 0 has a code.
        signed: Whether the mode is ASYMMETRIC_SIGNED.

    Returns:
        Tensors of the shape of the ends, or floats for two numbers.

    Raises:
        ArgumentError: The lower end is above the upper one, an end is not finite, shapes do not fit, or no such width.
        ArgumentTypeError: The width is no integer, or an end is no number.
    """
    mode = LinearQuantMode.ASYMMETRIC_SIGNED if signed else LinearQuantMode.ASYMMETRIC_UNSIGNED
    params = solve_params(saturation_min, saturation_max, num_bits, mode)
    zero_point = params.zero_point
    if not integral_zero_point:
        low = read_numbers(saturation_min, "min", device=params.scale.device).clamp(max=0)
        zero_point = params.scale * low + (2 ** (num_bits - 1) if signed else 0)
    ends = (saturation_min, saturation_max)
    return like_given(params.scale, *ends), like_given(zero_point, *ends)
