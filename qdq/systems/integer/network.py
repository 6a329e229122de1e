"""`IntegerNetwork`: a chain of layers that is calibrated, frozen and run on codes.

A class of the user with the same four methods works as well: `quantize` makes the layers, `quantize_forward` calibrates
them, `freeze` hands each the output range of the layer before, `quantize_inference` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentError, StateError
from qdq.systems.affine import Scheme
from qdq.systems.integer.functions import QMaxPooling2d, QReLU, QSigmoid
from qdq.systems.integer.layers import QConv2d, QConvBNReLU, QLinear
from qdq.systems.integer.module import QModule
from qdq.systems.integer.qparam import QParam

_SHAPE_ONLY = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
_ACTIVATIONS = (nn.ReLU, nn.MaxPool2d, nn.Sigmoid)


class IntegerNetwork(nn.Module):
    """A chain of float layers that becomes one of integer layers.

    Args:
        layers: Conv2d, Conv2d with BatchNorm2d and ReLU, Linear, ReLU, MaxPool2d, Sigmoid, Flatten, Unflatten, Identity
            and Dropout, which does nothing in the integer layers.

    Attributes:
        layers: The float layers, whose weights `freeze` replaces by codes.
        qlayers: The integer layers after `quantize`.
    """

    qlayers: nn.ModuleList

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The float network."""
        result: torch.Tensor = self.layers(x)
        return result

    def quantize(
        self,
        num_bits: int = 8,
        *,
        scheme: Scheme = "unsigned",
        axis: int | None = None,
        groups: int | None = None,
    ) -> None:
        """Make the integer layers.

        Args:
            num_bits: Width of all codes.
            scheme: As for `affine.find_codes`; a network in "symmetric" fits TensorRT as it is.
            axis: As for `QParam`, for the weights; 0 with no `groups` is one scale for each output channel.
            groups: As for `QParam`, for the weights.

        Raises:
            ArgumentError: A layer that has no integer form, a width or scheme that does not exist.
        """
        weighted = {"scheme": scheme, "axis": axis, "groups": groups}
        queue = list(self.layers)
        qlayers: list[nn.Module] = []
        while queue:
            layer = queue.pop(0)
            is_first = not any(isinstance(qlayer, QModule) for qlayer in qlayers)
            if isinstance(layer, _SHAPE_ONLY):
                qlayers.append(nn.Identity() if isinstance(layer, nn.Dropout) else layer)
            elif isinstance(layer, _ACTIVATIONS):
                qlayers.append(_make_activation(layer, is_first, num_bits, scheme))
            elif isinstance(layer, nn.Linear):
                qlayers.append(QLinear(layer, is_first, True, num_bits, **weighted))
            elif isinstance(layer, nn.Conv2d):
                qlayers.append(_make_convolution(layer, queue, is_first, num_bits, weighted))
            else:
                raise ArgumentError(
                    f"{layer} has no integer form here.",
                    "write a network with the methods of IntegerNetwork.",
                )
        self.qlayers = nn.ModuleList(qlayers)

    def quantize_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the fake-quantized network, which calibrates it unless its ranges are held (`holding_ranges`).

        Raises:
            StateError: Not quantized, or frozen.
        """
        for qlayer in self._require_layers():
            x = qlayer(x)
        return x

    def freeze(self) -> None:
        """Turn all layers to codes; each takes the output range of the one before.

        Raises:
            StateError: Not quantized, not calibrated, or frozen.
        """
        before: QParam | None = None
        for qlayer in self._require_layers():
            if isinstance(qlayer, QModule):
                qlayer.freeze(qi=before)
                before = qlayer.qo if qlayer.qo.is_calibrated else qlayer.qi

    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The values of the output codes, float32.

        Args:
            x: The float input of the network.

        Raises:
            StateError: Not frozen.
        """
        qmodules = [qlayer for qlayer in self._require_layers() if isinstance(qlayer, QModule)]
        if not qmodules[0].is_frozen:
            raise StateError("IntegerNetwork: quantize_inference before freeze.", "call freeze.")
        x = qmodules[0].qi.quantize_tensor(x)
        for qlayer in self.qlayers:
            x = qlayer.quantize_inference(x) if isinstance(qlayer, QModule) else qlayer(x)
        last = qmodules[-1]
        return (last.qo if last.qo.is_calibrated else last.qi).dequantize_tensor(x)

    def _require_layers(self) -> nn.ModuleList:
        if not hasattr(self, "qlayers"):
            raise StateError("IntegerNetwork: it is not quantized.", "call quantize first.")
        return self.qlayers


def _make_activation(layer: Any, is_first: bool, num_bits: int, scheme: Scheme) -> QModule:
    """The integer form of a layer without weights."""
    if isinstance(layer, nn.Sigmoid):
        return QSigmoid(is_first, True, num_bits, scheme=scheme)
    if isinstance(layer, nn.ReLU):
        return QReLU(is_first, num_bits, scheme=scheme)
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


@contextmanager
def holding_ranges(model: nn.Module) -> Iterator[None]:
    """Hold all `QParam` ranges of a model in the block, to measure the calibrated network.

    Args:
        model: A network whose layers have been made.
    """
    qparams = [module for module in model.modules() if isinstance(module, QParam)]
    former = [qparam.is_tracking for qparam in qparams]
    for qparam in qparams:
        qparam.is_tracking = False
    try:
        yield
    finally:
        for qparam, is_tracking in zip(qparams, former, strict=True):
            qparam.is_tracking = is_tracking
