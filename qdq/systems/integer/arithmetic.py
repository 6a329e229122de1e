"""The arithmetic of integer-only inference: bias codes, sums in int32, and a product with M as an integer and a shift.

(Jacob et al., CVPR 2018, arXiv 1712.05877, sections 2.2 to 2.4.)
"""

from __future__ import annotations

import logging

import torch

from qdq.systems.integer.granularity import find_ends
from qdq.systems.integer.qparam import QParam

logger = logging.getLogger(__name__)

INT32_MAX = 2**31 - 1
_LIMIT = 2**62  # more than any code, and its sums with codes fit int64
_ZERO_WEIGHT_RATIO = (
    2.0**-8
)  # M of a weight of zeros: its bias is rounded to this part of an output code


def quantize_bias(bias: torch.Tensor, scale: torch.Tensor, layer: str) -> torch.Tensor:
    """The codes of a bias, int32 with zero point 0; those that do not fit are logged as a warning.

    Args:
        bias: One number for each output channel.
        scale: Scale of the weight times scale of the input, one for all channels or for each.
        layer: Name of the layer, for the warning.
    """
    limits = torch.iinfo(torch.int32)
    codes = (bias.detach().double() / scale.double()).round()
    is_saturated = (codes < limits.min) | (codes > limits.max)
    count = int(is_saturated.sum())
    if count:
        logger.warning(
            "%s: %d of %d bias codes do not fit int32 and saturate; the largest is %.0f",
            layer,
            count,
            codes.numel(),
            float(codes.abs().max()),
        )
    return codes.clamp(limits.min, limits.max).to(torch.int32)


def find_multiplier(
    ratio: torch.Tensor, *, is_shared: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers M0 and k of M = M0 * 2^-31 * 2^-k, with M0 * 2^-31 in [0.5, 1) and in 31 bits.

    Args:
        ratio: Positive numbers M; above 1, k is negative.
        is_shared: One k for all, that of the largest M.

    Returns:
        M0, of the shape of M, and k, in int64.
    """
    mantissa, exponent = torch.frexp(ratio.double())
    if is_shared:
        mantissa = torch.ldexp(mantissa, exponent - exponent.max())
        exponent = exponent.max()
    multiplier = (mantissa * 2**31).round().clamp(max=INT32_MAX)
    return multiplier.long(), -exponent.long()


def shift_right(products: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Products * 2^-shift, rounded to the nearest integer; ties go up.

    Args:
        products: int64 of magnitude below 2^62.
        shift: int64; a negative one multiplies, and the result saturates at 2^62.
    """
    down = shift.clamp(1, 63)  # with 63, all products become 0
    half = torch.ones_like(down) << (down - 1)
    up = (-shift).clamp(0, 62)
    limit = torch.full_like(up, _LIMIT) >> up
    saturated = torch.maximum(torch.minimum(products, limit), -limit)
    return torch.where(shift > 0, (products + half) >> down, saturated << up)


def rescale(
    sums: torch.Tensor, ratio: torch.Tensor, *, is_shared: bool, is_integer: bool
) -> torch.Tensor:
    """round(sum over blocks of M * sums), int64.

    Args:
        sums: `[blocks, ...]`, int64.
        ratio: M, in a shape that fits.
        is_shared: M differs among blocks, so that all need one shift.
        is_integer: The sums fit int32, and M becomes an integer and a shift; otherwise the product is in float64.
    """
    if not is_integer:
        return (sums * ratio).sum(0).round().clamp(-_LIMIT, _LIMIT).long()
    multiplier, shift = find_multiplier(ratio, is_shared=is_shared)
    return shift_right((sums * multiplier).sum(0), 31 + shift)


def fits_int32(weight: torch.Tensor, bias: torch.Tensor | None, qi: QParam) -> bool:
    """Whether no codes of the input can make a sum of products, plus the bias, exceed int32.

    Args:
        weight: Codes minus the zero point, `[C, ...]`.
        bias: Codes.
        qi: Range of the input.
    """
    lowest, highest = qi.codes
    zero_point = int(qi.zero_point)
    largest = max(highest - zero_point, zero_point - lowest)
    bounds = weight.long().abs().flatten(1).sum(1) * largest
    if bias is not None:
        bounds = bounds + bias.long().abs()
    return int(bounds.max()) <= INT32_MAX


def split_blocks(weight: torch.Tensor, qw: QParam) -> list[torch.Tensor]:
    """The weight, or one for each block of inputs with a scale of its own, with zeros elsewhere.

    Args:
        weight: Codes minus the zero point.
        qw: Range of the weight.
    """
    if qw.axis != 1:
        return [weight]
    numbers = torch.arange(qw.scale.numel(), device=weight.device)
    number_of_input = qw.spread(numbers, weight)
    return [weight * (number_of_input == number) for number in numbers]


def find_ratio(
    qw: QParam, codes: torch.Tensor, input_scale: torch.Tensor, output_scale: torch.Tensor
) -> torch.Tensor:
    """M = Sw * Sx / Sa in float64: one, or one for each output channel or block of inputs.

    Weights of zeros have Sw = 1, which says nothing about their bias, and any Sw fits their codes. They get an M for
    which the bias is exact to a part of an output code.

    Args:
        qw: Range of the weight.
        codes: Codes of the weight minus the zero point.
        input_scale: Sx.
        output_scale: Sa.
    """
    ratio = qw.scale.double() * input_scale.double() / output_scale.double()
    low, high = find_ends(codes.float(), qw.axis, qw.groups, qw.label)
    ratio = torch.where(low == high, _ZERO_WEIGHT_RATIO, ratio)
    return qw.spread(ratio, codes).flatten() if qw.axis == 0 else ratio


def report_coarse_bias(
    bias: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    output_scale: torch.Tensor,
    layer: str,
) -> None:
    """Log a warning about biases that rounding to their codes moves by more than one code of the output.

    This happens if M is above 2: the range of the output is narrow beside those of the weight and the input.

    Args:
        bias: The float bias.
        codes: Its codes; those that saturate are logged by `quantize_bias`.
        scale: Scale of the codes.
        output_scale: Sa.
        layer: Name of the layer, for the warning.
    """
    distance = (codes * scale - bias.double()).abs() / output_scale.double()
    is_coarse = (distance > 1) & (codes.long().abs() < INT32_MAX)
    count = int(is_coarse.sum())
    if count:
        logger.warning(
            "%s: M is %.4g, so %d of %d biases are rounded by more than one code of the output, the largest by %.0f",
            layer,
            float(scale.max() / output_scale.double()),
            count,
            codes.numel(),
            float(distance[is_coarse].max()),
        )


def find_bias_block(qw: QParam) -> int:
    """The block of inputs to whose sum the bias is added: that of the largest scale, blocks of zeros apart.

    Args:
        qw: Range of the weight.
    """
    if qw.axis != 1:
        return 0
    is_empty = qw.max == qw.min
    return int(torch.where(is_empty, 0, qw.scale).argmax())
