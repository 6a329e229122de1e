"""Which layers a system quantizes: all but the first and the last one that run, or those that the user chooses."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from qdq.errors import ArgumentError
from qdq.forward import require_model, trace_forward
from qdq.patterns import Pattern, Patterns
from qdq.systems.layer import is_layer, reason_against
from qdq.text import group_names, list_names

logger = logging.getLogger(__name__)

_WEIGHTED = (_ConvNd, nn.Linear)
_SHOWN_NAMES = 4


@dataclass(frozen=True)
class Selection:
    """The layers of a model, in the order in which they run.

    Args:
        layers: Name -> layer, those to quantize.
        float_layers: Name -> the reason why a layer stays in float.
    """

    layers: dict[str, Any]
    float_layers: dict[str, str]

    def format_table(self) -> str:
        """The number of layers, and a line for each one in float."""
        num_layers = len(self.layers) + len(self.float_layers)
        lines = [f"{len(self.layers)} of {num_layers} layers are quantized; in float:"]
        lines += [f"  {name}: {reason}" for name, reason in self.float_layers.items()]
        return "\n".join(lines)


def select_layers(
    model: nn.Module, example: Any, float_layers: Iterable[Pattern] | None = None
) -> Selection:
    """Choose the layers to quantize.

    The first and the last layer are the most sensitive ones and have few products, so they stay in float
    (Rastegari et al., arXiv 1603.05279, section 4; Zhou et al., arXiv 1606.06160, section 2.7).

    Args:
        model: Any model.
        example: Example inputs (see `forward.call_model`), which show the order in which the layers run.
        float_layers: Patterns (see `qdq.patterns`) of the layers that stay in float, () for none. None: the first and
            the last one.

    Raises:
        ArgumentError: No layer is left.
    """
    weighted = list_weighted(model)
    runs = [run.module for run in trace_forward(model, example).runs if run.module in weighted]
    reasons = _choose_float(weighted, runs, float_layers)
    selected: dict[str, Any] = {}
    in_float: dict[str, str] = {}
    for name in dict.fromkeys([*runs, *weighted]):
        reason = reasons.get(name) or _reason_against(weighted[name], name in runs)
        if reason:
            in_float[name] = reason
        else:
            selected[name] = weighted[name]
    if not selected:
        raise ArgumentError(
            f"no layer is left to quantize, {len(in_float)} stay in float.",
            "choose others with float_layers; () leaves none in float.",
        )
    return Selection(selected, in_float)


def _choose_float(
    weighted: dict[str, nn.Module], runs: list[str], patterns: Iterable[Pattern] | None
) -> dict[str, str]:
    """Layer -> the reason why the rule or the user keeps it in float."""
    if patterns is not None:
        wanted = Patterns(patterns, "float_layers")
        names = [name for name, layer in weighted.items() if wanted.match([name], layer)]
        wanted.warn_unused("layer")
        return dict.fromkeys(names, "chosen")
    layers = [name for name in runs if isinstance(weighted[name], _WEIGHTED)]
    if not layers:
        return {}
    return {layers[-1]: "the last layer that runs", layers[0]: "the first layer that runs"}


def _reason_against(layer: nn.Module, runs: bool) -> str:
    """Why a layer cannot be quantized; "" if it can."""
    return reason_against(layer) if runs else "it does not run"


def list_weighted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with matrices, by dotted name: convolutions, linear layers, attention, recurrent layers, embeddings.

    Args:
        model: Any model.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    layers = {}
    for name, module in model.named_modules():
        parameters = [tensor for tensor in module._parameters.values() if tensor is not None]
        has_matrix = any(not is_lazy(tensor) and tensor.dim() > 1 for tensor in parameters)
        is_part = isinstance(module, ParametrizationList)
        if isinstance(module, _WEIGHTED) or (has_matrix and not is_part):
            layers[name] = module
    return layers


def take_layers(model: nn.Module, function: str) -> dict[str, nn.Module]:
    """The layers that can become quantized ones, by dotted name; a warning lists those that no system has.

    Args:
        model: A float model.
        function: Name of the function that quantizes them, for messages.

    Raises:
        ArgumentError: There is none.
        ArgumentTypeError: Not a module.
    """
    weighted = list_weighted(model)
    layers = {name: layer for name, layer in weighted.items() if is_layer(layer)}
    reasons = [(reason_against(layer), name) for name, layer in weighted.items()]
    left = group_names((reason, name) for reason, name in reasons if reason)
    if not layers:
        refused = f", and {'; '.join(left)}" if left else ""
        raise ArgumentError(
            f"{function}: the model has no float layer{refused}.", "pass a float model."
        )
    for reason, names in left.items():
        logger.warning(
            "%s: %d layers stay in float (%s): %s",
            function,
            len(names),
            list_names(names, _SHOWN_NAMES),
            reason,
        )
    return layers
