"""Move Q/DQ before the operators that only copy values (R-COPY, R-CONV-6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdq.graph.fold_pad import join_pads
from qdq.graph.pairs import (
    COPY_OPS,
    Parameters,
    code_type_of,
    constant_of,
    has_zeros,
    input_of,
    is_op,
    parameters_of,
    producer_of,
)

# ONNX Runtime (1.31) inserts a Q after a DQ before these and from opset 21 on refuses the graph for it:
# "output_dtype INT8 does not match y_zero_point type UINT8" (onnxruntime #25526).
_REFUSED_OPSET = 21
_REFUSED_OPS = frozenset({"Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
# They do not compute in float: a pair before them does not cost a separate kernel.
_READ_WITHOUT_FLOAT = COPY_OPS | {"Pad", "QuantizeLinear"}


class MoveQuantizeBeforeCopies(ir.passes.InPlacePass):
    """Copy -> Q -> DQ becomes Q -> DQ -> Copy, if that changes no bit.

    With one scale for the whole tensor and a zero point of zero, a pair is a function of each single value, so it can
    be swapped with an operator that copies values. The same is true for a Pad with the constant 0, which a pair does
    not change, if only convolutions read it: the Pad can then be folded into them.

    These stay as they are:

    - a copy with any other reader, which would then see quantized values;
    - a copy whose output is an output of the graph;
    - a copy other than Pad whose input is read in float elsewhere: the Q would become a separate kernel there;
    - copies of constants;
    - a Pad that stays a node, because TensorRT runs it in float after the DQ, and the product loses int8 (the windows
      of Swin);
    - copies before an FP8 pair, if pairs of another scale read the same tensor: queries, keys and values that one layer
      computes would each be quantized whole;
    - the Transpose of keys before an FP8 pair: a fused attention reads the DQ (R-MHA-3);
    - from opset 21 on, the copies with which ONNX Runtime could no longer load the graph.

    MaxPool commutes too, but TensorRT moves the Q itself, and with a pair before it a residual Add after it costs a
    second, float MaxPool (tools/bench_engine.py, layer1.0 of ResNet-18).
    """

    def __init__(self) -> None:
        super().__init__()
        self.removed_q = 0
        self.removed_dq = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go from the end to the start, so that a pair moves past a whole chain of copies."""
        self.removed_q = 0
        self.removed_dq = 0
        opset = model.graph.opset_imports.get("", 0)

        modified = False
        for node in reversed(list(model.graph)):
            if not _is_movable_copy(node, opset):
                continue

            pairs = _pairs_behind(node)
            if pairs:
                self._move(node, pairs)
                modified = True

        return ir.passes.PassResult(model, modified=modified)

    def _move(self, copy: ir.Node, pairs: list[_Pair]) -> None:
        """Keep the first of the equal pairs, before the copy, and remove the others.

        Args:
            copy: The copy, which then reads the pair.
            pairs: The pairs after the copy; their readers then read the copy.
        """
        graph = copy.graph
        source = copy.inputs[0]
        assert graph is not None and source is not None  # noqa: S101  # `_pairs_behind` has checked

        quantizes = [pair.quantize for pair in pairs]
        dequantizes: list[ir.Node] = []
        for pair in pairs:
            dequantizes += pair.dequantizes
            for dequantize in pair.dequantizes:
                dequantize.outputs[0].replace_all_uses_with(pair.copied)

        graph.remove(dequantizes[1:], safe=True)
        graph.remove(quantizes[1:], safe=True)
        self.removed_dq += len(dequantizes) - 1
        self.removed_q += len(quantizes) - 1

        quantize = quantizes[0]
        dequantize = dequantizes[0]
        graph.remove([quantize, dequantize])
        quantize.replace_input_with(0, source)
        dequantize.replace_input_with(0, quantize.outputs[0])
        copy.replace_input_with(0, dequantize.outputs[0])
        graph.insert_before(copy, [quantize, dequantize])

        quantize.outputs[0].shape = source.shape
        dequantize.outputs[0].shape = source.shape


@dataclass(frozen=True)
class _Pair:
    """A Q after a copy, with the DQ that read it.

    Args:
        copied: Output of the copy.
        quantize: The Q that reads it.
        dequantizes: All readers of the Q.
    """

    copied: ir.Value
    quantize: ir.Node
    dequantizes: list[ir.Node]


def _is_movable_copy(node: ir.Node, opset: int) -> bool:
    """Whether a pair may be before a node instead of after it.

    Args:
        node: Any node.
        opset: Opset of the graph.
    """
    if opset >= _REFUSED_OPSET and node.op_type in _REFUSED_OPS:
        return False
    if is_op(node, "Pad"):
        return _pads_with_positive_zero(node)
    return is_op(node, *COPY_OPS)


def _pads_with_positive_zero(pad: ir.Node) -> bool:
    """Whether a Pad adds the constant +0.0, which is the default.

    A pair with zero point 0 keeps +0.0 and turns -0.0 into +0.0, so only a Pad with +0.0 gives the same result on both
    sides.
    """
    if pad.attributes.get_string("mode", "constant") != "constant":
        return False
    if input_of(pad, 2) is None:
        return True

    constant = constant_of(input_of(pad, 2))
    if constant is None or constant.any():
        return False
    return not np.signbit(constant).any()


