"""Coverage: the type in which each node of an ONNX graph that multiplies runs, and its fraction of the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.code_types import (
    LARGEST_FP8_KERNEL,
    find_code_type,
    is_trt_dequantizer,
    is_trt_quantizer,
    name_kernel_type,
)
from qdq.graph.pairs import (
    COPY_OPS,
    TRT_QUANTIZERS,
    constant_of,
    has_int8_zeros,
    has_reference,
    has_zeros,
    input_of,
    is_op,
    is_trt_op,
    parameters_of,
    producer_of,
)
from qdq.graph.shapes import infer_shapes
from qdq.graph.work import PRODUCT_OPS, count_macs, explain_work, find_output_label, has_work
from qdq.product_types import LOW_TYPES, WEIGHTS_ONLY, list_low_types, word_of
from qdq.text import list_names

# A DQ before these still reaches the operator after them: they move or pad values, they compute no new ones.
# TensorRT-RTX 1.7 computes a convolution after each of them in int8.
TRANSPARENT_OPS = COPY_OPS | {"Cast", "Identity", "MaxPool", "Pad"}

_FLOAT_TYPES = {
    ir.DataType.FLOAT: "Float",
    ir.DataType.FLOAT16: "Half",
    ir.DataType.BFLOAT16: "BFloat16",
}
_STORED_WEIGHT_OPS = ("Gemm", "MatMul")

_Number = TypeVar("_Number", int, float)

_NO_PAIR = "no Q/DQ on its inputs"
_INPUT_ONLY = "Q/DQ on its input only (R-CONV-2)"
_WEIGHT_ONLY = "Q/DQ on its weight only (R-CONV-2)"
_NO_KERNEL = "TensorRT-RTX has no {word} kernel for it (R-CT-3)"
_WRONG_AXIS = "the weight scales are not along its output channels (R-AXIS)"


@dataclass(frozen=True)
class WorkNode:
    """A node of the graph that multiplies (see `graph.work`).

    Args:
        name: Name of the ONNX node, `MODULE/OP` in files that qdq wrote.
        module: Dotted name of the torch module it came from; the name of the node in files of other tools.
        op_type: The ONNX operator.
        input_codes: TensorRT's name of the type of the DequantizeLinear that the first operand of one of `PRODUCT_OPS`
            comes from, such as "Int8"; empty without one.
        weight_codes: Likewise for the second operand.
        promised: The type in which the file says that it runs, see `LayerCoverage`.
        reason: Why no Q/DQ would bring its operator into int8; "" for `PRODUCT_OPS`.
    """

    name: str
    module: str
    op_type: str
    input_codes: str
    weight_codes: str
    promised: str
    reason: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether TensorRT can multiply in less than 16 bit: both operands must be quantized (R-CONV-2)."""
        return bool(self.input_codes and self.weight_codes)


