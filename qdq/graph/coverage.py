"""Coverage: which nodes of an ONNX graph that multiply run in int8, and their fraction of the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import onnx_ir as ir

from qdq.graph.pairs import (
    COPY_OPS,
    constant_of,
    has_int8_zeros,
    has_reference,
    input_of,
    is_op,
    parameters_of,
    producer_of,
)
from qdq.graph.shapes import infer_shapes
from qdq.graph.work import PRODUCT_OPS, count_macs, explain_work, find_output_label, has_work
from qdq.text import list_names

# A DQ before these still reaches the operator after them: they move or pad values, they compute no new ones.
# TensorRT-RTX 1.7 computes a convolution after each of them in int8.
TRANSPARENT_OPS = COPY_OPS | {"Cast", "Identity", "MaxPool", "Pad"}

_Number = TypeVar("_Number", int, float)

_NO_PAIR = "no Q/DQ on its inputs"
_INPUT_ONLY = "Q/DQ on its input only (R-CONV-2)"
_WEIGHT_ONLY = "Q/DQ on its weight only (R-CONV-2)"
_NO_KERNEL = "TensorRT-RTX has no int8 kernel for it (R-CT-3)"
_WRONG_AXIS = "the weight scales are not along its output channels (R-AXIS)"


@dataclass(frozen=True)
class WorkNode:
    """A node of the graph that multiplies (see `graph.work`).

    Args:
        name: Name of the ONNX node, `MODULE/OP` in files that qdq wrote.
        module: Dotted name of the torch module it came from; the name of the node in files of other tools.
        op_type: The ONNX operator.
        input_quantized: The first operand of one of `PRODUCT_OPS` comes from a DequantizeLinear.
        weight_quantized: The second operand comes from a DequantizeLinear.
        reason: Why no Q/DQ would bring its operator into int8; "" for `PRODUCT_OPS`.
    """

    name: str
    module: str
    op_type: str
    input_quantized: bool
    weight_quantized: bool
    reason: str = ""

    @property
    def expects_int8(self) -> bool:
        """Whether TensorRT can run it in int8: both operands must be quantized (R-CONV-2)."""
        return self.input_quantized and self.weight_quantized


@dataclass(frozen=True)
class LayerCoverage:
    """Expected precision and work of one node that multiplies.

    Args:
        name: Name of the ONNX node.
        module: Dotted name of the torch module.
        op_type: The ONNX operator.
        int8: TensorRT is expected to run it in int8.
        reason: Why it is not expected in int8; empty if it is.
        macs: Multiply-accumulate operations (MACs) for one sample; None if they are not known: an open shape, a body
            that runs an unknown number of times, an operator that ONNX does not have.
        share: Its fraction of all known MACs, 0 to 1; None if `macs` is None.
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
    """Expected precision of every node of a graph that multiplies, in graph order.

    Args:
        layers: One entry for each of them.
    """

    layers: tuple[LayerCoverage, ...]

    @property
    def macs(self) -> int:
        """Sum of all known MACs."""
        return _sum_known([layer.macs for layer in self.layers])

    @property
    def num_unknown(self) -> int:
        """Number of nodes whose MACs are not known."""
        return sum(layer.macs is None for layer in self.layers)

    @property
    def int8_share(self) -> float | None:
        """Fraction of the known MACs that is expected in int8, 0 to 1.

        None if no MACs are known.
        """
        total = self.macs
        if not total:
            return None

        int8_macs = _sum_known([layer.macs for layer in self.layers if layer.int8])
        return int8_macs / total

    def format_table(self) -> str:
        """A summary, then one line for each reason to stay in float, most work first."""
        groups = _group_float_layers(self.layers)
        groups.sort(key=_FloatGroup.sort_key)

        lines = [self._format_summary()]
        lines += [group.format_line() for group in groups]
        return "\n".join(lines)

    def _format_summary(self) -> str:
        """The number of int8 layers and their fraction of the MACs."""
        int8_layers = sum(layer.int8 for layer in self.layers)
        summary = f"int8 expected: {int8_layers} of {len(self.layers)} nodes that multiply"

        int8_fraction = self.int8_share
        if int8_fraction is not None:
            summary += f", {_percent(int8_fraction)} of all {self.macs / 1e6:.1f} million MACs"

        if self.num_unknown:
            summary += f" ({self.num_unknown} of unknown work not counted)"
        return summary


