"""Parameters selected by name patterns, and weights replaced by their quantized values."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qdq.compat.nn.modules._utils import quantized_weights
from qdq.errors import ArgumentError, ArgumentTypeError

logger = logging.getLogger(__name__)

Pattern = str | re.Pattern[str]


def match_parameters(model: nn.Module, patterns: Iterable[Pattern]) -> Iterator[nn.Parameter]:
    """The parameters whose name matches any of the patterns, each once, in the order of the model.

    Args:
        model: Any module.
        patterns: Regular expressions, found anywhere in the dotted name (`re.search`). One that matches nothing
            draws a warning.

    Raises:
        ArgumentTypeError: `model` is not a module, or `patterns` is not a list of patterns.
        ArgumentError: A pattern that is not a regular expression.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}, not a module.", "pass a torch.nn.Module."
        )
    compiled = _compile(patterns)
    parameters = dict(model.named_parameters())
    for pattern in compiled:
        if not any(pattern.search(name) for name in parameters):
            logger.warning("pattern %r matches no parameter", pattern.pattern)
    matches = []
    for name, parameter in parameters.items():
        if any(pattern.search(name) for pattern in compiled):
            matches.append(parameter)
    return iter(matches)


def _compile(patterns: Iterable[Pattern]) -> list[re.Pattern[str]]:
    fix = 'give a list of regular expressions, such as ["layer1", "bias$"].'
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ArgumentTypeError(
            f"patterns is {patterns!r}, of type {type(patterns).__name__}; expected a list.", fix
        )
    compiled = []
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise ArgumentTypeError(
                f"pattern {pattern!r} is a {type(pattern).__name__}, not a string.", fix
            )
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ArgumentError(
                f"pattern {pattern!r} is not a regular expression: {error}.",
                "escape its special characters with \\.",
            ) from error
    return compiled


def freeze_parameters(model: nn.Module, patterns: Iterable[Pattern]) -> None:
    """Set `requires_grad=False` on the parameters that `match_parameters` finds; with its errors and warnings."""
    for param in match_parameters(model, patterns):
        param.requires_grad = False


def group_parameters(
    model: nn.Module,
    patterns_list: list[list[Pattern]],
    lrs: Sequence[float] | None = None,
    momentums: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer.

    Args:
        model: Any module.
        patterns_list: A list of patterns for each group, as in `match_parameters`.
        lrs: For each group "lr"; None leaves the key out.
        momentums: For each group "momentum", likewise.
        weight_decays: For each group "weight_decay", likewise.

    Returns:
        One dict per group; "params" is a list.

    Raises:
        ArgumentTypeError: `patterns_list` is not a list of lists, or a list of values has a different length.
        ArgumentError: A pattern that is not a regular expression.
    """
    if (
        not isinstance(patterns_list, list)
        or not patterns_list
        or not all(isinstance(p, list) for p in patterns_list)
    ):
        raise ArgumentTypeError(
            f"patterns_list must be list of list of patterns, it is {patterns_list!r}.",
            'give one list for each group, such as [["backbone"], ["head"]].',
        )
    options = {
        "lr": ("lrs", lrs),
        "momentum": ("momentums", momentums),
        "weight_decay": ("weight_decays", weight_decays),
    }
    for argument, values in options.values():
        _require_length(argument, values, len(patterns_list))
    return [
        {"params": list(match_parameters(model, patterns))}
        | {key: values[group] for key, (_, values) in options.items() if values is not None}
        for group, patterns in enumerate(patterns_list)
    ]


def _require_length(argument: str, values: object, expected: int) -> None:
    if values is None:
        return
    if (
        isinstance(values, str)
        or not isinstance(values, Sequence | np.ndarray)
        or len(values) != expected
    ):
        raise ArgumentTypeError(
            f"len({argument}) must match len(patterns_list): {argument} is {values!r}, there are {expected} lists.",
            f"give a list with {expected} values, one for each list of patterns.",
        )


@torch.no_grad()
def quant_weight_inplace(model: nn.Module) -> None:
    """Replace the weight of every module that has a weight quantizer by the quantized weight.

    LSTM layers and cells are quantized as in their forward pass, both weights of a step together. A module whose
    weights are not found is not changed, and a warning names it.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}, not a module.", "pass a torch.nn.Module."
        )
    for name, module in model.named_modules():
        for quantizer, weights in quantized_weights(module):
            if weights:
                _quantize_inplace(weights, quantizer)
            else:
                logger.warning(
                    "%s (%s): weights not found, not changed",
                    name or "model",
                    type(module).__name__,
                )


def _quantize_inplace(
    weights: list[torch.Tensor], quantizer: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    if len(weights) == 1:
        weights[0].copy_(quantizer(weights[0]))
        return
    quantized = quantizer(torch.cat(weights, dim=1))
    for weight, values in zip(
        weights, quantized.split_with_sizes([w.shape[1] for w in weights], dim=1), strict=True
    ):
        weight.copy_(values)