@dataclass(frozen=True)
class LayerCoverage:
    """Expected precision and work of one node that multiplies.

    Args:
        name: Name of the ONNX node.
        module: Dotted name of the torch module.
        op_type: The ONNX operator.
        int8: TensorRT is expected to run it in int8.
        reason: Why it is not expected in int8, FP8 or FP4; empty if it is.
        macs: Multiply-accumulate operations (MACs) for one sample; None if they are not known: an open shape, a body
            that runs an unknown number of times, an operator that ONNX does not have.
        share: Its fraction of all known MACs, 0 to 1; None if `macs` is None.
        promised: The type in which the file says that it runs, by TensorRT's names: one of `LOW_TYPES` if both operands
            have Q/DQ of that type; `Int4 weights` and the like if only a stored weight has a DQ; otherwise `Half`,
            `BFloat16` or `Float`. Empty if the file does not show the type.
        expected: The type in which TensorRT is expected to run it: `promised`, or a float type if `reason` speaks
            against that.
    """

    name: str
    module: str
    op_type: str
    int8: bool
    reason: str
    macs: int | None
    share: float | None
    promised: str
    expected: str


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
        return self.share_of("Int8")

    def share_of(self, type_name: str) -> float | None:
        """Fraction of the known MACs that is expected in a type.

        Args:
            type_name: TensorRT's name, such as "FP8".

        Returns:
            0 to 1; None if no MACs are known.
        """
        total = self.macs
        if not total:
            return None

        layers = [layer for layer in self.layers if layer.expected == type_name]
        return _sum_known([layer.macs for layer in layers]) / total

    @property
    def low_types(self) -> list[str]:
        """The types below 16 bit in which the file says that products run; int8 if there are none."""
        return list_low_types([layer.promised for layer in self.layers])

    def format_table(self) -> str:
        """A summary for each type, then one line for each reason to stay in float, most work first."""
        groups = _group_float_layers(self.layers)
        groups.sort(key=_FloatGroup.sort_key)

        lines = [self._format_summary(type_name) for type_name in self.low_types]
        if self.num_unknown:
            lines[-1] += f" ({self.num_unknown} of unknown work not counted)"
        lines += [group.format_line() for group in groups]
        return "\n".join(lines)

    def _format_summary(self, type_name: str) -> str:
        """The number of layers that are expected in a type, and their fraction of the MACs."""
        layers = [layer for layer in self.layers if layer.expected == type_name]
        summary = f"{word_of(type_name)} expected: {len(layers)} of {len(self.layers)} nodes that multiply"
        fraction = self.share_of(type_name)
        if fraction is not None:
            summary += f", {_percent(fraction)} of all {self.macs / 1e6:.1f} million MACs"
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
        if not layer.reason:
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
        missing: Nodes that are expected in int8, FP8 or FP4 and run in another type.
        extra: Nodes that are expected in float and run in int8, FP8 or FP4.
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
    def built(self) -> str:
        """The type in which the engine runs it."""
        ...


def measure_coverage(
    model: ir.Model, *, may_infer: bool = True, data_prop: bool = True
) -> Coverage:
    """Predict for every node that multiplies the type in which it runs, and compute its fraction of the work.

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
        promised = find_promise(node)
        reason = reason_for_float(node)
        expected = _find_expectation(node, promised, reason)
        layer = LayerCoverage(
            name=node.name or "",
            module=module_of(node),
            op_type=node.op_type,
            int8=expected == "Int8",
            reason=reason,
            macs=macs,
            share=_fraction_of(macs, total),
            promised=promised,
            expected=expected,
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
    expected = {layer.name: layer.expected for layer in coverage.layers}
    built = {layer.node: layer.built for layer in census}

    missing = []
    extra = []
    for name, expected_type in expected.items():
        if name not in built:
            continue
        if expected_type in LOW_TYPES and built[name] != expected_type:
            missing.append(name)
        if built[name] in LOW_TYPES and expected_type not in LOW_TYPES:
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
            input_codes=_code_type_of_operand(node.inputs[0]) if is_product else "",
            weight_codes=_code_type_of_operand(node.inputs[1]) if is_product else "",
            reason="" if is_product else explain_work(node),
            promised=find_promise(node),
        )
        work_nodes.append(work_node)

    return work_nodes


def _select_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph that multiply, in graph order."""
    return [node for node in model.graph if has_work(node) and not is_trt_quantizer(node)]


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
    source = _source_of(value)
    return source if is_op(source, "DequantizeLinear") else None


