"""What torch computes: the input of every quantizer and the output of every layer with weights, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qdq.batch import tensors_of
from qdq.device import without_tf32
from qdq.forward import call_model, evaluating
from qdq.outputs import name_outputs
from qdq.quantizer import TensorQuantizer, named_quantizers

_WEIGHT_QUANTIZER = "_weight_quantizer"


@dataclass(frozen=True)
class Site:
    """A tensor of the network: the input of a quantizer, the output of a layer, or an output of the network.

    Args:
        name: Dotted name of the quantizer or layer, or name of the output.
        call: Number of earlier calls of the same module in this forward.
        kind: "quantizer", "layer" or "output".
    """

    name: str
    call: int = 0
    kind: str = "quantizer"


Replace = Callable[[Site, torch.Tensor, TensorQuantizer], torch.Tensor | None]
"""Called after each quantizer with its input; a tensor takes the place of its output."""


class Recording:
    """One forward, site by site, in order of execution.

    Attributes:
        tensors: Site -> the input of the quantizer, or the output of the layer or network.
        quantizers: The quantizers among them.
        unpaired: Output that only the file or only torch has -> the reason.
    """

    def __init__(self) -> None:
        self.tensors: dict[Site, torch.Tensor] = {}
        self.quantizers: dict[Site, TensorQuantizer] = {}
        self.unpaired: dict[str, str] = {}
        self._calls: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, kind: str, tensor: torch.Tensor) -> Site:
        """Note the tensor of the next call of a module; a copy, since a later function may change it in place."""
        site = Site(name, self._calls[name, kind], kind)
        self._calls[name, kind] += 1
        self.tensors[site] = tensor.detach().clone()
        return site


@torch.no_grad()
@without_tf32()
def record_forward(
    model: nn.Module, batch: Any, outputs: list[str], replace: Replace | None = None
) -> Recording:
    """Run a model once and keep its tensors.

    Args:
        model: A quantized model.
        batch: As for `call_model`.
        outputs: Names of the outputs of the file, in order.
        replace: Called after each quantizer of an activation.
    """
    recording = Recording()
    with evaluating(model), _watching(model, recording, replace):
        result = call_model(model, batch)
    tensors = name_outputs(result)
    for name, tensor in zip(outputs, tensors.values(), strict=False):
        recording.add(name, "output", tensor)
    for name in outputs[len(tensors) :]:
        recording.unpaired[name] = "torch has no such output"
    for name in list(tensors)[len(outputs) :]:
        recording.unpaired[name] = "the file has no such output"
    return recording


@contextmanager
def _watching(model: nn.Module, recording: Recording, replace: Replace | None) -> Iterator[None]:
    """Note the tensors of a forward in the block."""
    with ExitStack() as hooks:
        for name, quantizer in list_quantizers(model).items():
            hook = partial(_note_quantizer, recording, name, replace)
            hooks.callback(quantizer.register_forward_hook(hook).remove)
        for name, layer in list_layers(model).items():
            layer_hook = partial(_note_layer, recording, name)
            hooks.callback(layer.register_forward_hook(layer_hook).remove)
        yield


def _note_quantizer(
    recording: Recording,
    name: str,
    replace: Replace | None,
    quantizer: TensorQuantizer,
    inputs: tuple[Any, ...],
    _: torch.Tensor,
) -> torch.Tensor | None:
    """Hook of a quantizer."""
    site = recording.add(name, "quantizer", inputs[0])
    recording.quantizers[site] = quantizer
    return None if replace is None else replace(site, inputs[0], quantizer)


def _note_layer(recording: Recording, name: str, _: nn.Module, __: Any, outputs: Any) -> None:
    """Hook of a layer; layers with several outputs are left out."""
    tensors = tensors_of(outputs)
    if len(tensors) == 1:
        recording.add(name, "layer", tensors[0])


def list_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """The quantizers of activations that are enabled, by name."""
    quantizers = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and not name.endswith(_WEIGHT_QUANTIZER):
            quantizers[name] = quantizer
    return quantizers


def list_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters, and whose children hold none, by name."""
    layers = {}
    for name, module in model.named_modules():
        parameters = set(module.parameters(recurse=False))
        if name and parameters and parameters == set(module.parameters()):
            layers[name] = module
    return layers