def _pairs_behind(copy: ir.Node) -> list[_Pair]:
    """The equal pairs after a copy, if nothing else reads the copy.

    Args:
        copy: The copy.

    Returns:
        Nothing if there is another kind of reader: it would see quantized values if the pair was moved.
    """
    if not _may_quantize_input(copy):
        return []

    pairs: list[_Pair] = []
    for output in copy.outputs:
        if output.is_graph_output():
            return []
        for user, position in output.uses():
            pair = _pair_at(output, user)
            if position != 0 or pair is None or not _is_movable_pair(pair, copy):
                return []
            pairs.append(pair)

    if not _have_same_parameters(pairs):
        return []
    if _is_fp8(pairs[0]) and _splits_attention(copy, pairs):
        return []
    return pairs


def _is_fp8(pair: _Pair) -> bool:
    return code_type_of(pair.quantize) == ir.DataType.FLOAT8E4M3FN


def _splits_attention(copy: ir.Node, pairs: list[_Pair]) -> bool:
    """Whether a copy makes one operand of an attention of a tensor with several, or transposes its keys.

    Args:
        copy: The copy.
        pairs: The equal pairs after it, at least one.
    """
    if is_op(copy, "Transpose") and any(map(_quantizes_second_factor, pairs)):
        return True
    quantizers = _quantizers_of(copy.inputs[0])
    return any(parameters_of(node) != parameters_of(pairs[0].quantize) for node in quantizers)


def _quantizes_second_factor(pair: _Pair) -> bool:
    """Whether a product of matrices reads a pair as its second factor, as it does the transposed keys."""
    for dequantize in pair.dequantizes:
        for user, position in dequantize.outputs[0].uses():
            if position == 1 and is_op(user, "MatMul"):
                return True
    return False


def _quantizers_of(value: ir.Value | None) -> Iterator[ir.Node]:
    """The Q that read a value, directly or through copies."""
    values = [value]
    while values:
        value = values.pop()
        for user, _ in () if value is None else value.uses():
            if is_op(user, "QuantizeLinear"):
                yield user
            elif is_op(user, *COPY_OPS):
                values += user.outputs


def _may_quantize_input(copy: ir.Node) -> bool:
    """Whether the input of a copy is an activation that nothing reads in float.

    With a reader in float the Q would be a separate kernel, which costs more than it saves. A Pad may quantize an input
    that other nodes read in float, because it is folded into the convolution after it.
    """
    source = copy.inputs[0]
    if source is None or source.is_initializer() or constant_of(source) is not None:
        return False
    if is_op(copy, "Pad"):
        return True
    if source.is_graph_output():
        return False

    return all(is_op(user, *_READ_WITHOUT_FLOAT) for user, _ in source.uses())


def _pair_at(copied: ir.Value, quantize: ir.Node) -> _Pair | None:
    """The pair whose Q reads a value.

    Args:
        copied: Output of a copy.
        quantize: A reader of it.

    Returns:
        None if the reader is not a Q, or if anything but DQ reads the Q.
    """
    dequantizes = [reader for reader, _ in quantize.outputs[0].uses()]
    if not dequantizes or not is_op(quantize, "QuantizeLinear"):
        return None
    if not all(is_op(reader, "DequantizeLinear") for reader in dequantizes):
        return None
    return _Pair(copied, quantize, dequantizes)


def _is_movable_pair(pair: _Pair, copy: ir.Node) -> bool:
    """Whether each node of a pair can be before a copy.

    A pair after a Pad moves only if the Pad can be folded into the convolutions after the pair. Otherwise the Pad would
    stay a float node between the DQ and its product.
    """
    nodes = [pair.quantize, *pair.dequantizes]
    if not all(_is_movable(node, copy) for node in nodes):
        return False
    if not is_op(copy, "Pad"):
        return True
    return all(_feeds_only_convolutions(node, copy) for node in pair.dequantizes)


def _is_movable(node: ir.Node, copy: ir.Node) -> bool:
    """Whether a Q or DQ computes each value separately, keeps 0.0, and can be before a copy.

    Args:
        node: The Q or DQ, after the copy.
        copy: The copy.
    """
    parameters = parameters_of(node)
    if parameters is None or not parameters.is_scalar:
        return False
    if not has_zeros(node):
        return False
    if node.graph is not copy.graph or node.outputs[0].is_graph_output():
        return False

    # The node that computes a parameter, a Constant, may be after the copy.
    return all(producer_of(value) is None for value in node.inputs[1:])


def _feeds_only_convolutions(dequantize: ir.Node, pad: ir.Node) -> bool:
    """Whether only convolutions read a DQ, as their input, and the Pad can be folded into each of them.

    Args:
        dequantize: The DQ, after the Pad.
        pad: The Pad.
    """
    for user, position in dequantize.outputs[0].uses():
        if position != 0 or not is_op(user, "Conv"):
            return False
        if join_pads(user, pad) is None:
            return False

    return True


def _have_same_parameters(pairs: list[_Pair]) -> bool:
    """Whether there are pairs, and one Q and one DQ can replace all of them.

    Args:
        pairs: All pairs after a copy.
    """
    parameters: set[Parameters | None] = set()
    for pair in pairs:
        parameters.add(parameters_of(pair.quantize))
        parameters.update(parameters_of(node) for node in pair.dequantizes)

    return len(parameters) == 1
