"""What the passes ask of Q and DQ nodes, and of constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# Each output value is one of the input's values.
COPY_OPS = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_IGNORED = frozenset(
    {"axis", "saturate"}
)  # axis says nothing of one scale, saturate is for float8 only


@dataclass(frozen=True)
class Parameters:
    """Everything that decides the numbers of a Q or DQ; equal values mean the same function.

    Args:
        scale: Type, shape and bytes of the scale.
        zero_point: Likewise; empty where there is none.
        axis: None for a scalar scale.
        options: The other attributes.
    """

    scale: tuple[Any, ...]
    zero_point: tuple[Any, ...]
    axis: int | None
    options: tuple[tuple[str, Any], ...]

    @property
    def is_scalar(self) -> bool:
        """One scale for the whole tensor, written as TensorRT wants it (R-SHAPE)."""
        return self.axis is None


def is_op(node: ir.Node | None, *op_types: str) -> TypeGuard[ir.Node]:
    """Whether a node is one of these operators of ONNX itself."""
    return node is not None and node.op_type in op_types and node.domain in ("", "ai.onnx")


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of a constant, None if they cannot be read; a graph input's are only a default, so no constant."""
    if value is None or value.is_graph_input():
        return None
    if (node := value.producer()) is not None and (
        len(node.attributes) != 1
        or any(attribute.is_ref() for attribute in node.attributes.values())
    ):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    try:
        return None if tensor is None else tensor.numpy()
    except Exception:  # onnx-ir raises and asserts where data do not fit type and shape
        return None


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def has_reference(node: ir.Node) -> bool:
    """Whether an attribute refers to one of a function: its value is not known here."""
    return any(attribute.is_ref() for attribute in node.attributes.values())


def parameters_of(node: ir.Node) -> Parameters | None:
    """The parameters of a Q or DQ; None for other nodes, and where they are not constant."""
    if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return None
    scale, zero_point = constant_of(input_of(node, 1)), constant_of(input_of(node, 2))
    if scale is None or (zero_point is None and input_of(node, 2) is not None):
        return None
    if has_reference(node):
        return None
    return Parameters(
        _freeze(scale),
        () if zero_point is None else _freeze(zero_point),
        node.attributes.get_int("axis", 1) if scale.ndim else None,
        tuple(
            sorted((name, a.value) for name, a in node.attributes.items() if name not in _IGNORED)
        ),
    )


def code_type_of(node: ir.Node) -> ir.DataType | None:
    """The type of the integers that a Q writes or a DQ reads; None if the file does not say."""
    if input_of(node, 2) is not None:
        return _element_type(input_of(node, 2))
    if node.op_type == "DequantizeLinear":
        return _element_type(input_of(node, 0))
    written = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(written) if written else None


def _element_type(value: ir.Value | None) -> ir.DataType | None:
    """The type of a value, looking for it behind operators that only move values."""
    visited = set()
    while value is not None and value not in visited:
        visited.add(value)
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.dtype
        node = value.producer()
        if node is not None and is_op(node, "QuantizeLinear"):
            return code_type_of(node)  # reads the type of a zero point, which no Q makes
        if node is None or not is_op(node, *COPY_OPS, "Identity", "MaxPool"):
            return value.dtype
        value = input_of(node, 0)
    return None


def has_int8_zeros(node: ir.Node) -> bool:
    """Whether a Q or DQ has int8 codes and a zero point of zero (R-SYM): then 0.0 stays 0.0.

    Without a zero point it is zero, and the codes have the type that the node or its input says.
    """
    if input_of(node, 2) is None:
        return code_type_of(node) == ir.DataType.INT8
    zero_point = constant_of(input_of(node, 2))
    return zero_point is not None and zero_point.dtype == np.int8 and not zero_point.any()


def remove_if_unused(value: ir.Value | None) -> None:
    """Take an initializer away that nothing reads any more."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.is_initializer() and value.graph is not None:
        value.graph.initializers.pop(str(value.name), None)


def _freeze(array: npt.NDArray[Any]) -> tuple[Any, ...]:
    return str(array.dtype), array.shape, array.tobytes()
