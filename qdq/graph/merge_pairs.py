"""One tensor, one Q: duplicate and back-to-back pairs merged (R-FAN, R-DBL)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdq.graph.pairs import Parameters, constant_of, is_op, parameters_of, remove_if_unused


class MergePairs(ir.passes.InPlacePass):
    """Equal Q of one tensor become one, equal DQ likewise, and Q -> DQ -> Q -> DQ becomes Q -> DQ.

    Equal means: scale, zero point, axis and type are the same to the bit. Unequal ones stay: they compute something
    else. So does a node whose output is an output of the graph, as its name must stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.removed_q = self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge in graph order: what a node reads has been merged before it."""
        self.removed_q = self.removed_dq = 0
        kept: dict[tuple[ir.Value | None, str, Parameters], ir.Node] = {}
        undone: list[ir.Node] = []
        for node in list(model.graph):
            parameters = parameters_of(node)
            if parameters is None:
                continue
            keeper = kept.setdefault((node.inputs[0], node.op_type, parameters), node)
            if node.outputs[0].is_graph_output():
                continue
            if (dequantize := _undone_by(node, parameters)) is not None:
                undone.append(dequantize)
                self._replace(node, dequantize.inputs[0])
            elif keeper is not node:
                self._replace(node, keeper.outputs[0])
        for dequantize in undone:
            output = dequantize.outputs[0]
            if dequantize.graph is not None and not (output.uses() or output.is_graph_output()):
                self._replace(dequantize, None)
        return ir.passes.PassResult(model, modified=bool(self.removed_q or self.removed_dq))

    def _replace(self, node: ir.Node, value: ir.Value | None) -> None:
        assert node.graph is not None  # noqa: S101  # it was found in one
        if value is not None:
            node.outputs[0].replace_all_uses_with(value)
        if node.op_type == "QuantizeLinear":
            self.removed_q += 1
        else:
            self.removed_dq += 1
        inputs = node.inputs
        node.graph.remove(node, safe=True)
        for parameter in inputs[1:]:
            remove_if_unused(parameter)


def _undone_by(quantize: ir.Node, parameters: Parameters) -> ir.Node | None:
    """The DQ in front of a Q that gives back the very codes which the DQ reads."""
    value = quantize.inputs[0]
    dequantize = None if value is None else value.producer()
    if (
        not is_op(quantize, "QuantizeLinear")
        or dequantize is None
        or not is_op(dequantize, "DequantizeLinear")
    ):
        return None
    if parameters_of(dequantize) != parameters or not _gives_codes_back(quantize):
        return None
    return dequantize


def _gives_codes_back(node: ir.Node) -> bool:
    """Whether rounding code * scale / scale finds every 8-bit code again.

    It does where the product keeps 11 bits or more, so in float16 and float32 while it neither overflows nor becomes
    subnormal; in bfloat16 it need not.
    """
    scale = constant_of(node.inputs[1])
    codes = node.outputs[0].dtype
    if codes is None:
        zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        codes = (
            ir.DataType.UINT8 if zero_point is None else ir.DataType.from_numpy(zero_point.dtype)
        )
    if codes not in (ir.DataType.INT8, ir.DataType.UINT8):
        return False
    if scale is None or scale.dtype not in (np.float16, np.float32):
        return False
    limits = np.finfo(scale.dtype)
    return bool(
        np.all((scale >= limits.tiny) & (scale.astype(np.float64) * 256 <= float(limits.max)))
    )
