"""Q/DQ in front of the operators that only copy values (R-COPY, R-CONV-6)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdq.graph.fold_pad import join_pads
from qdq.graph.pairs import (
    COPY_OPS,
    Parameters,
    constant_of,
    has_int8_zeros,
    input_of,
    is_op,
    parameters_of,
)

# ONNX Runtime (1.31) sets a Q of its own behind a DQ in front of these and from opset 21 on refuses the graph for it:
# "output_dtype INT8 does not match y_zero_point type UINT8" (onnxruntime #25526).
_REFUSED_FROM_21 = frozenset({"Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})

_Pair = tuple[ir.Value, ir.Node, list[ir.Node]]  # output of the copy, its Q, the DQ behind that


class MoveQuantizeBeforeCopies(ir.passes.InPlacePass):
    """Copy -> Q -> DQ becomes Q -> DQ -> Copy, where that changes no bit.

    One scale for the whole tensor and a zero point of zero make a pair a function of each value alone. So it can be
    swapped with an operator that copies values. Likewise with Pad, whose constant must be 0, which a pair keeps, where
    only convolutions read it: they can take it in then.

    Left alone: a copy with any other reader, which would see quantized values then; outputs of the graph; a copy whose
    input is read in float elsewhere, as the Q would become a kernel of its own there (but for Pad); copies of
    constants; a Pad that stays a node, for TensorRT runs it in float behind the DQ, and the product loses int8 (the
    windows of Swin); from opset 21 on what ONNX Runtime could not load any more. MaxPool commutes
    too, but TensorRT moves the Q itself, and with a pair in front of it a residual Add behind it costs a second, float
    MaxPool (tools/bench_engine.py, layer1.0 of ResNet-18).
    """

    def __init__(self) -> None:
        super().__init__()
        self.removed_q = self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go from the end to the front, so that a pair passes a whole chain of copies."""
        self.removed_q = self.removed_dq = 0
        modified = False
        left = _REFUSED_FROM_21 if model.graph.opset_imports.get("", 0) >= 21 else frozenset()
        for copy in reversed(list(model.graph)):
            if copy.op_type not in left and _copies_values(copy) and (pairs := _pairs_behind(copy)):
                self._move(copy, pairs)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def _move(self, copy: ir.Node, pairs: list[_Pair]) -> None:
        graph, source = copy.graph, copy.inputs[0]
        assert graph is not None and source is not None  # noqa: S101  # _pairs_behind has looked
        quantizes = [quantize for _, quantize, _ in pairs]
        dequantizes = [node for _, _, nodes in pairs for node in nodes]
        for output, _, nodes in pairs:
            for node in nodes:
                node.outputs[0].replace_all_uses_with(output)
        quantize, dequantize = quantizes[0], dequantizes[0]
        graph.remove(dequantizes[1:], safe=True)
        graph.remove(quantizes[1:], safe=True)
        self.removed_dq += len(dequantizes) - 1
        self.removed_q += len(quantizes) - 1
        graph.remove([quantize, dequantize])
        quantize.replace_input_with(0, source)
        dequantize.replace_input_with(0, quantize.outputs[0])
        copy.replace_input_with(0, dequantize.outputs[0])
        graph.insert_before(copy, [quantize, dequantize])
        quantize.outputs[0].shape = dequantize.outputs[0].shape = source.shape


def _copies_values(node: ir.Node) -> bool:
    if is_op(node, "Pad"):
        return node.attributes.get_string("mode", "constant") == "constant" and _pads_with_zero(
            node
        )
    return is_op(node, *COPY_OPS)


def _pads_with_zero(pad: ir.Node) -> bool:
    """Whether the constant is +0.0; a pair turns -0.0 into +0.0."""
    value = input_of(pad, 2)
    if value is None:
        return True
    constant = constant_of(value)
    return constant is not None and not constant.any() and not np.signbit(constant).any()


def _pairs_behind(copy: ir.Node) -> list[_Pair]:
    """The equal pairs that read everything the copy gives; nothing where one reader is of another kind."""
    source = copy.inputs[0]
    if (
        source is None
        or constant_of(source) is not None
        or source.is_initializer()
        or not _may_quantize(source, copy)
    ):
        return []
    pairs: list[_Pair] = []
    parameters: set[Parameters | None] = set()
    for output in copy.outputs:
        if output.is_graph_output():
            return []
        for user, position in output.uses():
            dequantizes = [node for node, _ in user.outputs[0].uses()]
            nodes = [user, *dequantizes]
            if position or not dequantizes or not is_op(user, "QuantizeLinear"):
                return []
            if not all(is_op(node, "DequantizeLinear") for node in dequantizes):
                return []
            if not all(_is_movable(node, copy) for node in nodes):
                return []
            if is_op(copy, "Pad") and not all(
                _feeds_convolutions(node, copy) for node in dequantizes
            ):
                return []
            parameters.update(map(parameters_of, nodes))
            pairs.append((output, user, dequantizes))
    return pairs if len(parameters) == 1 else []


def _feeds_convolutions(dequantize: ir.Node, pad: ir.Node) -> bool:
    """Whether only convolutions read it, and each can take in the Pad."""
    readers = dequantize.outputs[0].uses()
    return all(
        is_op(user, "Conv") and position == 0 and join_pads(user, pad) is not None
        for user, position in readers
    )


def _may_quantize(source: ir.Value, copy: ir.Node) -> bool:
    """Whether nobody reads the input of the copy in float."""
    if is_op(copy, "Pad"):
        return True
    if source.is_graph_output():
        return False
    return all(is_op(user, "Pad", "QuantizeLinear", *COPY_OPS) for user, _ in source.uses())


def _is_movable(node: ir.Node, copy: ir.Node) -> bool:
    """Whether a Q or DQ computes each value alone, keeps 0.0, and can stand in front of the copy."""
    parameters = parameters_of(node)
    return (
        parameters is not None
        and parameters.is_scalar
        and has_int8_zeros(node)
        and node.graph is copy.graph
        and not node.outputs[0].is_graph_output()
        # a Constant node may stand behind the copy
        and all(value is None or value.producer() is None for value in node.inputs[1:])
    )
