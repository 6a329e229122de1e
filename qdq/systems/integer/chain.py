"""The integer layers of a chain of float layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from qdq.errors import ArgumentError
from qdq.systems.affine import Scheme
from qdq.systems.integer.functions import QMaxPooling2d, QReLU, QSigmoid
from qdq.systems.integer.layers import QConv2d, QConvBNReLU, QLinear
from qdq.systems.integer.module import QModule

_SHAPE_ONLY = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
_ACTIVATIONS = (nn.ReLU, nn.MaxPool2d, nn.Sigmoid)
_WEIGHTED = (nn.Conv2d, nn.Linear)
_FIX = "write a network with the methods of IntegerNetwork."


def make_chain(
    layers: list[nn.Module],
    num_bits: int,
    scheme: Scheme,
    axis: int | None,
    groups: int | None,
) -> list[nn.Module]:
    """The integer layers, the first of which has a range for its input.

    Args:
        layers: As for `IntegerNetwork`.
        num_bits: As for `IntegerNetwork.quantize`.
        scheme: As for `IntegerNetwork.quantize`.
        axis: As for `IntegerNetwork.quantize`.
        groups: As for `IntegerNetwork.quantize`.

    Raises:
        ArgumentError: A layer that has no integer form, a layer with weights that occurs twice, or nothing to quantize.
    """
    _require_single_use(layers)
    options = {"scheme": scheme, "axis": axis, "groups": groups}
    queue = list(layers)
    qlayers: list[nn.Module] = []
    is_first = True
    while queue:
        layer = queue.pop(0)
        if isinstance(layer, _SHAPE_ONLY):
            qlayers.append(nn.Identity() if isinstance(layer, nn.Dropout) else layer)
            continue
        if isinstance(layer, _ACTIVATIONS):
            qlayers.append(_make_activation(layer, is_first, num_bits, scheme))
        elif isinstance(layer, nn.Linear):
            qlayers.append(QLinear(layer, is_first, True, num_bits, **options))
        elif isinstance(layer, nn.Conv2d):
            qlayers.append(_make_convolution(layer, queue, is_first, num_bits, options))
        else:
            raise ArgumentError(f"{layer} has no integer form here.", _FIX)
        is_first = False
    if is_first:
        raise ArgumentError(
            f"IntegerNetwork: none of its {len(layers)} layers has an integer form.",
            "give a layer with weights, a ReLU, a MaxPool2d or a Sigmoid.",
        )
    return qlayers


def _require_single_use(layers: list[nn.Module]) -> None:
    """Refuse a layer with weights at two places: its codes cannot fit two input ranges."""
    weighted: set[nn.Module] = set()
    for layer in layers:
        if not isinstance(layer, _WEIGHTED):
            continue
        if layer in weighted:
            raise ArgumentError(f"{layer} occurs twice in the chain.", "give each place a copy.")
        weighted.add(layer)


def _make_activation(layer: Any, is_first: bool, num_bits: int, scheme: Scheme) -> QModule:
    """The integer form of a layer without weights.

    Raises:
        ArgumentError: A pooling with other options than size, stride and padding.
    """
    if isinstance(layer, nn.Sigmoid):
        return QSigmoid(is_first, True, num_bits, scheme=scheme)
    if isinstance(layer, nn.ReLU):
        return QReLU(is_first, num_bits, scheme=scheme)
    if layer.dilation not in (1, (1, 1)) or layer.ceil_mode or layer.return_indices:
        raise ArgumentError(
            f"{layer} with return_indices={layer.return_indices} has no integer form here.", _FIX
        )
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    return QMaxPooling2d(*sizes, qi=is_first, num_bits=num_bits, scheme=scheme)


def _make_convolution(
    layer: nn.Conv2d, queue: list[nn.Module], is_first: bool, num_bits: int, options: Any
) -> QConv2d:
    """The integer form of a convolution; BatchNorm and ReLU behind it are taken from the queue.

    Raises:
        ArgumentError: BatchNorm without ReLU.
    """
    if not (queue and isinstance(queue[0], nn.BatchNorm2d)):
        return QConv2d(layer, is_first, True, num_bits, **options)
    batchnorm = queue.pop(0)
    if not (queue and isinstance(queue[0], nn.ReLU)):
        raise ArgumentError(
            f"{batchnorm} has no ReLU after it.", "fold it into the convolution (fold_batchnorm)."
        )
    queue.pop(0)
    assert isinstance(batchnorm, nn.BatchNorm2d)  # noqa: S101
    return QConvBNReLU(layer, batchnorm, is_first, True, num_bits, **options)
