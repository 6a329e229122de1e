"""Scales of activations in a file that qdq exported, found by the quantizer names that `NameNodes` wrote."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.pairs import QDQ_OPS, constant_of, is_op

# `ConvertPrecision` names the 16 bit copy of a scale with a suffix.
_NAME = re.compile(r"(?P<quantizer>.+)\.scale(\.fp16|\.bf16)?")


def list_scales(graph: ir.Graph) -> dict[str, list[ir.Value]]:
    """The scales of the activations of a graph.

    Scales of weights, which a Q or DQ reads as constants, are left out, and so are constants whose name does not say
    which quantizer they belong to.

    Args:
        graph: The main graph of a file that qdq exported.

    Returns:
        Quantizer -> the initializers with its scale: one, or one of each type.
    """
    scales: defaultdict[str, list[ir.Value]] = defaultdict(list)
    activation_quantizers = set()
    for value in graph.initializers.values():
        match = _NAME.fullmatch(str(value.name))
        users = _nodes_scaled_by(value)
        if match is None or not users or constant_of(value) is None:
            continue

        quantizer = match["quantizer"]
        scales[quantizer].append(value)
        if any(_quantizes_activation(user) for user in users):
            activation_quantizers.add(quantizer)

    return {name: values for name, values in scales.items() if name in activation_quantizers}


def _nodes_scaled_by(value: ir.Value) -> list[ir.Node]:
    """The Q and DQ that read a value as their scale, which is their second input."""
    nodes = []
    for user, position in value.uses():
        if position == 1 and is_op(user, *QDQ_OPS):
            nodes.append(user)

    return nodes


def _quantizes_activation(node: ir.Node) -> bool:
    """Whether a node is a Q that reads a computed value, not a weight."""
    return is_op(node, "QuantizeLinear") and not _is_constant(node.inputs[0])


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, a Constant, or left out.

    An initializer with the same name as an input of the graph counts as well.
    """
    if value is None or value.is_initializer():
        return True
    return constant_of(value) is not None


def reason_against(values: list[ir.Value], scale: npt.NDArray[np.float32]) -> str:
    """Why a scale does not fit the type of an initializer; "" if it fits all.

    Args:
        values: From `list_scales`.
        scale: 0-D.
    """
    for value in values:
        stored_scale = float(_as_stored(value, scale))
        if not 0 < stored_scale < np.inf:
            dtype = number_of(value).dtype
            return f"its scale {scale:.4g} does not fit {dtype}, the type in the file"

    return ""


def set_scale(values: list[ir.Value], scale: npt.NDArray[np.float32]) -> bool:
    """Give initializers a scale, each in its own type.

    Args:
        values: From `list_scales`.
        scale: 0-D, like the initializers.

    Returns:
        Whether that changed a number.
    """
    changed = False
    for value in values:
        stored_scale = _as_stored(value, scale)
        if not np.array_equal(stored_scale, number_of(value)):
            value.const_value = ir.tensor(stored_scale, name=value.name)
            changed = True

    return changed


def number_of(value: ir.Value) -> npt.NDArray[Any]:
    """The scale in an initializer of `list_scales`."""
    number = constant_of(value)
    assert number is not None  # noqa: S101  # `list_scales` has read it
    return number


def _as_stored(value: ir.Value, scale: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """A scale in the type of an initializer."""
    with np.errstate(over="ignore", under="ignore"):
        return scale.astype(number_of(value).dtype)