@dataclass(frozen=True)
class _FloatGroup:
    """Layers of one operator that stay in float for the same reason."""

    op_type: str
    reason: str
    layers: list[LayerCoverage]

    @property
    def macs_fraction(self) -> float:
        """Their fraction of all known MACs, 0 to 1."""
        return _sum_known([layer.share for layer in self.layers])

    def sort_key(self) -> float:
        """Sort key: the group with the most work comes first."""
        return -self.macs_fraction

    def format_line(self) -> str:
        """One line of the table: work, number, names, reason."""
        names = list_names([layer.module or layer.name for layer in self.layers], 2)
        is_unknown = all(layer.macs is None for layer in self.layers)
        fraction = "unknown" if is_unknown else _percent(self.macs_fraction)
        return f"  {fraction:>7}  {len(self.layers)} {self.op_type} ({names}): {self.reason}"


def _group_float_layers(layers: Sequence[LayerCoverage]) -> list[_FloatGroup]:
    """The layers that stay in float, grouped by operator and reason."""
    groups: dict[tuple[str, str], _FloatGroup] = {}
    for layer in layers:
        if layer.int8:
            continue

        empty_group = _FloatGroup(layer.op_type, layer.reason, [])
        group = groups.setdefault((layer.op_type, layer.reason), empty_group)
        group.layers.append(layer)

    return list(groups.values())


def _sum_known(numbers: Sequence[_Number | None]) -> _Number | int:
    """The sum of the known numbers of layers; 0 if there are none."""
    return sum(number for number in numbers if number is not None)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


@dataclass(frozen=True)
class CoverageDifference:
    """Differences between an engine and the prediction for its graph.

    Args:
        missing: Nodes that are expected in int8 and run in float.
        extra: Nodes that are expected in float and run in int8.
        unknown: Nodes that only one of the two lists.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unknown: tuple[str, ...]


class BuiltLayer(Protocol):
    """One layer of a built engine; `trt.census.LayerCensus` is one."""

    @property
    def node(self) -> str:
        """Name of the ONNX node."""
        ...

    @property
    def int8(self) -> bool:
        """Whether the engine runs it in int8."""
        ...


def measure_coverage(
    model: ir.Model, *, may_infer: bool = True, data_prop: bool = True
) -> Coverage:
    """Predict for every node that multiplies whether it runs in int8, and compute its fraction of the work.

    Args:
        model: The graph, which is not changed. The dynamic first dimension of its inputs counts as 1.
        may_infer: Whether onnx may infer shapes; a damaged file can crash it.
        data_prop: Whether shape inference may follow the values of shape computations.
    """
    if may_infer:
        model = copy_for_one_sample(model, data_prop)

    nodes = _select_nodes(model)
    macs_of_nodes = [count_macs(node) for node in nodes]
    total = _sum_known(macs_of_nodes)

    layers = []
    for node, macs in zip(nodes, macs_of_nodes, strict=True):
        reason = reason_for_float(node)
        layer = LayerCoverage(
            name=node.name or "",
            module=module_of(node),
            op_type=node.op_type,
            int8=not reason,
            reason=reason,
            macs=macs,
            share=_fraction_of(macs, total),
        )
        layers.append(layer)

    return Coverage(tuple(layers))


def _fraction_of(macs: int | None, total: int) -> float | None:
    """The fraction of a total.

    Args:
        macs: The part; None if it is not known.
        total: The total. 0 gives a fraction of 0.

    Returns:
        0 to 1; None if the part is not known.
    """
    if macs is None:
        return None
    if not total:
        return 0.0
    return macs / total


def compare_coverage(coverage: Coverage, census: Sequence[BuiltLayer]) -> CoverageDifference:
    """Compare the prediction with the layers of the engine, by node name.

    Args:
        coverage: From `measure_coverage`.
        census: From the build of the same file (`BuildReport.layers`).

    Returns:
        The names of the nodes where the two differ, in graph order.
    """
    expected = {layer.name: layer.int8 for layer in coverage.layers}
    built = {layer.node: layer.int8 for layer in census}

    missing = []
    extra = []
    for name, expects_int8 in expected.items():
        if name not in built:
            continue
        if expects_int8 and not built[name]:
            missing.append(name)
        if built[name] and not expects_int8:
            extra.append(name)

    unknown = sorted(expected.keys() ^ built.keys())
    return CoverageDifference(tuple(missing), tuple(extra), tuple(unknown))


def list_work_nodes(model: ir.Model) -> list[WorkNode]:
    """All nodes of the main graph that multiply, in graph order."""
    work_nodes = []
    for node in _select_nodes(model):
        is_product = is_op(node, *PRODUCT_OPS)
        work_node = WorkNode(
            name=node.name or "",
            module=module_of(node),
            op_type=node.op_type,
            input_quantized=is_product and dequantizer_of(node.inputs[0]) is not None,
            weight_quantized=is_product and dequantizer_of(node.inputs[1]) is not None,
            reason="" if is_product else explain_work(node),
        )
        work_nodes.append(work_node)

    return work_nodes


def _select_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph that multiply, in graph order."""
    return [node for node in model.graph if has_work(node)]


