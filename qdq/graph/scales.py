"""Scales of activations in a file that qdq exported, by the quantizers that `NameNodes` named them after."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.pairs import constant_of, is_op

_NAME = re.compile(
    r"(?P<quantizer>.+)\.scale(\.fp16|\.bf16)?"
)  # the copies are of `ConvertPrecision`
_PAIR = ("QuantizeLinear", "DequantizeLinear")


def list_scales(graph: ir.Graph) -> dict[str, list[ir.Value]]:
    """Quantizer of an activation -> the initializers that hold its scale: one, or one of each type.

    Those of weights, which a Q or DQ reads as constants, are not among them.
    """
    scales: defaultdict[str, list[ir.Value]] = defaultdict(list)
    quantizers = set()
    for value in graph.initializers.values():
        users = [user for user, position in value.uses() if position == 1 and is_op(user, *_PAIR)]
        if (match := _NAME.fullmatch(str(value.name))) and users and constant_of(value) is not None:
            scales[match["quantizer"]].append(value)
            if any(
                is_op(user, "QuantizeLinear") and not _is_constant(user.inputs[0]) for user in users
            ):
                quantizers.add(match["quantizer"])
    return {name: values for name, values in scales.items() if name in quantizers}


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer() or constant_of(value) is not None


def reason_against(values: list[ir.Value], scale: npt.NDArray[np.float32]) -> str:
    """Why initializers cannot have a scale, "" if they can."""
    for value in values:
        if not 0 < float(_as_stored(value, scale)) < np.inf:
            return (
                f"its scale {scale:.4g} does not fit {number_of(value).dtype}, the type in the file"
            )
    return ""


def set_scale(values: list[ir.Value], scale: npt.NDArray[np.float32]) -> bool:
    """Give initializers a scale, each in its own type; whether that changed a number.

    Args:
        values: From `list_scales`.
        scale: 0-D, as they are.
    """
    changed = False
    for value in values:
        new = _as_stored(value, scale)
        if not np.array_equal(new, number_of(value)):
            value.const_value = ir.tensor(new, name=value.name)
            changed = True
    return changed


def number_of(value: ir.Value) -> npt.NDArray[Any]:
    """The numbers of one of them."""
    number = constant_of(value)
    assert number is not None  # noqa: S101  # `list_scales` has looked
    return number


def _as_stored(value: ir.Value, scale: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    with np.errstate(over="ignore", under="ignore"):
        return scale.astype(number_of(value).dtype)
