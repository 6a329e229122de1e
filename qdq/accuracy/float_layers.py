"""What the passes on the float model share: they change weights and biases before `swap_modules`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import log10
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear

from qdq.errors import StateError
from qdq.forward import ForwardTrace, Operation
from qdq.functions import CONVOLUTIONS, IDENTITIES, LINEAR
from qdq.nn import QuantInputMixin
from qdq.nn.scaling import is_shifted
from qdq.text import group_names


def require_float_model(model: nn.Module, function: str) -> None:
    """Refuse a model that is swapped already.

    Args:
        model: Any model.
        function: Name of the function that wants the float model.

    Raises:
        StateError: The model has quantized layers.
    """
    if any(isinstance(module, QuantInputMixin) for module in model.modules()):
        raise StateError("the model has quantized layers.", f"call {function} before swap_modules.")


def list_unchanged(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a table that say what was left unchanged, one for each reason.

    Args:
        reasons: Reason and name of each tensor; the reason is "" if it was changed.
    """
    unchanged = [(reason, name) for reason, name in reasons if reason]
    lines = []
    for reason, names in group_names(unchanged).items():
        lines.append(f"  {len(names)} ({names[0]} ...): {reason}")
    return lines


@contextmanager
def undoing_changes(layers: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Yield a function that restores the parameters of some layers; an error or Ctrl-C in the block does so, too.

    Args:
        layers: The layers that the block changes.
    """
    saved: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            saved[id(parameter)] = (parameter, parameter.detach().clone())

    @torch.no_grad()
    def undo() -> None:
        for parameter, values in saved.values():
            parameter.copy_(values)

    try:
        yield undo
    except BaseException:
        undo()
        raise


class ScalableLayers:
    """The convolutions and linear layers of a model, and which of them may be scaled.

    Args:
        model: The model.
        trace: The record of a forward.
    """

    def __init__(self, model: nn.Module, trace: ForwardTrace) -> None:
        self._modules = dict(model.named_modules())
        self._runs = trace.calls
        self._products: Counter[str] = Counter()
        self._uses: Counter[int] = Counter()
        self._produced: set[int] = set()
        for operation in trace.operations:
            if self.find(operation) is not None:
                self._products[operation.module] += 1
            self._uses.update(operation.inputs)
            self._produced.update(operation.outputs)

        self._owners: Counter[int] = Counter()  # of the memory at each address
        for module in self._modules.values():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._owners[_address_of(tensor)] += 1

    def find(self, operation: Operation) -> nn.Module | None:
        """The layer whose product an operation is.

        Args:
            operation: Any call.
        """
        if operation.function not in CONVOLUTIONS | LINEAR:
            return None
        layer = self._modules.get(operation.module)
        return layer if isinstance(layer, _ConvNd | Linear) else None

    def is_shifted(self, name: str) -> bool:
        """Whether `center_inputs` gave a layer an offset.

        Args:
            name: Its dotted name.
        """
        return is_shifted(self._modules[name])

    def reason_against(self, operation: Operation, computed: list[int], dims: int) -> str:
        """Why the layer of a product must stay unchanged, "" if it may be scaled.

        Args:
            operation: The product.
            computed: The inputs of the product that depend on the input of the model.
            dims: Number of dimensions of its input.
        """
        name = operation.module
        layer: Any = self._modules[name]
        weight = layer._parameters.get("weight")
        if self._runs[name] > 1 or self._products[name] > 1:
            return f"{name} runs several times in one forward"
        if weight is None or isinstance(layer, _ConvTransposeNd) or len(computed) > 1:
            return f"the weight of {name} is not a plain parameter with the outputs first"
        if self._produced.intersection(operation.inputs[1:]):
            return f"{name} computes its weight or bias"
        if self._shares_parameters(layer, operation.inputs[1:]):
            return f"a parameter of {name} is also used elsewhere"
        if dims < layer.weight.dim():
            return f"the input of {name} has no axis of samples"
        return ""

    def _shares_parameters(self, layer: nn.Module, values: Sequence[int]) -> bool:
        """Whether other functions read the parameters of a layer, or other modules share their memory."""
        if any(self._uses[value] > 1 for value in values):
            return True
        for name in ("weight", "bias"):
            parameter = layer._parameters.get(name)
            if parameter is not None and self._owners[_address_of(parameter)] > 1:
                return True
        return False


def _address_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def returns_input(operation: Operation) -> bool:
    """Whether a function returns its input as it is, such as dropout.

    Args:
        operation: Any call.
    """
    return operation.function in IDENTITIES and len(operation.inputs) == 1


def pads_zeros(operation: Operation) -> bool:
    """Whether a padding adds zeros; positional arguments are named by their position.

    Args:
        operation: A call of `F.pad`.
    """
    arguments = operation.arguments
    mode = arguments.get("mode", arguments.get("2", "constant"))
    value = arguments.get("value", arguments.get("3", 0))
    return mode == "constant" and not value


def pads_input(layer: Any) -> bool:
    """Whether a layer pads its input, so that it does not read a shift everywhere.

    Args:
        layer: Any layer.
    """
    padding = getattr(layer, "padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return bool(np.any(padding))


def may_pad(layer: Any) -> bool:
    """Whether a subclass of a convolution has a forward of its own that may pad, for instance at other sizes only.

    Args:
        layer: Any layer.
    """
    if not isinstance(layer, _ConvNd):
        return False
    has_kernel = any(size > 1 for size in layer.kernel_size)
    classes: list[Any] = list(type(layer).__mro__)
    torch_class = next(base for base in classes if base.__module__ == _ConvNd.__module__)
    return has_kernel and classes[0].forward is not torch_class.forward


def may_read_zeros(layer: Any) -> bool:
    """Whether a layer may put zeros around its input.

    Args:
        layer: Any layer.
    """
    return pads_input(layer) or may_pad(layer)


def rounding_db(model: nn.Module) -> float:
    """SQNR in dB of an error of a hundred times the rounding of the parameters; outputs are compared in float32.

    Args:
        model: Any model.
    """
    steps = [torch.finfo(torch.float32).eps]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            steps.append(torch.finfo(parameter.dtype).eps)
    return -20 * log10(100 * max(steps))