def module_of(node: ir.Node) -> str:
    """Dotted name of the torch module that a node came from.

    Args:
        node: Any node, named `MODULE/OP` (see `graph.names`).

    Returns:
        The name of the node in files of other tools.
    """
    name = node.name or ""
    if "/" not in name:
        return name

    module, _, _ = name.rpartition("/")
    return module


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, looking through operators that only move values.

    Args:
        value: An operand of a product.

    Returns:
        None if there is none, so that the product reads float.
    """
    visited = set()  # a damaged graph may be a cycle
    while value is not None and value not in visited:
        visited.add(value)

        node = value.producer()
        if is_op(node, "DequantizeLinear"):
            return node
        if not is_op(node, *TRANSPARENT_OPS):
            return None

        value = input_of(node, 0)

    return None


def count_qdq(model: ir.Model) -> tuple[int, int]:
    """Number of QuantizeLinear and of DequantizeLinear nodes."""
    ops = [node.op_type for node in model.graph]
    return ops.count("QuantizeLinear"), ops.count("DequantizeLinear")


def reason_for_float(node: ir.Node) -> str:
    """Why a node is not expected in int8, the simplest reason first.

    Args:
        node: A node that multiplies.

    Returns:
        "" if it is expected in int8.
    """
    if not is_op(node, *PRODUCT_OPS):
        return explain_work(node)
    activation = dequantizer_of(node.inputs[0])
    weight = dequantizer_of(node.inputs[1])
    if activation is None and weight is None:
        return _NO_PAIR
    if activation is None:
        return _WEIGHT_ONLY
    if weight is None:
        return _INPUT_ONLY
    if node.op_type == "ConvTranspose":
        return _NO_KERNEL

    reason = _reason_against_activation(activation)
    if reason:
        return reason
    return _reason_against_weight(node, weight)


def _reason_against_activation(dequantize: ir.Node) -> str:
    """Why TensorRT does not take the DQ of an activation.

    Returns:
        "" if it does.
    """
    reason = _reason_against_parameters(dequantize, "input")
    if reason:
        return reason

    scale = constant_of(input_of(dequantize, 1))
    if scale is not None and scale.ndim:
        return f"its input has {scale.size} scales (R-ACT-PC)"
    return ""


def _reason_against_weight(node: ir.Node, dequantize: ir.Node) -> str:
    """Why TensorRT does not take the DQ of the second operand of a product.

    The axis of its scales is checked only if the product reads the DQ directly. After a Transpose the axis differs; the
    rule R-AXIS of `qdq check` follows it.

    Returns:
        "" if it does.
    """
    reason = _reason_against_parameters(dequantize, "weight")
    if reason:
        return reason

    scale = constant_of(input_of(dequantize, 1))
    is_per_channel = scale is not None and scale.ndim > 0
    is_direct = dequantize.outputs[0] is node.inputs[1]
    if is_per_channel and is_direct and not _scales_output_channels(node, dequantize):
        return _WRONG_AXIS
    return ""


def _reason_against_parameters(dequantize: ir.Node, operand: str) -> str:
    """Why TensorRT does not take a scale or zero point, whichever operand it belongs to.

    Args:
        dequantize: The DQ.
        operand: "input" or "weight", for the text.

    Returns:
        "" if it does.
    """
    scale = constant_of(input_of(dequantize, 1))
    if scale is None or parameters_of(dequantize) is None:
        return f"the {operand} scale or zero point is computed in the graph (R-DYN)"
    if scale.shape == (1,):
        return f"the {operand} scale has shape [1], not a scalar's (R-SHAPE)"
    if not has_int8_zeros(dequantize):
        return f"the {operand} zero point is not an int8 zero (R-SYM)"
    return ""


def _scales_output_channels(node: ir.Node, dequantize: ir.Node) -> bool:
    """Whether the axis of the weight scales is that of the output channels.

    This is assumed if the rank of the weight is not known.

    Args:
        node: The product.
        dequantize: The DQ of its weight.
    """
    shape = dequantize.outputs[0].shape
    if shape is None:
        return True

    rank = len(shape)
    axis = dequantize.attributes.get_int("axis", 1) % rank
    return axis == output_axis(node, rank)


def output_axis(node: ir.Node, rank: int) -> int | None:
    """The axis of the output channels in the weight of a product (R-AXIS).

    Args:
        node: One of `PRODUCT_OPS`.
        rank: Number of dimensions of its weight.

    Returns:
        The axis, 0 or above; None for an Einsum with another number of them than one.
    """
    if node.op_type == "Einsum":
        return find_output_label(node)
    if node.op_type == "Gemm":
        is_transposed = node.attributes.get_int("transB", 0)
        return 0 if is_transposed else 1

    axes = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}
    return axes[node.op_type]


def follow_axis(value: ir.Value | None, weight: ir.Node, axis: int) -> int | None:
    """The position of an axis of a DQ's output in a value that comes from it.

    Args:
        value: The value, such as the second operand of a product.
        weight: The DQ.
        axis: Axis of the output of the DQ.

    Returns:
        None if a node between the two may move the axis in an unknown way.
    """
    for node in reversed(_path_from(weight, value)):
        if has_reference(node):
            return None

        permutation = node.attributes.get("perm")
        if is_op(node, "Transpose") and permutation is not None:
            axis = list(permutation.as_ints()).index(axis)
        elif not is_op(node, "Identity", "Cast"):
            return None

    return axis


def _path_from(start: ir.Node, value: ir.Value | None) -> list[ir.Node]:
    """The nodes that lead from a node to a value along first inputs, the last one first."""
    path: list[ir.Node] = []
    node = producer_of(value)
    while node is not None and node is not start:
        path.append(node)
        node = producer_of(node.inputs[0])

    return path


def copy_for_one_sample(model: ir.Model, data_prop: bool) -> ir.Model:
    """A copy with a batch of 1 and with every shape that can be inferred."""
    try:
        copy = model.clone()
    except Exception:  # onnx-ir cannot copy a damaged graph, such as one that reads a missing value
        return model

    values = list(copy.graph.inputs)
    for node in copy.graph:
        values += node.outputs

    _bind_batch(copy.graph.inputs, values)
    if not all(map(_is_sized, values)):
        infer_shapes(copy, data_prop=data_prop)
    return copy


def _bind_batch(inputs: Sequence[ir.Value], values: Sequence[ir.Value]) -> None:
    """Replace the dynamic batch in shapes by 1, in place.

    Args:
        inputs: Inputs of the graph; the names of their first dimensions are the batch.
        values: The values whose shapes are changed.
    """
    names = [_batch_name_of(graph_input) for graph_input in inputs]
    batches = {name: 1 for name in names if name is not None}
    for value in values:
        if value.shape is None:
            continue

        sizes = [_bind_size(size, batches) for size in value.shape]
        value.shape = ir.Shape(sizes)


def _batch_name_of(graph_input: ir.Value) -> str | None:
    """The name of the first dimension of an input of the graph, which is the batch.

    Returns:
        None if it is a number, has no name, or is not known.
    """
    if not graph_input.shape:
        return None

    batch = graph_input.shape[0]
    if isinstance(batch, int) or batch.value is None:
        return None
    return str(batch.value)


def _bind_size(size: int | ir.SymbolicDim, batches: dict[str, int]) -> int | ir.SymbolicDim:
    """A dimension with the batch replaced by its size.

    Args:
        size: A number, a name, or an expression of names.
        batches: Name -> size.

    Returns:
        The dimension itself if it has no name, or a name from another tool that is not an expression.
    """
    if isinstance(size, int) or size.value is None:
        return size

    try:
        return size.evaluate(batches)
    except ValueError:
        return size


def _is_sized(value: ir.Value) -> bool:
    """Whether every dimension of a value is a known number."""
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)
