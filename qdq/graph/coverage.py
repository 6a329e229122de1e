"""Which convolutions and matrix products of an ONNX graph have Q/DQ on their inputs, and what share of the work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from qdq.graph.pairs import (
    COPY_OPS,
    constant_of,
    has_int8_zeros,
    has_reference,
    input_of,
    is_op,
    parameters_of,
)
from qdq.graph.shapes import infer_shapes
from qdq.text import list_names

WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# A DQ in front of these still reaches the operator behind them: they move or pad values, they make no new ones.
# TensorRT-RTX 1.7 computes a convolution behind each of them in int8.
TRANSPARENT_OPS = COPY_OPS | {"Cast", "Identity", "MaxPool", "Pad"}


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
        for node in _weighted(model)
    ]


def _weighted(model: ir.Model) -> list[ir.Node]:
    """The weighted nodes of the main graph that have both of their operands."""
    return [
        node
        for node in model.graph
        if is_op(node, *WEIGHTED_OPS) and len(node.inputs) >= 2 and node.outputs
    ]


def module_of(node: ir.Node) -> str:
    """Dotted name of the torch module that a node came from (see `graph.names`)."""
    name = node.name or ""
    return name.rpartition("/")[0] if "/" in name else name


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, looking through operators that only move values."""
    visited = set()
    while value is not None and value not in visited:
        visited.add(value)  # a damaged graph may be a cycle
        node = value.producer()
        if node is None or is_op(node, "DequantizeLinear"):
            return node
        if not is_op(node, *TRANSPARENT_OPS):
            return None
        value = input_of(node, 0)
    return None


def count_qdq(model: ir.Model) -> tuple[int, int]:
    """Number of QuantizeLinear and of DequantizeLinear nodes."""
    ops = [node.op_type for node in model.graph]
    return ops.count("QuantizeLinear"), ops.count("DequantizeLinear")


@dataclass(frozen=True)
class LayerCoverage:
    """What to expect of one weighted node.

    Args:
        name: Name of the ONNX node.
        module: Dotted name of the torch module.
        op_type: The ONNX operator.
        int8: TensorRT is expected to run it in int8.
        reason: Why not; empty where it is.
        macs: Multiplications with addition for one sample; None where a shape is not known.
        share: Its part of all known MACs, 0..1; None where `macs` is.
    """

    name: str
    module: str
    op_type: str
    int8: bool
    reason: str
    macs: int | None
    share: float | None


@dataclass(frozen=True)
class Coverage:
    """Expected precision of every weighted node of a graph, in its order.

    Args:
        layers: The nodes.
    """

    layers: tuple[LayerCoverage, ...]

    @property
    def macs(self) -> int:
        """All known MACs."""
        return sum(layer.macs or 0 for layer in self.layers)

    @property
    def int8_share(self) -> float | None:
        """Part of the known MACs that is expected in int8, 0..1; None where there are none."""
        int8 = sum(layer.macs or 0 for layer in self.layers if layer.int8)
        return int8 / self.macs if self.macs else None

    def format_table(self) -> str:
        """What stays in float, most work first and alike ones in one line, then the summary."""
        groups: dict[tuple[str, str], list[LayerCoverage]] = {}
        for layer in self.layers:
            if not layer.int8:
                groups.setdefault((layer.op_type, layer.reason), []).append(layer)
        sizes = {key: sum(layer.share or 0 for layer in group) for key, group in groups.items()}
        lines = [
            f"  {_percent(sizes[key]):>7}  {len(groups[key])} {key[0]} ({_names(groups[key])}): {key[1]}"
            for key in sorted(groups, key=lambda key: -sizes[key])
        ]
        count = sum(layer.int8 for layer in self.layers)
        summary = f"int8 expected: {count} of {len(self.layers)} convolutions and matrix products"
        if self.int8_share is not None:
            summary += f", {_percent(self.int8_share)} of {self.macs / 1e6:.1f} million MACs"
        if unknown := sum(layer.macs is None for layer in self.layers):
            summary += f" ({unknown} of unknown size not counted)"
        return "\n".join([summary, *lines])