def _source_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, looking through operators that only move values.

    Args:
        value: An operand of a product.

    Returns:
        None for an input of the graph, a constant, and a value of a damaged graph.
    """
    visited = set()  # a damaged graph may be a cycle
    while value is not None and value not in visited:
        visited.add(value)

        node = value.producer()
        if not is_op(node, *TRANSPARENT_OPS):
            return node

        value = input_of(node, 0)

    return None


def find_promise(node: ir.Node) -> str:
    """The type in which the file says that a node runs, see `LayerCoverage.promised`.

    Args:
        node: A node that multiplies.
    """
    if not is_op(node, *PRODUCT_OPS):
        return _float_type_of(node)

    first = _code_type_of_operand(node.inputs[0])
    second = _code_type_of_operand(node.inputs[1])
    if first and first == second:
        return first
    if second and not first and is_op(node, *_STORED_WEIGHT_OPS) and _is_stored(node.inputs[1]):
        return second + WEIGHTS_ONLY
    return _float_type_of(node)


def _code_type_of_operand(value: ir.Value | None) -> str:
    """TensorRT's name of the type of the codes that an operand comes from.

    Args:
        value: An operand of a product.

    Returns:
        Empty for a float operand.
    """
    source = _source_of(value)
    if is_op(source, "DequantizeLinear") or is_trt_dequantizer(source):
        return name_kernel_type(source)
    return ""


def _is_stored(value: ir.Value | None) -> bool:
    """Whether the codes of an operand are a constant of the file."""
    source = _source_of(value)
    return source is not None and constant_of(input_of(source, 0)) is not None


def _float_type_of(node: ir.Node) -> str:
    """The float type in which a node computes: that of its first operand or result whose type is known.

    Returns:
        TensorRT's name of it; empty if no type is known.
    """
    for value in (*node.inputs[:2], *node.outputs[:1]):
        if value is None:
            continue
        dtype = _float_dtype_of(value)
        if dtype in _FLOAT_TYPES:
            return _FLOAT_TYPES[dtype]
    return ""


def _float_dtype_of(value: ir.Value) -> ir.DataType | None:
    """The element type of a value; that of a DQ's output is the type of its scale, whatever the file declares."""
    source = _source_of(value)
    if is_op(source, "DequantizeLinear"):
        scale = input_of(source, 1)
        if (
            scale is not None
            and value.producer() is source
            and "output_dtype" not in source.attributes
        ):
            return scale.dtype
    return value.dtype


def _find_expectation(node: ir.Node, promised: str, reason: str) -> str:
    """The type in which TensorRT is expected to run a node, see `LayerCoverage.expected`.

    Args:
        node: A node that multiplies.
        promised: Its promised type.
        reason: Why it is not expected in a type below 16 bit; "" if it is.
    """
    if not reason:
        return promised
    weight = dequantizer_of(node.inputs[1]) if promised.endswith(WEIGHTS_ONLY) else None
    if weight is not None and find_code_type(weight).is_read:
        return promised
    return _float_type_of(node)


def count_qdq(model: ir.Model) -> tuple[int, int]:
    """Number of QuantizeLinear and of DequantizeLinear nodes."""
    ops = [node.op_type for node in model.graph]
    return ops.count("QuantizeLinear"), ops.count("DequantizeLinear")


def reason_for_float(node: ir.Node) -> str:
    """Why a node is not expected in int8, FP8 or FP4, the simplest reason first.

    Args:
        node: A node that multiplies.

    Returns:
        "" if it is expected in one of them.
    """
    if not is_op(node, *PRODUCT_OPS):
        return explain_work(node)
    activation = _code_type_of_operand(node.inputs[0])
    weight = _code_type_of_operand(node.inputs[1])
    if not activation and not weight:
        return _NO_PAIR
    if not activation:
        return _explain_weight_only(node, weight)
    if not weight:
        return _INPUT_ONLY
    if node.op_type == "ConvTranspose":
        return _NO_KERNEL.format(word=word_of(activation))
    if activation != weight:
        return (
            f"its operands are {word_of(activation)} and {word_of(weight)}, "
            "and a product needs two of one type (R-CONV-2)"
        )

    for value, operand in zip(node.inputs[:2], ("input", "weight"), strict=True):
        dequantizer = dequantizer_of(value)
        if dequantizer is None:  # TensorRT's own DQ
            continue
        reason = _reason_against_parameters(dequantizer, operand, node.op_type)
        if reason:
            return reason
    return _reason_against_shapes(node, activation)


def _count_kernel_positions(node: ir.Node) -> int:
    """Height x width of the kernel of a convolution; 0 for another product, and if the shape is not known."""
    weight = input_of(node, 1)
    if node.op_type != "Conv" or weight is None or weight.shape is None:
        return 0
    sizes = [size for size in weight.shape[2:] if isinstance(size, int)]
    return math.prod(sizes)


