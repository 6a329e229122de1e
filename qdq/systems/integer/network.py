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

from qdq.errors import StateError
from qdq.systems.affine import Scheme
from qdq.systems.integer.chain import make_chain
from qdq.systems.integer.module import QModule
from qdq.systems.integer.qparam import QParam
from qdq.systems.settings import require_kind


class IntegerNetwork(nn.Module):
    """A chain of float layers that becomes one of integer layers.

    Args:
        layers: Conv2d, Conv2d with BatchNorm2d and ReLU, Linear, ReLU, MaxPool2d, Sigmoid, Flatten, Unflatten, Identity
            and Dropout, which does nothing in the integer layers.

    Attributes:
        layers: The float layers, whose weights `freeze` replaces by codes.
        qlayers: The integer layers after `quantize`.

    Raises:
        ArgumentTypeError: A layer that is no module, such as `torch.relu`.
    """

    qlayers: nn.ModuleList

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            require_kind(layer, nn.Module, f"layer {index}", "IntegerNetwork")
        self.layers = nn.Sequential(*layers)
        # With the handle here, a process that loads the pickled network gives its new hooks other numbers.
        self._load_hook = self.register_load_state_dict_post_hook(_freeze_first)  # type: ignore[no-untyped-call]

    @property
    def is_frozen(self) -> bool:
        """Whether a layer computes on codes, so that its float layer holds codes."""
        qlayers = getattr(self, "qlayers", ())
        return any(isinstance(qlayer, QModule) and qlayer.is_frozen for qlayer in qlayers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The float network.

        Raises:
            StateError: Frozen; its layers hold codes.
        """
        # torch.fx may trace a frozen network, to find what is before it.
        if self.is_frozen and isinstance(x, torch.Tensor):
            raise StateError(
                "IntegerNetwork: forward after freeze; its layers hold codes.",
                "call quantize_inference; for a float forward keep a copy from before freeze, or call restore_float.",
            )
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
            ArgumentError: A layer that has no integer form, one with weights that occurs twice, or none to quantize; a
                width or scheme that does not exist.
            StateError: It is frozen.
        """
        if self.is_frozen:
            raise StateError(
                "IntegerNetwork: quantize after freeze; its layers hold codes.",
                "quantize a copy from before freeze.",
            )
        qlayers = make_chain(list(self.layers), num_bits, scheme, axis, groups)
        self.qlayers = nn.ModuleList(qlayers)
        for name, module in self.named_modules():
            if isinstance(module, QModule):
                _put_path(module, name)

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
        qlayers = self._require_qmodules()
        before: QParam | None = None
        inputs = []
        for qlayer in qlayers:  # nothing is frozen, unless all can be
            inputs.append(before)
            before = qlayer.check_freeze(before)[-1]
        for qlayer, qi in zip(qlayers, inputs, strict=True):
            qlayer.freeze(qi)

    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The values of the output codes, float32.

        Args:
            x: The float input of the network.

        Raises:
            StateError: Not frozen.
        """
        qmodules = self._require_qmodules()
        if not self.is_frozen:
            raise StateError("IntegerNetwork: quantize_inference before freeze.", "call freeze.")
        x = qmodules[0].qi.quantize_tensor(x)
        for qlayer in self.qlayers:
            x = qlayer.quantize_inference(x) if isinstance(qlayer, QModule) else qlayer(x)
        return qmodules[-1].output_range.dequantize_tensor(x)

    def _require_layers(self) -> nn.ModuleList:
        if not hasattr(self, "qlayers"):
            raise StateError("IntegerNetwork: it is not quantized.", "call quantize first.")
        return self.qlayers

    def _require_qmodules(self) -> list[QModule]:
        return [qlayer for qlayer in self._require_layers() if isinstance(qlayer, QModule)]


def _put_path(qlayer: QModule, path: str) -> None:
    """Begin messages about a layer and its ranges with its dotted name."""
    for module in (qlayer, *qlayer.children()):
        if isinstance(module, QModule | QParam):
            module.label = f"{path}, {module.label}"


def _freeze_first(network: IntegerNetwork, _: Any) -> None:
    """Freeze the first layer if the next one was loaded frozen: a pooling with a range of its own cannot tell."""
    qmodules = [qlayer for qlayer in getattr(network, "qlayers", ()) if isinstance(qlayer, QModule)]
    if len(qmodules) > 1:
        qmodules[0].is_frozen = qmodules[1].is_frozen


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
