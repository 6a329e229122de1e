"""The arithmetic of integer-only inference: bias codes, sums in int32, and a product with M as an integer and a shift.

(Jacob et al., CVPR 2018, arXiv 1712.05877, sections 2.2 to 2.4.)
"""

from __future__ import annotations

import logging

import torch

from qdq.systems.integer.qparam import QParam

logger = logging.getLogger(__name__)

INT32_MAX = 2**31 - 1


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
    ratio = ratio.double()
    _, exponent = torch.frexp(ratio.max() if is_shared else ratio)
    multiplier = torch.ldexp(ratio, 31 - exponent).round().clamp(max=2**31 - 1)
    return multiplier.long(), -exponent.long()


def shift_right(products: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Products * 2^-shift, rounded to the nearest integer; ties go up.

    Args:
        products: int64 below 2^62.
        shift: int64; a negative one multiplies.
    """
    down = shift.clamp(1, 62)
    half = torch.ones_like(down) << (down - 1)
    return torch.where(shift > 0, (products + half) >> down, products << (-shift).clamp(0, 62))


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
        return (sums * ratio).sum(0).round().long()
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


def spread_scale(qw: QParam, weight: torch.Tensor) -> torch.Tensor:
    """The scale of a weight in float64: one, or one for each output channel or block of inputs.

    Args:
        qw: Range of the weight.
        weight: The weight or its codes.
    """
    scale = qw.scale.double()
    return qw.spread(scale, weight).flatten() if qw.axis == 0 else scale


def find_bias_block(qw: QParam) -> int:
    """The block of inputs to whose sum the bias is added: that of the largest scale, blocks of zeros apart.

    Args:
        qw: Range of the weight.
    """
    if qw.axis != 1:
        return 0
    is_empty = qw.max == qw.min
    return int(torch.where(is_empty, 0, qw.scale).argmax())
