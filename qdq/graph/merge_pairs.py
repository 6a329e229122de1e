"""Merge duplicate and back-to-back pairs, so that a tensor has one Q (R-FAN, R-DBL)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import is_needed, remove_if_unused
from qdq.graph.pairs import Parameters, constant_of, input_of, is_op, parameters_of, producer_of

# Type of codes with 8 bits or fewer significant ones -> a number that no code exceeds.
_LARGEST_CODES = {
    ir.DataType.INT8: 256,
    ir.DataType.UINT8: 256,
    ir.DataType.FLOAT8E4M3FN: 448,
}
# Types in which the product of a code and a scale keeps 11 bits or more.
_PRECISE_TYPES = (np.float16, np.float32)


class MergePairs(ir.passes.InPlacePass):
    """Equal Q of one tensor become one, equal DQ likewise, and Q -> DQ -> Q -> DQ becomes Q -> DQ.

    Equal means that scale, zero point, axis and type are the same to the bit. Unequal ones stay, because they compute
    something else. A node whose output is an output of the graph stays, because the name must not change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.removed_q = 0
        self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge in graph order: the inputs of a node are merged when it is visited."""
        self.removed_q = 0
        self.removed_dq = 0
        first_nodes: dict[tuple[ir.Value | None, str, Parameters], ir.Node] = {}
        undone_nodes: list[ir.Node] = []
        for node in list(model.graph):
            parameters = parameters_of(node)
            if parameters is None:
                continue

            key = (node.inputs[0], node.op_type, parameters)
            first_node = first_nodes.setdefault(key, node)
            if node.outputs[0].is_graph_output():
                continue

            undone = _undone_by(node, parameters)
            if undone is not None:
                undone_nodes.append(undone)
                self._replace(node, undone.inputs[0])
            elif first_node is not node:
                self._replace(node, first_node.outputs[0])

        self._remove_unread(undone_nodes)
        return ir.passes.PassResult(model, modified=bool(self.removed_q or self.removed_dq))

    def _remove_unread(self, dequantizes: list[ir.Node]) -> None:
        """Remove the DQ that nothing reads any more.

        This is known once all of their readers have been visited.

        Args:
            dequantizes: The DQ. One that several Q have undone is listed several times.
        """
        for dequantize in dequantizes:
            is_removed = dequantize.graph is None
            if not is_removed and not is_needed(dequantize.outputs[0]):
                self._remove(dequantize)

    def _replace(self, node: ir.Node, value: ir.Value | None) -> None:
        """Let the readers of a Q or DQ read a value instead, and remove the node.

        Args:
            node: The Q or DQ.
            value: The value, which is the same to the bit.
        """
        if value is not None:
            node.outputs[0].replace_all_uses_with(value)
        self._remove(node)

    def _remove(self, node: ir.Node) -> None:
        """Remove a Q or DQ and its parameters, and count it."""
        assert node.graph is not None  # noqa: S101  # the pass reads it from a graph
        if node.op_type == "QuantizeLinear":
            self.removed_q += 1
        else:
            self.removed_dq += 1

        parameters = node.inputs[1:]
        node.graph.remove(node, safe=True)
        for parameter in parameters:
            remove_if_unused(parameter)


def _undone_by(quantize: ir.Node, parameters: Parameters) -> ir.Node | None:
    """The DQ before a Q, if the Q gives back exactly the codes that the DQ reads.

    Args:
        quantize: The Q.
        parameters: Its parameters.

    Returns:
        None if there is no such DQ.
    """
    dequantize = producer_of(quantize.inputs[0])
    if not is_op(quantize, "QuantizeLinear") or not is_op(dequantize, "DequantizeLinear"):
        return None
    if parameters_of(dequantize) != parameters:
        return None
    if not _gives_codes_back(quantize):
        return None
    return dequantize


def _gives_codes_back(quantize: ir.Node) -> bool:
    """Whether rounding code * scale / scale gives every 8-bit code again.

    It does if the product keeps 11 bits or more: in float16 and float32 while it does not overflow and the scale is not
    subnormal. In bfloat16 it need not. The smallest codes of FP8 are fractions: their products may be subnormal, but
    then the error is below a quarter of the step between two codes.

    Args:
        quantize: A Q, after a DQ with the same parameters.
    """
    code_type = _code_type_of(quantize)
    if code_type not in _LARGEST_CODES:
        return False

    scale = constant_of(quantize.inputs[1])
    if scale is None or scale.dtype not in _PRECISE_TYPES:
        return False

    return _keeps_products_normal(scale, _LARGEST_CODES[code_type])


def _code_type_of(quantize: ir.Node) -> ir.DataType:
    """The type that a Q writes: that of its output, else that of its zero point, else uint8, as ONNX defines it."""
    written_type = quantize.outputs[0].dtype
    if written_type is not None:
        return written_type

    zero_point = constant_of(input_of(quantize, 2))
    if zero_point is None:
        return ir.DataType.UINT8
    return ir.DataType.from_numpy(zero_point.dtype)


def _keeps_products_normal(scale: npt.NDArray[Any], largest_code: int) -> bool:
    """Whether the product of each code from 1 on and a scale is a normal number of the type of the scale."""
    limits = np.finfo(scale.dtype)
    is_normal = scale >= limits.tiny
    is_finite = scale.astype(np.float64) * largest_code <= float(limits.max)
    return bool(np.all(is_normal & is_finite))
