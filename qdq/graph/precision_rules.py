"""The nodes of a graph that stay in float32 when the others become 16 bit, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx import defs

from qdq.graph.pairs import (
    COPY_OPS,
    ONNX_DOMAINS,
    QDQ_OPS,
    code_type_of,
    constant_of,
    input_of,
    is_op,
    producer_of,
)
from qdq.graph.work import WEIGHTED_OPS

HEADROOM = 4.0
"""The factor by which a measured value may grow on other inputs before it leaves the range of float16."""

LARGE_REDUCTION = 1024
"""A mean or sum over more values than this is computed in float32."""

_FLOAT = ir.DataType.FLOAT
# Their mean and variance lose digits in 16 bit.
_NORMALIZATIONS = frozenset(
    {
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "RMSNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
    }
)
_SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
# Their results may leave the range of float16 for inputs that were not measured; bfloat16 has the range of float32.
_GROWING_OPS = frozenset(
    {
        "Exp",
        "Pow",
        "CumSum",
        "ReduceSumSquare",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceProd",
    }
)
# They turn small differences near zero into large ones.
_NEAR_ZERO_OPS = frozenset({"Sqrt", "Reciprocal", "Log"})
_MEAN_OPS = frozenset({"ReduceMean", "ReduceSum", "GlobalAveragePool"})
# Their scales have a separate rule, and small weights and biases lose no more by rounding than others.
_EXEMPT_FROM_CONSTANTS = frozenset({*QDQ_OPS, "Conv", "ConvTranspose", "Gemm"})
# They keep a small value small or make it the divisor.
_DIVISOR_OPS = COPY_OPS | {"Div", "Mul", "Sqrt", "Reciprocal"}
# They keep the operand of a square root away from zero.
_EPSILON_OPS = frozenset({"Add", "Max", "Clip"})
# A variance is one of these, taken of squares.
_VARIANCE_OPS = frozenset({"ReduceMean", "ReduceSum"})
_BODY_TYPES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_LARGEST_CODE = 128  # magnitude of int8 codes
_LARGEST_FP8_CODE = 448

_MIXED_PRODUCT = (
    "an operand of its product has float32 scales, and the scales of both must be of one type"
)
_NORMALIZATION_PART = "part of a normalization written in single operators"
_DIVIDES_BY_FLOOR = "divides by a value whose floor is zero in 16 bit"
_BETWEEN_FLOAT32 = "lies between nodes in float32"
_UNKNOWN_REDUCTION = "a reduction over an unknown number of values"


@dataclass(frozen=True)
class KeptNode:
    """A node that stays in float32.

    Args:
        node: Its name.
        op_type: The ONNX operator; "input" or "output" for those of the graph.
        reason: Why it stays.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Target:
    """The precision that a graph is converted to.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        opset: Opset of the graph.
        peaks: Largest magnitude of values by name, measured on example inputs.
        keep_io_types: The inputs and outputs of the graph stay float32.
    """

    dtype: ir.DataType
    opset: int
    peaks: Mapping[str, float] = field(default_factory=dict)
    keep_io_types: bool = True

    @property
    def is_float16(self) -> bool:
        """Whether the type is float16, whose range is smaller than that of float32 and bfloat16."""
        return self.dtype == ir.DataType.FLOAT16

    @property
    def name(self) -> str:
        """The name in ONNX and numpy: float16 or bfloat16."""
        return self.dtype.name.lower()

    @cached_property
    def largest(self) -> float:
        """Largest finite number."""
        return 65504.0 if self.is_float16 else float.fromhex("0x1.fep127")

    @cached_property
    def smallest_normal(self) -> float:
        """Smallest normal number; smaller ones lose digits."""
        return 2.0**-14 if self.is_float16 else 2.0**-126

    def allows(self, types: Collection[str]) -> bool:
        """Whether the types that an operator allows include this one."""
        return f"tensor({self.name})" in types

    def overflows(self, value: ir.Value) -> str | None:
        """Why a value does not fit 16 bit.

        Args:
            value: A constant, or a value whose largest magnitude may have been measured.

        Returns:
            None if it fits, or if nothing is known about it. Every measured value fits bfloat16, which has the range of
            float32.
        """
        constant = constant_of(value)
        if constant is not None:
            finite_numbers = constant[np.isfinite(constant)]
            peak = float(np.abs(finite_numbers).max(initial=0))
            if peak <= self.largest:
                return None
            return f"its constant {value.name} reaches {peak:.3g}"

        peak = self.peaks.get(str(value.name), 0.0)
        if not self.is_float16 or peak * HEADROOM <= self.largest:
            return None
        return f"{value.name} reaches {peak:.3g}, and {self.name} ends at {self.largest:.0f}"