def _explain_weight_only(node: ir.Node, weight: str) -> str:
    """Why a product of a float input and a quantized weight is in float.

    Args:
        node: The product.
        weight: The type of the codes of its weight.
    """
    if weight == "Int8" or not find_promise(node).endswith(WEIGHTS_ONLY):
        return _WEIGHT_ONLY
    dequantizer = dequantizer_of(node.inputs[1])
    if dequantizer is not None and not find_code_type(dequantizer).is_read:
        return _explain_unread(dequantizer, "weight")
    return f"{word_of(weight + WEIGHTS_ONLY)}, float arithmetic (R-WSTORE)"


def _explain_unread(dequantize: ir.Node, operand: str) -> str:
    """Why a product is in float whose codes TensorRT's parser does not read."""
    return f"the {operand} has {find_code_type(dequantize).name} codes, which TensorRT does not read (R-SYM)"


def _reason_against_shapes(node: ir.Node, code_type: str) -> str:
    """Why TensorRT does not take the shape of the kernel, or those of the scales, of a product.

    The axis of the scales of the second operand is checked only if the product reads the DQ directly. After a Transpose
    the axis differs; the rule R-AXIS of `qdq check` follows it. Scales of blocks are checked by that rule too.

    Args:
        node: A product of two quantized operands.
        code_type: The type of both.

    Returns:
        "" if it does.
    """
    positions = _count_kernel_positions(node)
    if code_type == "FP8" and positions > LARGEST_FP8_KERNEL:
        return f"its kernel has {positions} positions, and a convolution in FP8 at most {LARGEST_FP8_KERNEL} (R-CONV-8)"

    scale = _scale_of(dequantizer_of(node.inputs[0]))
    if scale is not None and scale.size != 1:
        return f"its input has {scale.size} scales (R-ACT-PC)"

    weight = dequantizer_of(node.inputs[1])
    scale = _scale_of(weight)
    if weight is None or scale is None or scale.ndim != 1:
        return ""
    is_direct = weight.outputs[0] is node.inputs[1]
    if is_direct and not _scales_output_channels(node, weight):
        return _WRONG_AXIS
    return ""


def _scale_of(dequantizer: ir.Node | None) -> npt.NDArray[Any] | None:
    """The scales of a DQ; None if there is no DQ, or if they are computed."""
    if dequantizer is None:
        return None
    return constant_of(input_of(dequantizer, 1))


def _reason_against_parameters(dequantize: ir.Node, operand: str, op_type: str) -> str:
    """Why TensorRT does not take a type, scale or zero point, whichever operand it belongs to.

    Args:
        dequantize: The DQ.
        operand: "input" or "weight", for the text.
        op_type: The operator of the product. In FP8, TensorRT-RTX refuses a scale of shape [1] for a Conv only.

    Returns:
        "" if it does.
    """
    code_type = find_code_type(dequantize)
    if not code_type.is_read and code_type.name != "uint8":
        return _explain_unread(dequantize, operand)
    if has_block_scales(dequantize):
        return ""

    scale = constant_of(input_of(dequantize, 1))
    if scale is None or parameters_of(dequantize) is None:
        return f"the {operand} scale or zero point is computed in the graph (R-DYN)"
    if scale.shape == (1,) and (op_type == "Conv" or code_type.name != "FP8"):
        return f"the {operand} scale has shape [1], not a scalar's (R-SHAPE)"
    if code_type.name in ("int8", "uint8") and not has_int8_zeros(dequantize):
        return f"the {operand} zero point is not an int8 zero (R-SYM)"
    if not has_zeros(dequantize):
        return f"the {operand} zero point is not an {code_type.name} zero (R-SYM)"
    return ""


def has_block_scales(dequantize: ir.Node) -> bool:
    """Whether the scales of a DQ are those of blocks that TensorRT dequantizes itself.

    That is so for scales that are codes of their own: constants, or those that TensorRT's dynamic Q writes.

    Args:
        dequantize: A DequantizeLinear.
    """
    node = producer_of(input_of(dequantize, 1))
    if not is_op(node, "DequantizeLinear"):
        return False
    codes = input_of(node, 0)
    return constant_of(codes) is not None or is_trt_op(producer_of(codes), *TRT_QUANTIZERS)


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
