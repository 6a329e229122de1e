"""Codes and approximated scales of tensors, under the names that users of Distiller know.

With a multiplier s and a zero point zp, code = round_half_even(s * x - zp) and value = (code + zp) / s.
"""

from __future__ import annotations

import torch

from qdq.distiller.ranges.number_tensors import Numbers, like_given, read_numbers
from qdq.distiller.ranges.scale_approximation import approximate_scale, evaluate_approximation
from qdq.errors import ArgumentError
from qdq.systems.affine import cast_like
from qdq.systems.arithmetic import require_values


def linear_quantize(input: torch.Tensor, scale: Numbers, zero_point: Numbers) -> torch.Tensor:
    """The codes, which are not clamped.

    Args:
        input: Values of any float type.
        scale: s, above 0; of a shape that broadcasts to the values.
        zero_point: zp, likewise.

    Returns:
        Codes in the type of the values.

    Raises:
        ArgumentError: NaN or Inf in the values, or a scale that is not above 0.
        NumberTypeError: Values that are no float tensor, or a scale or zero point that is no number.
    """
    require_values(input, "linear_quantize")
    multiplier, offset = _read_params(scale, zero_point, input)
    return cast_like((multiplier * input.detach().float() - offset).round(), input)


def linear_quantize_clamp(
    input: torch.Tensor,
    scale: Numbers,
    zero_point: Numbers,
    clamp_min: float,
    clamp_max: float,
) -> torch.Tensor:
    """The codes from a smallest to a largest one.

    Args:
        input: As for `linear_quantize`.
        scale: Likewise.
        zero_point: Likewise.
        clamp_min: The smallest code.
        clamp_max: The largest code.

    Raises:
        ArgumentError: As for `linear_quantize`.
        NumberTypeError: Likewise; or an end that is no number.
    """
    codes = linear_quantize(input, scale, zero_point)
    lowest = float(read_numbers(clamp_min, "clamp_min"))
    highest = float(read_numbers(clamp_max, "clamp_max"))
    return codes.clamp(lowest, highest)


def linear_dequantize(input: torch.Tensor, scale: Numbers, zero_point: Numbers) -> torch.Tensor:
    """The values of codes.

    Args:
        input: Codes in any float type.
        scale: As for `linear_quantize`.
        zero_point: Likewise.

    Raises:
        ArgumentError: As for `linear_quantize`.
        NumberTypeError: Likewise.
    """
    require_values(input, "linear_dequantize")
    multiplier, offset = _read_params(scale, zero_point, input)
    return cast_like((input.detach().float() + offset) / multiplier, input)


def get_scale_approximation_params(
    fp32_scale: Numbers, mult_bits: int, limit: bool = False
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The multiplier and the shift of scales, see `approximate_scale`.

    Args:
        fp32_scale: Above 0.
        mult_bits: The width of the multiplier.
        limit: Shift by at most this width.

    Returns:
        Tensors of the shape of the scales, or floats for one number.

    Raises:
        ArgumentError: A scale that is not finite and above 0, or no such width.
        ArgumentTypeError: The width is no integer, or a scale is no number.
    """
    multiplier, shift = approximate_scale(fp32_scale, mult_bits, limit)
    return like_given(multiplier, fp32_scale), like_given(shift, fp32_scale)


def approx_scale_as_mult_and_shift(
    fp32_scale: Numbers, mult_bits: int, limit: bool = False
) -> torch.Tensor | float:
    """Scales as their multiplier and shift have them.

    Args:
        fp32_scale: As for `get_scale_approximation_params`.
        mult_bits: Likewise.
        limit: Likewise.

    Raises:
        ArgumentError: As for `get_scale_approximation_params`.
        ArgumentTypeError: Likewise.
    """
    approximated = evaluate_approximation(*approximate_scale(fp32_scale, mult_bits, limit))
    return like_given(approximated, fp32_scale)


def _read_params(
    scale: Numbers, zero_point: Numbers, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale above 0 and a zero point, which broadcast to the values.

    Raises:
        ArgumentError: They do not, or are not finite, or the scale is not above 0.
        NumberTypeError: They are no numbers.
    """
    multiplier = read_numbers(scale, "scale", device=values.device)
    offset = read_numbers(zero_point, "zero_point", device=values.device)
    if not bool((multiplier.isfinite() & (multiplier > 0)).all() & offset.isfinite().all()):
        raise ArgumentError(
            f"scale is {scale}, and zero_point {zero_point}; both must be finite, and scale above 0.",
            "calibrate first.",
        )
    if not (_fits(multiplier, values) and _fits(offset, values)):
        raise ArgumentError(
            f"scale has the shape {list(multiplier.shape)}, zero_point {list(offset.shape)}, and the tensor "
            f"{list(values.shape)}.",
            "give one number, or a shape that broadcasts to the tensor.",
        )
    return multiplier, offset


def _fits(numbers: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether numbers broadcast to the shape of the values."""
    try:
        numbers.expand(values.shape)
    except RuntimeError:
        return False
    return True