@dataclass(frozen=True)
class NodeParameter:
    """An input or output of a node.

    Args:
        value: The value; None for one that is left out.
        types: The types that the operator allows there, such as `tensor(float16)`.
        is_input: It is an input.
    """

    value: ir.Value | None
    types: frozenset[str]
    is_input: bool


def choose_float32(graph: ir.Graph, target: Target) -> dict[ir.Node, str]:
    """Decide for every node that has float32 inputs or outputs whether it stays in float32.

    Args:
        graph: The graph, with types of all values.
        target: The precision of the others. Returns: Node -> reason, in graph order, for the nodes that stay.
    """
    nodes = [node for node in graph if _needs_decision(node)]

    reasons: dict[ir.Node, str] = {}
    for node in nodes:
        reason = _reason_of(node, target)
        if reason is not None:
            reasons[node] = reason

    # A node keeps its first reason.
    _add_reason(reasons, _products_of_float32(nodes, reasons), _MIXED_PRODUCT)
    _add_reason(reasons, _decomposed_normalizations(nodes), _NORMALIZATION_PART)
    _add_reason(reasons, _divisions_by_floored(nodes, target), _DIVIDES_BY_FLOOR)
    _add_reason(reasons, _regions_between(nodes, reasons, target), _BETWEEN_FLOAT32)
    return {node: reasons[node] for node in nodes if node in reasons}


def _add_reason(reasons: dict[ir.Node, str], nodes: Iterable[ir.Node], reason: str) -> None:
    """Give a reason to the nodes that have none yet.

    Args:
        reasons: Node -> reason; changed in place.
        nodes: Nodes that stay float32.
        reason: Why.
    """
    for node in nodes:
        reasons.setdefault(node, reason)


