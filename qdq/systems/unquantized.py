"""Which layers and function calls of a model get no quantizer from `duplicate_model_with_quant`, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from qdq.forward import join_name, name_function, require_model
from qdq.functions import ACTIVATIONS, COPIES, FUNCTIONS, MAX_POOLINGS
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.sequential import runs_children_in_order
from qdq.text import group_names, list_names

QUANTIZED_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d)
"""The layers after which a quantizer is put."""

_AVERAGES = (
    nn.AvgPool1d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_KEEPING = ACTIVATIONS | COPIES | MAX_POOLINGS  # functions that compute no new sums
_SHOWN_NAMES = 4


@dataclass(frozen=True)
class Unquantized:
    """A layer or a call whose result stays float.

    Args:
        name: Dotted name.
        kind: Class of the layer, or name of the function.
        reason: Why it has no quantizer.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class UnquantizedReport:
    """Result of `list_unquantized`.

    Args:
        entries: Layers in the order of `named_modules`, then calls in the order of the forward.
        note: Why calls could not be listed; "" if they were.
    """

    entries: tuple[Unquantized, ...]
    note: str

    def format_table(self) -> str:
        """The number, and a line for each class and reason."""
        lines = [
            f"{len(self.entries)} layers and calls have no quantizer, their results stay float"
        ]
        names = (((entry.kind, entry.reason), entry.name) for entry in self.entries)
        for (kind, reason), group in group_names(names).items():
            lines.append(f"  {len(group)} {kind} ({list_names(group, _SHOWN_NAMES)}): {reason}")
        if self.note:
            lines.append(f"  function calls are not listed: {self.note}")
        return "\n".join(lines)


def list_unquantized(model: nn.Module) -> UnquantizedReport:
    """List what has no quantizer in a model that `duplicate_model_with_quant` has returned.

    Args:
        model: The model. torch.fx traces it for the function calls; if it cannot, only layers are listed.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    calls, note = _list_calls(model)
    return UnquantizedReport((*_list_layers(model, ""), *calls), note)


def _list_layers(module: nn.Module, name: str) -> Iterator[Unquantized]:
    keys = list(module._modules)
    for position, (key, child) in enumerate(module._modules.items()):
        if child is None or isinstance(child, SystemQuantizer):
            continue
        follower = module._modules[keys[position + 1]] if position + 1 < len(keys) else None
        path = join_name(name, key)
        if not isinstance(follower, SystemQuantizer):
            reason = _explain(child, module)
            if reason:
                yield Unquantized(path, type(child).__name__, reason)
        yield from _list_layers(child, path)


def _explain(layer: nn.Module, parent: nn.Module) -> str:
    """Why a layer without a quantizer has none; "" for a module that computes nothing itself."""
    if isinstance(layer, QUANTIZED_LAYERS):
        if not isinstance(parent, nn.Sequential):
            return "outside a Sequential"
        if runs_children_in_order(parent):
            return "put in without a quantizer"
        return f"{type(parent).__name__} has a forward of its own"
    has_parameters = any(True for _ in layer.parameters(recurse=False))
    if has_parameters or isinstance(layer, _AVERAGES):
        return "no quantizer is defined for this class"
    return ""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one node: its inside is not a call of the model."""
        layers = (*QUANTIZED_LAYERS, SystemQuantizer)
        return isinstance(module, layers) or super().is_leaf_module(module, qualified_name)


def _list_calls(model: nn.Module) -> tuple[list[Unquantized], str]:
    """The calls whose results have no quantizer, and why they are unknown."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the code of the user, which can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [], f"torch.fx cannot trace the model ({reason})"
    calls = []
    counts: defaultdict[str, int] = defaultdict(int)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        function = name_function(node.target) if callable(node.target) else str(node.target)
        if function not in FUNCTIONS or function in _KEEPING:
            continue
        module = _find_caller(node)
        name = join_name(module, function)
        if counts[name]:
            name = f"{name}_{counts[name]}"
        counts[join_name(module, function)] += 1
        calls.append(Unquantized(name, function, "a function call"))
    return calls, ""


def _find_caller(node: fx.Node) -> str:
    """Dotted name of the module whose forward made a call."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")
