"""What stays in float by default because of its shape: int8 kernels that are missing, slow or not worth it."""

from __future__ import annotations

from collections.abc import Sequence

MIN_CHANNELS = 16  # R-CONV-3
MIN_MATMUL_SIZE = 16  # R-MM-3


def reason_against_convolution(weight: Sequence[int], groups: int, is_first: bool) -> str:
    """Why a convolution stays in float; "" if it does not (R-CONV-3, R-CONV-4, R-CONV-7).

    Args:
        weight: Shape `[Cout, Cin / groups, kernel ...]`.
        groups: Its groups.
        is_first: Whether it is the first convolution of the network, which has few input channels by nature.
    """
    outputs, per_group, *kernel = weight
    inputs = per_group * groups
    if len(kernel) == 3:
        return "3-D convolution: int8 is fragile (R-CONV-7)"
    if 1 < groups < inputs:
        return "grouped convolution: TensorRT splits it into one kernel a group (R-CONV-4)"
    if outputs >= MIN_CHANNELS and per_group >= MIN_CHANNELS:
        return ""
    if groups == 1:
        is_aligned = outputs % 8 == 0 or inputs % 8 == 0
        is_wide = is_first or max(outputs, inputs) >= MIN_CHANNELS
        fits = is_aligned and is_wide and len(set(kernel)) == 1
    else:
        fits = outputs % 8 == 0 and min(kernel) >= 3
    return (
        ""
        if fits
        else f"{inputs} to {outputs} channels, kernel {kernel}: no efficient int8 kernel (R-CONV-3)"
    )


def reason_against_linear(weight: Sequence[int]) -> str:
    """Why a matrix product stays in float; "" if it does not (R-MM-3).

    Args:
        weight: Shape `[outputs, inputs]`.
    """
    if min(weight) < MIN_MATMUL_SIZE:
        return (
            f"{weight[1]} to {weight[0]} features: a product this small is slower in int8 (R-MM-3)"
        )
    return ""
