"""What integer layers refuse: tensors that are no codes, ranges with two owners or none, layers of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qdq.errors import (
    ArgumentError,
    ArgumentTypeError,
    NumberTypeError,
    QdqError,
    ShapeError,
    StateError,
    is_out_of_memory,
)
from qdq.systems.integer.qparam import QParam


def require_codes(x: Any, qi: QParam, label: str) -> torch.Tensor:
    """The codes of an input, int32.

    Args:
        x: Integers of any type, also in a float tensor.
        qi: Range of the input; one that was loaded into a layer without a width has any codes.
        label: Name of the layer, for the message.

    Raises:
        ArgumentError: An empty tensor, numbers that are no integers, or integers that are no codes.
        NumberTypeError: Not a tensor, or one of bools or complex numbers.
    """
    fix = "call qi.quantize_tensor on the input of the network."
    if not isinstance(x, torch.Tensor):
        raise NumberTypeError(f"{label}: the input is a {type(x).__name__}.", fix)
    if x.dtype == torch.bool or x.is_complex():
        raise NumberTypeError(f"{label}: quantize_inference takes codes, and got {x.dtype}.", fix)
    if x.numel() == 0:
        raise ArgumentError(
            f"{label}: the input of shape {tuple(x.shape)} is empty.", "give at least one code."
        )
    if not x.is_floating_point():
        x = x.long()
    elif not bool((x == x.round()).all()):
        first = float(x[x != x.round()][0])
        raise ArgumentError(
            f"{label}: quantize_inference takes codes, and got numbers that are no integers, such as {first:g}.",
            fix,
        )
    smallest, largest = (end.item() for end in x.aminmax())
    limits = torch.iinfo(torch.int32)
    lowest, highest = (limits.min, limits.max) if qi.num_bits is None else qi.codes
    if smallest < lowest or largest > highest:
        raise ArgumentError(
            f"{label}: quantize_inference got numbers from {smallest:.0f} to {largest:.0f}; its input has codes "
            f"from {lowest} to {highest}.",
            fix,
        )
    codes: torch.Tensor = x.to(torch.int32)
    return codes


@contextmanager
def naming_layer(label: str, x: torch.Tensor) -> Iterator[None]:
    """Turn an error of torch in the block into one that names the layer and the shape of its input.

    Args:
        label: Name of the layer.
        x: The input.

    Raises:
        ShapeError: The layer cannot compute with such an input.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, QdqError) or is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ShapeError(
            f"{label}: the input of shape {tuple(x.shape)} does not fit: {reason}.",
            "give an input of the shape for which it was calibrated.",
        ) from error


def require_int32(weight: torch.Tensor, label: str) -> None:
    """Refuse the weight of a frozen layer that holds no codes any more.

    Args:
        weight: The weight.
        label: Name of the layer, for the message.

    Raises:
        StateError: Its type is another one.
    """
    if weight.dtype != torch.int32:
        raise StateError(
            f"{label}: the weight is of type {weight.dtype}; its codes are int32.",
            "load the frozen state again; move a frozen network with to(device).",
        )


def choose_range(name: str, owned: QParam | None, offered: Any, label: str) -> QParam:
    """The one range with which a layer is frozen: its own, or that of the layer next to it.

    Args:
        name: "qi" or "qo".
        owned: The range of the layer itself, if it has one.
        offered: The range that `freeze` was given, if any.
        label: Name of the layer, for the message.

    Raises:
        ArgumentError: Two ranges or none, or one with several scales.
        ArgumentTypeError: Not a `QParam`.
        StateError: It is not calibrated.
    """
    if owned is not None and offered is not None:
        raise ArgumentError(
            f"{label}: {name} has been provided in init function.",
            f"call freeze without {name}, or make the layer with {name}=False.",
        )
    qparam = offered if owned is None else owned
    if qparam is None:
        raise ArgumentError(
            f"{label}: {name} is not existed, should be provided.",
            f"give freeze the {name} of the layer next to it.",
        )
    if not isinstance(qparam, QParam):
        raise ArgumentTypeError(
            f"{label}: {name} is a {type(qparam).__name__}.", "give the QParam of another layer."
        )
    if qparam.axis is not None:
        raise ArgumentError(
            f"{label}: {name} has ranges along axis {qparam.axis}, as a weight has.",
            "give the range of an activation.",
        )
    if not qparam.is_calibrated:
        raise StateError(f"{label}: {name} has no range.", "call forward on data before freeze.")
    return qparam


def require_layer(layer: Any, kind: type[nn.Module], label: str) -> None:
    """Refuse a float layer of another kind.

    Raises:
        ArgumentTypeError: It is one.
    """
    if not isinstance(layer, kind):
        raise ArgumentTypeError(
            f"{label}: it was given a {type(layer).__name__}, not a {kind.__name__}.",
            f"pass a {kind.__name__}.",
        )


def require_statistics(
    batchnorm: nn.BatchNorm2d, channels: int, label: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The running mean and variance that are folded into a convolution.

    Args:
        batchnorm: The BatchNorm after it.
        channels: Output channels of the convolution.
        label: Name of the layer, for the message.

    Raises:
        ArgumentError: There are none, or they are those of other channels.
    """
    mean, variance = batchnorm.running_mean, batchnorm.running_var
    if mean is None or variance is None:
        raise ArgumentError(
            f"{label}: {batchnorm} has no running statistics, so there is nothing to fold.",
            "make the BatchNorm with track_running_stats=True, and train or load it.",
        )
    if len(mean) != channels:
        raise ArgumentError(
            f"{label}: {batchnorm} has {len(mean)} channels, the convolution before it {channels}.",
            "pass the BatchNorm of this convolution.",
        )
    return mean, variance