@dataclass(frozen=True)
class CoverageDifference:
    """Where an engine is not as its graph promises.

    Args:
        missing: Nodes expected in int8 that are not.
        extra: Nodes in int8 that nobody expected.
        unknown: Nodes that only one of the two names.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unknown: tuple[str, ...]


class BuiltLayer(Protocol):
    """What is asked of one entry of a census; `trt.census.LayerCensus` is one."""

    @property
    def node(self) -> str: ...
    @property
    def int8(self) -> bool: ...


def measure_coverage(
    model: ir.Model, *, may_infer: bool = True, data_prop: bool = True
) -> Coverage:
    """Predict for every weighted node whether it runs in int8, and how much of the work it is.

    Args:
        model: The graph; it stays as it is. The open first dimension of its inputs counts as 1.
        may_infer: Whether onnx may be asked for shapes; a damaged file can crash it.
        data_prop: Whether it may follow the values of shape computations for that.
    """
    nodes = _weighted(_with_shapes(model, data_prop) if may_infer else model)
    macs = [_count_macs(node) for node in nodes]
    total = sum(number or 0 for number in macs)
    layers = []
    for node, number in zip(nodes, macs, strict=True):
        reason = next(_obstacles(node), "")
        share = None if number is None else number / total if total else 0.0
        layers.append(
            LayerCoverage(
                node.name or "", module_of(node), node.op_type, not reason, reason, number, share
            )
        )
    return Coverage(tuple(layers))


def compare_coverage(coverage: Coverage, census: Sequence[BuiltLayer]) -> CoverageDifference:
    """Hold the prediction against the layers of the engine, by node name.

    Args:
        coverage: From `measure_coverage`.
        census: From the build of the same file (`BuildReport.layers`).
    """
    expected = {layer.name: layer.int8 for layer in coverage.layers}
    built = {layer.node: layer.int8 for layer in census}
    return CoverageDifference(
        missing=tuple(name for name, int8 in expected.items() if int8 and built.get(name) is False),
        extra=tuple(name for name, int8 in expected.items() if not int8 and built.get(name)),
        unknown=tuple(sorted(expected.keys() ^ built.keys())),
    )


def _obstacles(node: ir.Node) -> Iterator[str]:
    """Why a node is not expected in int8, the plainest reason first."""
    activation, weight = (dequantizer_of(value) for value in node.inputs[:2])
    if activation is None and weight is None:
        yield "no Q/DQ on its inputs"
        return
    if activation is None or weight is None:
        yield f"Q/DQ on its {'input' if weight is None else 'weight'} only (R-CONV-2)"
        return
    if node.op_type == "ConvTranspose":
        yield "TensorRT-RTX has no int8 kernel for it (R-CT-3)"
    for dequantize, which in ((activation, "input"), (weight, "weight")):
        scale = constant_of(input_of(dequantize, 1))
        if scale is None or parameters_of(dequantize) is None:
            yield f"the {which} scale or zero point is computed in the graph (R-DYN)"
        elif scale.shape == (1,):
            yield f"the {which} scale has shape [1], not a scalar's (R-SHAPE)"
        elif not has_int8_zeros(dequantize):
            yield f"the {which} zero point is not an int8 zero (R-SYM)"
        elif scale.ndim and which == "input":
            yield f"its input has {scale.size} scales (R-ACT-PC)"
        elif (
            scale.ndim
            and dequantize.outputs[0] is node.inputs[1]
            and not _scales_outputs(node, dequantize)
        ):
            yield "the weight scales are not along its output channels (R-AXIS)"


def _scales_outputs(node: ir.Node, dequantize: ir.Node) -> bool:
    """Whether the axis of the weight scales is the one of the output channels."""
    shape = dequantize.outputs[0].shape
    if shape is None:
        return True
    return dequantize.attributes.get_int("axis", 1) % len(shape) == output_axis(node, len(shape))


def output_axis(node: ir.Node, rank: int) -> int:
    """Where the output channels of the weight of a weighted node lie, if it has so many dimensions (R-AXIS)."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}[node.op_type]


def follow_axis(value: ir.Value | None, weight: ir.Node, axis: int) -> int | None:
    """Where an axis of a DQ's output lies in a value that comes from it; None if that cannot be said."""
    path = []
    while value is not None and (node := value.producer()) is not None and node is not weight:
        path.append(node)
        value = node.inputs[0]
    for node in reversed(path):
        if has_reference(node):
            return None
        if is_op(node, "Transpose") and (perm := node.attributes.get("perm")) is not None:
            axis = list(perm.as_ints()).index(axis)
        elif not is_op(node, "Identity", "Cast"):
            return None
    return axis


def _with_shapes(model: ir.Model, data_prop: bool) -> ir.Model:
    """A copy for one sample, with every shape that can be inferred."""
    try:
        copy = model.clone()
    except (
        Exception
    ):  # onnx-ir cannot copy what is damaged, a node that reads a value of nobody for one
        return model
    batches = {
        str(value.shape[0].value): 1
        for value in copy.graph.inputs
        if value.shape
        and isinstance(value.shape[0], ir.SymbolicDim)
        and value.shape[0].value is not None
    }
    values = [*copy.graph.inputs, *(output for node in copy.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_bind(size, batches) for size in value.shape])
    if any(_sizes(value) is None for value in values):
        infer_shapes(copy, data_prop=data_prop)
    return copy


def _bind(size: int | ir.SymbolicDim, batches: dict[str, int]) -> int | ir.SymbolicDim:
    """A dimension with the batch put in; names of others that are no expressions stay."""
    if isinstance(size, int) or size.value is None:
        return size
    try:
        return size.evaluate(batches)
    except ValueError:
        return size


def _count_macs(node: ir.Node) -> int | None:
    first, second, output = (_sizes(value) for value in (*node.inputs[:2], node.outputs[0]))
    if first is None or second is None or output is None:
        return None
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    return math.prod(output) * first[0 if transposed else -1]


def _sizes(value: ir.Value | None) -> list[int] | None:
    """A shape if all of it is known."""
    if value is None or value.shape is None:
        return None
    sizes = [size for size in value.shape if isinstance(size, int)]
    return sizes if len(sizes) == len(value.shape) else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _names(layers: Sequence[LayerCoverage]) -> str:
    return list_names([layer.module or layer.name for layer in layers], 2)
