"""Queries that all passes share: operators, inputs, constants, and the parameters of Q and DQ nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ONNX_DOMAINS = ("", "ai.onnx")
"""The names of the domain of ONNX's own operators."""

QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")

TRT_DOMAIN = "trt"
"""The domain in which ModelOpt writes operators that TensorRT has and ONNX has not."""

TRT_QUANTIZERS = {
    "TRT_FP8QuantizeLinear": (ir.DataType.FLOAT8E4M3FN,),
    "TRT_MXFP8DynamicQuantize": (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E8M0),
    "TRT_FP4DynamicQuantize": (ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN),
}
"""TensorRT's own Q -> the types of its outputs: codes, and for dynamic ones the scale of each block."""

# Each output value of these operators is one of the values of their first input.
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

# Operators that keep the element type of their first input.
_TYPE_KEEPING_OPS = COPY_OPS | {"Identity", "MaxPool"}
# `axis` is compared separately, and only for per-channel scales. `saturate` has an effect on float8 only.
_IGNORED_ATTRIBUTES = frozenset({"axis", "saturate"})


@dataclass(frozen=True)
class Parameters:
    """Everything that determines the numbers of a Q or DQ; equal parameters mean the same function.

    Args:
        scale: Type, shape and bytes of the scale.
        zero_point: Type, shape and bytes of the zero point; empty if there is none.
        axis: Axis of a per-channel scale; None for a scalar scale.
        options: The other attributes, sorted by name.
    """

    scale: tuple[Any, ...]
    zero_point: tuple[Any, ...]
    axis: int | None
    options: tuple[tuple[str, Any], ...]

    @property
    def is_scalar(self) -> bool:
        """Whether the whole tensor has one 0-D scale, as TensorRT expects (R-SHAPE)."""
        return self.axis is None


def is_op(node: ir.Node | None, *op_types: str) -> TypeGuard[ir.Node]:
    """Whether a node exists and is one of these operators of ONNX itself.

    Args:
        node: A node or None.
        op_types: Names of operators. Custom operators of the same name do not count.
    """
    if node is None or node.op_type not in op_types:
        return False
    return node.domain in ONNX_DOMAINS


def is_trt_op(node: ir.Node | None, *op_types: str) -> TypeGuard[ir.Node]:
    """Whether a node exists and is one of these operators of TensorRT, as ModelOpt writes them."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == TRT_DOMAIN


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value.

    Returns:
        None for inputs of the graph, for initializers, and for an input of a node that is left out.
    """
    if value is None:
        return None
    return value.producer()


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """An input of a node; None if it is left out."""
    if position >= len(node.inputs):
        return None
    return node.inputs[position]


def has_reference(node: ir.Node) -> bool:
    """Whether an attribute refers to an attribute of a function: its value is not known here."""
    return any(attribute.is_ref() for attribute in node.attributes.values())


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of a constant.

    Returns:
        None if the value is computed, or if its data cannot be read. None for a graph input too: an initializer with
        the same name is only its default.
    """
    if value is None or value.is_graph_input():
        return None

    node = value.producer()
    if node is not None and not _has_single_plain_attribute(node):
        return None

    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None

    try:
        return tensor.numpy()
    except Exception:  # onnx-ir raises and asserts if data do not fit type and shape
        return None


def _has_single_plain_attribute(node: ir.Node) -> bool:
    """Whether a node has the one attribute of a well-formed Constant, with its value written out."""
    return len(node.attributes) == 1 and not has_reference(node)


def parameters_of(node: ir.Node) -> Parameters | None:
    """The parameters of a Q or DQ.

    Args:
        node: Any node.

    Returns:
        None for other operators, and if a parameter is computed in the graph or taken from the caller of a function.
    """
    if not is_op(node, *QDQ_OPS) or has_reference(node):
        return None

    scale = constant_of(input_of(node, 1))
    zero_point = constant_of(input_of(node, 2))
    if scale is None:
        return None
    if zero_point is None and input_of(node, 2) is not None:
        return None

    return Parameters(
        scale=_freeze(scale),
        zero_point=() if zero_point is None else _freeze(zero_point),
        axis=node.attributes.get_int("axis", 1) if scale.ndim else None,
        options=_options_of(node),
    )


def _freeze(array: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Type, shape and bytes of an array, which can be compared and hashed."""
    return str(array.dtype), array.shape, array.tobytes()


def _options_of(node: ir.Node) -> tuple[tuple[str, Any], ...]:
    """The attributes of a Q or DQ that `Parameters` has no field for, sorted by name."""
    options = []
    for name, attribute in node.attributes.items():
        if name not in _IGNORED_ATTRIBUTES:
            options.append((name, attribute.value))

    return tuple(sorted(options))


def code_type_of(node: ir.Node) -> ir.DataType | None:
    """The type of the integers that a Q writes or a DQ reads.

    Args:
        node: A Q or DQ.

    Returns:
        The type of the zero point. If that is left out, the type from the attribute of a Q or the input of a DQ. None
        if the file has neither.
    """
    zero_point = input_of(node, 2)
    if zero_point is not None:
        return _element_type(zero_point)

    if node.op_type == "DequantizeLinear":
        return _element_type(input_of(node, 0))

    output_type = node.attributes.get_int("output_dtype", 0)
    if not output_type:
        return None
    return ir.DataType(output_type)


def _element_type(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a value, looked up through operators that keep it.

    A file may omit the types of inner values, but constants always have one.

    Args:
        value: The codes or the zero point of a Q or DQ.
    """
    visited = set()  # a damaged graph may be a cycle
    while value is not None and value not in visited:
        visited.add(value)

        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.dtype

        node = value.producer()
        if is_trt_op(node, *TRT_QUANTIZERS):
            return TRT_QUANTIZERS[node.op_type][value.index() or 0]
        if is_op(node, "QuantizeLinear"):
            # This reads the type of a zero point, which no Q computes, so the recursion ends.
            return code_type_of(node)
        if not is_op(node, *_TYPE_KEEPING_OPS):
            return value.dtype

        value = input_of(node, 0)

    return None


def has_zeros(node: ir.Node) -> bool:
    """Whether the zero point of a Q or DQ is a known zero, or left out: then 0.0 stays 0.0."""
    if input_of(node, 2) is None:
        return True

    zero_point = constant_of(input_of(node, 2))
    if zero_point is None or zero_point.dtype.kind == "O":  # texts, in a damaged file
        return False
    return not zero_point.astype(np.float32).any()


def has_int8_zeros(node: ir.Node) -> bool:
    """Whether a Q or DQ has int8 codes and a zero point of zero (R-SYM): then 0.0 stays 0.0.

    A missing zero point is zero, and the codes then have the type of the node or its input.
    """
    if input_of(node, 2) is None:
        return code_type_of(node) == ir.DataType.INT8

    zero_point = constant_of(input_of(node, 2))
    return is_int8_zero(zero_point)


def is_int8_zero(zero_point: npt.NDArray[Any] | None) -> bool:
    """Whether a zero point is a known constant of int8 zeros (R-SYM).

    Args:
        zero_point: From `constant_of`.
    """
    if zero_point is None or zero_point.dtype != np.int8:
        return False
    return not zero_point.any()