def _needs_decision(node: ir.Node) -> bool:
    """Whether a node computes in float32, or reads it and depends on its type.

    A Q does: its scale has the type of its input.
    """
    if any(map(is_float, node.outputs)):
        return True
    if not any(map(is_float, node.inputs)):
        return False
    return node.op_type == "QuantizeLinear" or not takes_either(node)


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is float32."""
    return value is not None and value.dtype == _FLOAT


def takes_either(node: ir.Node) -> bool:
    """Whether a node reads one float value, of any float type: Q, Cast, Shape, ArgMax, IsNaN ...

    Such a node needs no Cast before it, and its result depends on the precision of its input only by rounding.

    Args:
        node: Any node, with the types of its inputs and outputs.
    """
    if node.op_type in ("QuantizeLinear", "Cast"):
        return True

    has_float_output = any(map(is_float, node.outputs))
    return sum(map(is_float, node.inputs)) == 1 and not has_float_output


def parameter_types(node: ir.Node, opset: int) -> list[NodeParameter]:
    """Every input and output of a node, with the types that its operator allows there.

    Args:
        node: A node of an ONNX operator.
        opset: Opset of its graph.
    """
    schema = defs.get_schema(node.op_type, opset, node.domain)
    parameters = []
    for position, value in enumerate(node.inputs):
        definition = _parameter_at(schema.inputs, position)
        parameters.append(NodeParameter(value, frozenset(definition.types), is_input=True))
    for position, value in enumerate(node.outputs):
        definition = _parameter_at(schema.outputs, position)
        parameters.append(NodeParameter(value, frozenset(definition.types), is_input=False))

    return parameters


def _parameter_at(
    definitions: Sequence[defs.OpSchema.FormalParameter], position: int
) -> defs.OpSchema.FormalParameter:
    """The definition of an input or output; the last one may be variadic."""
    last_position = len(definitions) - 1
    return definitions[min(position, last_position)]


# --- rules for a single node ----------------------------------------------------------------------------------------


def _reason_of(node: ir.Node, target: Target) -> str | None:
    """The reason of the first rule that keeps a node in float32; None if no rule does."""
    for rule in _RULES:
        reason = rule(node, target)
        if reason is not None:
            return reason

    return None


def _by_types(node: ir.Node, target: Target) -> str | None:
    """Keep nodes that ONNX does not define in 16 bit, and nodes that qdq cannot look into.

    Args:
        node: The node.
        target: The precision of the rest.

    Returns:
        The reason; None if the rule does not keep the node.
    """
    is_onnx = node.domain in ONNX_DOMAINS
    if not is_onnx or not defs.has(node.op_type, target.opset, node.domain):
        return "not an operator of ONNX: its types are not known"
    if any(attribute.type in _BODY_TYPES for attribute in node.attributes.values()):
        return "has a subgraph"
    if "dtype" in node.attributes:
        return "its attribute dtype is float32"

    if not _has_type(node, target):
        return f"{node.op_type} has no {target.name} in ONNX {target.opset}"
    return None


def _has_type(node: ir.Node, target: Target) -> bool:
    """Whether ONNX defines an operator in 16 bit.

    Each float32 output must allow the type. If no output is float32, one float32 input that allows it is enough: the
    other inputs get a Cast.

    Args:
        node: A node of an ONNX operator.
        target: The type, and the opset of the definition.
    """
    input_types: list[frozenset[str]] = []
    output_types: list[frozenset[str]] = []
    for parameter in parameter_types(node, target.opset):
        if not is_float(parameter.value):
            continue
        types = input_types if parameter.is_input else output_types
        types.append(parameter.types)

    if output_types:
        return all(map(target.allows, output_types))
    return any(map(target.allows, input_types))


def _by_operator(node: ir.Node, target: Target) -> str | None:
    """Keep operators that lose digits in 16 bit, or that may leave the range of float16.

    Sums of many squares or exponentials need more than the 8 or 11 significant bits of the 16 bit types.
    """
    if node.op_type in _NORMALIZATIONS:
        return "a normalization: its mean and variance lose digits in 16 bit"
    if node.op_type in _SOFTMAXES:
        return "softmax: its exponentials and their sum lose digits in 16 bit"
    if not target.is_float16:
        return None
    if node.op_type in _GROWING_OPS:
        return f"{node.op_type} of another input may leave the range of float16"
    if node.op_type in _NEAR_ZERO_OPS:
        return f"{node.op_type} of numbers near zero, where float16 has few values"
    return None


def _by_scale(node: ir.Node, target: Target) -> str | None:
    """Keep a scale that underflows or is subnormal, or whose codes overflow (R-SCALE).

    TensorRT may flush subnormal scales to zero, and then a code times such a scale would be zero.
    """
    if node.op_type not in QDQ_OPS:
        return None

    scale = constant_of(node.inputs[1])
    if scale is None:
        return None

    smallest = float(scale.min(initial=np.inf))
    if smallest < target.smallest_normal:
        count = int((scale < target.smallest_normal).sum())
        return (
            f"{count} of {scale.size} scales are below the smallest normal {target.name}, "
            f"down to {smallest:.3g}"
        )

    is_fp8 = code_type_of(node) == ir.DataType.FLOAT8E4M3FN
    largest_code = _LARGEST_FP8_CODE if is_fp8 else _LARGEST_CODE
    peak = largest_code * float(scale.max(initial=0))
    if peak > target.largest:
        return f"its codes reach {peak:.3g}, and {target.name} ends at {target.largest:.0f}"
    return None


def _by_size(node: ir.Node, target: Target) -> str | None:
    """Keep a mean or sum over more than `LARGE_REDUCTION` values."""
    if node.op_type not in _MEAN_OPS:
        return None

    count = _reduced_values(node)
    if count is None:
        return _UNKNOWN_REDUCTION
    if count <= LARGE_REDUCTION:
        return None
    return f"a reduction over {count} values"


def _reduced_values(node: ir.Node) -> int | None:
    """The number of values in each mean or sum of a node.

    Returns:
        None if a size or the axes are not known.
    """
    data = node.inputs[0]
    if data is None or data.shape is None:
        return None

    axes = _reduced_axes(node, len(data.shape))
    if axes is None:
        return None

    sizes = []
    for axis in axes:
        size = data.shape[axis]
        if not isinstance(size, int):
            return None
        sizes.append(size)

    return math.prod(sizes)


def _reduced_axes(node: ir.Node, rank: int) -> list[int] | None:
    """The axes that a mean or sum is taken over.

    Args:
        node: A ReduceMean, ReduceSum or GlobalAveragePool.
        rank: Number of dimensions of its input.

    Returns:
        All axes if none are listed; None if they are computed.
    """
    if node.op_type == "GlobalAveragePool":
        return list(range(2, rank))
    if input_of(node, 1) is None:
        return list(range(rank))

    axes = constant_of(node.inputs[1])
    if axes is None:
        return None
    return [int(axis) for axis in axes.ravel()]


def _by_constant(node: ir.Node, target: Target) -> str | None:
    """Keep an epsilon, which would become zero in 16 bit.

    It is a single number below the smallest normal one. Such small elements of larger constants matter no more than
    other rounding errors.

    Args:
        node: The node.
        target: The precision of the rest.
    """
    if node.op_type in _EXEMPT_FROM_CONSTANTS:
        return None

    for value in node.inputs:
        constant = constant_of(value)
        if value is None or constant is None:
            continue
        if not is_float(value) or constant.size != 1:
            continue

        peak = float(np.abs(constant).max(initial=0))
        if 0 < peak < target.smallest_normal:
            return f"its constant {value.name} of {peak:.3g} is too small for {target.name}"

    return None


def _by_range(node: ir.Node, target: Target) -> str | None:
    """Keep a node whose values overflow.

    Inputs count as well: after a node that stays float32, they would overflow in a Cast. A Q has the type of its input,
    so it needs no Cast.

    Args:
        node: The node.
        target: The precision of the others, with the largest values that were measured.
    """
    if node.op_type == "QuantizeLinear":
        return None

    for value in [*node.inputs, *node.outputs]:
        if value is None or not is_float(value):
            continue
        reason = target.overflows(value)
        if reason is not None:
            return reason

    return None


_RULES: tuple[Callable[[ir.Node, Target], str | None], ...] = (
    _by_types,
    _by_operator,
    _by_scale,
    _by_size,
    _by_constant,
    _by_range,
)


# --- rules for several nodes ----------------------------------------------------------------------------------------


def _products_of_float32(nodes: list[ir.Node], reasons: Mapping[ir.Node, str]) -> set[ir.Node]:
    """Products with an operand whose DQ stays float32, and all nodes that dequantize their operands.

    TensorRT cannot build an int8 product from them ("type mismatch between matmul operand scales"). An exception is a
    convolution where only the weight has float32 scales, with a Cast after its DQ.

    Args:
        nodes: The nodes to decide about.
        reasons: Those that stay float32 so far.

    Returns:
        The nodes that have to stay in addition.
    """
    products = [node for node in nodes if node.op_type in WEIGHTED_OPS]
    float32_nodes = set(reasons)
    size = 0
    while size != len(float32_nodes):
        # A DQ that several products read passes the decision from one to the next, in any order.
        size = len(float32_nodes)
        for product in products:
            if _has_float32_scales(product, float32_nodes):
                float32_nodes.update(_nodes_of_product(product))

    return float32_nodes - reasons.keys()


def _has_float32_scales(product: ir.Node, float32_nodes: Collection[ir.Node]) -> bool:
    """Whether the DQ of a relevant operand of a product stays float32.

    For a convolution it is the input, for a matrix product both operands.

    Args:
        product: The product.
        float32_nodes: Nodes that stay float32.
    """
    is_convolution = is_op(product, "Conv", "ConvTranspose")
    deciding_operands = product.inputs[:1] if is_convolution else product.inputs[:2]
    for operand in deciding_operands:
        path = _dequantizing_path(operand)
        if path and path[-1] in float32_nodes:
            return True

    return False


def _nodes_of_product(product: ir.Node) -> list[ir.Node]:
    """All nodes that dequantize the operands of a product, then the product."""
    nodes = []
    for operand in product.inputs[:2]:
        nodes += _dequantizing_path(operand)

    nodes.append(product)
    return nodes


def _dequantizing_path(value: ir.Value | None) -> list[ir.Node]:
    """The nodes from a value back to its DQ: first the copies, nearest to the value first, then the DQ.

    Args:
        value: An operand of a product.

    Returns:
        Nothing if the value does not come from a DQ through copies.
    """
    path = []
    node = producer_of(value)
    while node is not None:
        path.append(node)
        if is_op(node, "DequantizeLinear"):
            return path
        if not is_op(node, *COPY_OPS):
            return []
        node = producer_of(node.inputs[0])

    return []


def _decomposed_normalizations(nodes: list[ir.Node]) -> list[ir.Node]:
    """The nodes of every normalization that is written in single operators.

    They are x - mean(x), its square, the mean of that, the addition of epsilon, the square root, and the division by
    it, which may be a Reciprocal and a product.

    Args:
        nodes: The nodes to search.
    """
    parts: list[ir.Node] = []
    for root in nodes:
        if root.op_type != "Sqrt":
            continue

        nodes_before_root = _variance_of(root)
        if not nodes_before_root:
            continue

        parts.append(root)
        parts += nodes_before_root
        for user in root.outputs[0].consumers():
            parts.append(user)
            if user.op_type == "Reciprocal":
                parts += user.outputs[0].consumers()

    return parts


def _variance_of(root: ir.Node) -> list[ir.Node]:
    """The nodes that compute the variance before a square root, as far as they can be recognized.

    Args:
        root: A Sqrt.

    Returns:
        Nothing if the root is not that of a mean or sum, with or without an epsilon.
    """
    parts = []
    mean = producer_of(root.inputs[0])
    if mean is not None and mean.op_type in _EPSILON_OPS:
        parts.append(mean)
        mean = _first_producer_of(mean)
    if mean is None or mean.op_type not in _VARIANCE_OPS:
        return []

    parts.append(mean)
    parts += _squares_of(mean)
    return [part for part in parts if part.op_type not in WEIGHTED_OPS]


def _squares_of(mean: ir.Node) -> list[ir.Node]:
    """The nodes that compute the operand of a mean of squares.

    They are the square, the difference that is squared, and the mean that is subtracted there, if they are written like
    that.

    Args:
        mean: A ReduceMean or ReduceSum.
    """
    square = producer_of(mean.inputs[0])
    if square is None:
        return []
    if square.op_type not in ("Mul", "Pow"):
        return [square]

    difference = producer_of(square.inputs[0])
    if difference is None or difference.op_type != "Sub":
        return [square]

    subtrahend = producer_of(difference.inputs[1])
    if subtrahend is None:
        return [square, difference]
    return [square, difference, subtrahend]


def _first_producer_of(node: ir.Node) -> ir.Node | None:
    """The node that computes the first computed input of a node.

    Args:
        node: The addition of an epsilon, which may be either operand.
    """
    for value in node.inputs:
        producer = producer_of(value)
        if producer is not None:
            return producer

    return None


def _divisions_by_floored(nodes: list[ir.Node], target: Target) -> list[ir.Node]:
    """The nodes between max(|x|, 1e-12) and the division by it, which would be by zero in 16 bit.

    They are copies, square roots and products of the floored value. After a Reciprocal, a product is the division.

    Args:
        nodes: The nodes to search.
        target: The precision of the others, which decides whether the floor becomes zero.
    """
    visited: dict[ir.Node, None] = {}
    pending: list[tuple[ir.Node, bool]] = []  # and whether the reciprocal has been taken already
    for node in nodes:
        if is_op(node, *_EPSILON_OPS) and _by_constant(node, target) is not None:
            pending.append((node, False))

    while pending:
        node, is_inverse = pending.pop()
        for user in node.outputs[0].consumers():
            if user in visited or not is_op(user, *_DIVISOR_OPS):
                continue

            # The first path to a node decides whether the reciprocal has been taken before it.
            visited[user] = None
            if not _divides(user, is_inverse):
                pending.append((user, is_inverse or is_op(user, "Reciprocal")))

    return list(visited)


def _divides(node: ir.Node, is_inverse: bool) -> bool:
    """Whether a node is the division by a floored value.

    Args:
        node: A node that reads it or its reciprocal.
        is_inverse: Whether the node reads the reciprocal.
    """
    if is_inverse and is_op(node, "Mul"):
        return True
    return is_op(node, "Div")


def _regions_between(
    nodes: list[ir.Node], reasons: Mapping[ir.Node, str], target: Target
) -> set[ir.Node]:
    """Nodes where 16 bit would only add a Cast before and after: all nodes around them are float32 anyway.

    Matrix products are excluded, because they belong in 16 bit. Only nodes connected with a node that stays float32
    count: float32 inputs and outputs of the graph alone are no reason.

    Args:
        nodes: The nodes to decide about.
        reasons: Those that stay float32 so far.
        target: The precision of the rest.
    """
    enclosed_nodes = _enclosed_nodes(nodes, reasons, target)
    region: set[ir.Node] = set()
    frontier = list(reasons)
    while frontier:
        node = frontier.pop()
        new_nodes = (enclosed_nodes & _neighbors_of(node)) - region
        region |= new_nodes
        frontier += new_nodes

    return region


def _enclosed_nodes(
    nodes: list[ir.Node], reasons: Mapping[ir.Node, str], target: Target
) -> set[ir.Node]:
    """The largest set of nodes that exchange values only with each other and with nodes that stay float32.

    The search starts with all candidates and drops those with a 16 bit neighbor, until there are none.

    Args:
        nodes: The nodes to decide about.
        reasons: Those that stay float32 so far.
        target: The precision of the rest.
    """
    enclosed_nodes: set[ir.Node] = set()
    for node in nodes:
        belongs_in_half = node.op_type in WEIGHTED_OPS or node.op_type == "QuantizeLinear"
        if node not in reasons and not belongs_in_half:
            enclosed_nodes.add(node)

    open_nodes = enclosed_nodes
    while open_nodes:
        float32_nodes = enclosed_nodes | reasons.keys()
        open_nodes = {
            node for node in enclosed_nodes if not _is_enclosed(node, float32_nodes, target)
        }
        enclosed_nodes = enclosed_nodes - open_nodes

    return enclosed_nodes


def _neighbors_of(node: ir.Node) -> set[ir.Node]:
    """The nodes that a node reads from, and those that read from it."""
    neighbors: set[ir.Node] = set()
    for value in node.inputs:
        producer = producer_of(value)
        if producer is not None:
            neighbors.add(producer)
    for value in node.outputs:
        neighbors.update(value.consumers())

    return neighbors


def _is_enclosed(node: ir.Node, float32_nodes: set[ir.Node], target: Target) -> bool:
    """Whether a node reads only float32, and only float32 nodes read it.

    Args:
        node: The node.
        float32_nodes: Nodes that stay float32, or may.
        target: The precision of the rest.
    """
    for value in node.inputs:
        if (
            value is not None
            and is_float(value)
            and not _stays_float32(value, float32_nodes, target)
        ):
            return False

    for value in node.outputs:
        if is_float(value) and not _is_read_in_float32(value, node, float32_nodes, target):
            return False

    return True


def _stays_float32(value: ir.Value, float32_nodes: set[ir.Node], target: Target) -> bool:
    """Whether a float32 input of a node stays float32.

    A constant does, because it gets the type of each reader. An input of the graph does if the signature is kept.
    """
    if constant_of(value) is not None:
        return True

    producer = value.producer()
    if producer is None:
        return target.keep_io_types
    return producer in float32_nodes


def _is_read_in_float32(
    value: ir.Value, node: ir.Node, float32_nodes: set[ir.Node], target: Target
) -> bool:
    """Whether no reader of a float32 output of a node would read it in 16 bit.

    Readers that accept either type do not count, and neither do subgraphs, which stay float32.

    Args:
        value: The output.
        node: The node.
        float32_nodes: Nodes that stay float32, or may.
        target: The precision of the rest.
    """
    if value.is_graph_output() and not target.keep_io_types:
        return False

    for user in value.consumers():
        is_in_subgraph = user.graph is not node.graph
        if is_in_subgraph or user in float32_nodes:
            continue
        if not takes_either(user):
            return False

    return True
