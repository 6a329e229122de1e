"""Which convolutions and matrix products of an ONNX graph have Q/DQ on their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# A DQ in front of these still reaches the operator behind them: they move or pad values, they make no new ones.
_TRANSPARENT_OPS = frozenset({"Cast", "Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class WeightedNode:
    """A Conv, ConvTranspose, Gemm or MatMul of the graph.

    Args:
        name: Name of the ONNX node, `MODULE/OP` in files that qdq wrote.
        module: Dotted name of the torch module it came from; the node's name in files of others.
        op_type: The ONNX operator.
        input_quantized: The first operand comes from a DequantizeLinear.
        weight_quantized: The second operand does.
    """

    name: str
    module: str
    op_type: str
    input_quantized: bool
    weight_quantized: bool

    @property
    def expects_int8(self) -> bool:
        """Whether TensorRT can run it in int8: both operands or none (R-CONV-2)."""
        return self.input_quantized and self.weight_quantized


def list_weighted_nodes(model: ir.Model) -> list[WeightedNode]:
    """All weighted nodes of the main graph, in graph order."""
    return [
        WeightedNode(
            name=node.name or "",
            module=module_of(node),
            op_type=node.op_type,
            input_quantized=dequantizer_of(node.inputs[0]) is not None,
            weight_quantized=dequantizer_of(node.inputs[1]) is not None,
        )
        for node in model.graph
        if node.op_type in WEIGHTED_OPS and node.domain == ""
    ]


def module_of(node: ir.Node) -> str:
    """Dotted name of the torch module that a node came from (see `graph.names`)."""
    name = node.name or ""
    return name.rpartition("/")[0] if "/" in name else name


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, looking through operators that only move values."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return node
        if node.op_type not in _TRANSPARENT_OPS:
            return None
        value = node.inputs[0]
    return None


def count_qdq(model: ir.Model) -> tuple[int, int]:
    """Number of QuantizeLinear and of DequantizeLinear nodes."""
    ops = [node.op_type for node in model.graph]
    return ops.count("QuantizeLinear"), ops.count("DequantizeLinear")
