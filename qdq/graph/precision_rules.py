"""Which nodes of a graph stay in float32 where the rest goes to 16 bit, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import defs

from qdq.graph.coverage import WEIGHTED_OPS
from qdq.graph.pairs import COPY_OPS, constant_of, is_op

HEADROOM = 4.0
"""A measured value may grow so much on other inputs before it leaves the range of float16."""

LARGE_REDUCTION = 1024
"""A mean or sum over more values than this is taken in float32."""

_FLOAT = ir.DataType.FLOAT
_NORMALIZATIONS = frozenset(
    {
        *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization"),
        *("LpNormalization", "MeanVarianceNormalization"),
    }
)
_SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
# What float16 overflows or underflows on other inputs than those measured; bfloat16 has the range of float32.
_GROWING = frozenset(
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
_NEAR_ZERO = frozenset({"Sqrt", "Reciprocal", "Log"})
_MEANS = frozenset({"ReduceMean", "ReduceSum", "GlobalAveragePool"})


@dataclass(frozen=True)
class KeptNode:
    """A node that stays in float32.

    Args:
        node: Its name.
        op_type: The ONNX operator; "input" or "output" for those of the graph.
        reason: Why.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Target:
    """What the graph shall become.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        opset: Opset of the graph.
        peaks: Largest magnitude of values by name, measured on example inputs.
        keep_io_types: The graph's inputs and outputs stay float32.
    """

    dtype: ir.DataType
    opset: int
    peaks: Mapping[str, float] = field(default_factory=dict)
    keep_io_types: bool = True

    @property
    def name(self) -> str:
        """As ONNX and numpy write it: float16, bfloat16."""
        return self.dtype.name.lower()

    @cached_property
    def largest(self) -> float:
        """Largest finite number."""
        return 65504.0 if self.dtype == ir.DataType.FLOAT16 else float.fromhex("0x1.fep127")

    @cached_property
    def smallest_normal(self) -> float:
        """Below it, numbers lose digits."""
        return 2.0**-14 if self.dtype == ir.DataType.FLOAT16 else 2.0**-126

    def allows(self, types: set[str]) -> bool:
        """Whether an operator's list of types has this one."""
        return f"tensor({self.name})" in types

    def overflows(self, value: ir.Value) -> str | None:
        """Why a value does not fit; None if it does, or if nothing is known of it."""
        constant = constant_of(value)
        if constant is not None:
            finite = np.abs(constant[np.isfinite(constant)])
            peak = float(finite.max(initial=0))
            return f"its constant {value.name} reaches {peak:.3g}" if peak > self.largest else None
        peak = self.peaks.get(str(value.name), 0.0)
        if self.dtype != ir.DataType.FLOAT16 or peak * HEADROOM <= self.largest:
            return None
        return f"{value.name} reaches {peak:.3g}, and {self.name} ends at {self.largest:.0f}"


def choose_kept(graph: ir.Graph, target: Target) -> dict[ir.Node, str]:
    """Decide for every node that has float32 inputs or outputs.

    Returns:
        Node -> reason, in graph order, of those that stay as they are.
    """
    nodes = [
        node
        for node in graph
        if any(map(is_float, node.outputs))
        or (
            any(map(is_float, node.inputs))
            and (node.op_type == "QuantizeLinear" or not takes_either(node))
        )
    ]
    kept = {node: reason for node in nodes if (reason := _reason(node, target))}
    kept.update(_products_of_kept(nodes, kept))
    for node in _decomposed_normalizations(nodes):
        kept.setdefault(node, "part of a normalization written in single operators")
    for node in _divisions_by_floored(nodes, target):
        kept.setdefault(node, "divides by a value whose floor is zero in 16 bit")
    kept.update(
        dict.fromkeys(_regions_between(nodes, kept, target), "lies between nodes in float32")
    )
    return {node: kept[node] for node in nodes if node in kept}


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is float32."""
    return value is not None and value.dtype == _FLOAT


def takes_either(node: ir.Node) -> bool:
    """Whether a node reads one float value and does not care of which type: Q, Cast, Shape, ArgMax, IsNaN ..."""
    if node.op_type in ("QuantizeLinear", "Cast"):
        return True
    return sum(map(is_float, node.inputs)) == 1 and not any(map(is_float, node.outputs))


def parameter_types(node: ir.Node, opset: int) -> Iterator[tuple[ir.Value | None, set[str], bool]]:
    """Every input and output of a node with the types that its operator allows there, and whether it is an input."""
    schema = defs.get_schema(node.op_type, opset, node.domain)
    for values, parameters, is_input in (
        (node.inputs, schema.inputs, True),
        (node.outputs, schema.outputs, False),
    ):
        for position, value in enumerate(values):
            parameter = parameters[
                min(position, len(parameters) - 1)
            ]  # the last one may be variadic
            yield value, set(parameter.types), is_input


def _reason(node: ir.Node, target: Target) -> str | None:
    rules = (_by_types, _by_operator, _by_scale, _by_size, _by_constant, _by_range)
    return next((reason for rule in rules if (reason := rule(node, target))), None)


def _by_types(node: ir.Node, target: Target) -> str | None:
    """What ONNX does not define in 16 bit, or what qdq cannot look into."""
    if node.domain not in ("", "ai.onnx") or not defs.has(node.op_type, target.opset, node.domain):
        return "not an operator of ONNX: its types are not known"
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    ):
        return "has a subgraph"
    if "dtype" in node.attributes:
        return "its attribute dtype says float32"
    parameters = list(parameter_types(node, target.opset))
    outputs = [types for value, types, is_input in parameters if is_float(value) and not is_input]
    if outputs:
        return (
            None
            if all(map(target.allows, outputs))
            else f"{node.op_type} has no {target.name} in ONNX {target.opset}"
        )
    inputs = [types for value, types, is_input in parameters if is_float(value) and is_input]
    if not any(map(target.allows, inputs)):
        return f"{node.op_type} has no {target.name} in ONNX {target.opset}"
    return None


def _by_operator(node: ir.Node, target: Target) -> str | None:
    if node.op_type in _NORMALIZATIONS:
        return "a normalization: its mean and variance lose digits in 16 bit"
    if node.op_type in _SOFTMAXES:
        return "softmax: its exponentials and their sum lose digits in 16 bit"
    if target.dtype == ir.DataType.FLOAT16 and node.op_type in _GROWING:
        return f"{node.op_type} of another input may leave the range of float16"
    if target.dtype == ir.DataType.FLOAT16 and node.op_type in _NEAR_ZERO:
        return f"{node.op_type} of numbers near zero, where float16 has few"
    return None


def _by_scale(node: ir.Node, target: Target) -> str | None:
    """R-SCALE: a scale that underflows or is subnormal, or codes of it that overflow."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    scale = constant_of(node.inputs[1])
    if scale is None:
        return None
    if (least := float(scale.min(initial=np.inf))) < target.smallest_normal:
        count = int((scale < target.smallest_normal).sum())
        return f"{count} of {scale.size} scales lie below the smallest normal {target.name}, down to {least:.3g}"
    if (most := 128 * float(scale.max(initial=0))) > target.largest:
        return f"its codes reach {most:.3g}, and {target.name} ends at {target.largest:.0f}"
    return None


def _by_size(node: ir.Node, target: Target) -> str | None:
    """A mean or sum of very many values."""
    if node.op_type not in _MEANS:
        return None
    data = node.inputs[0]
    shape = data.shape if data is not None else None
    if shape is None:
        return "a reduction over an unknown number of values"
    axes: Any = (
        range(2, len(shape)) if node.op_type == "GlobalAveragePool" else _axes(node, len(shape))
    )
    sizes = [shape[int(axis)] for axis in axes] if axes is not None else [None]
    if not all(isinstance(size, int) for size in sizes):
        return "a reduction over an unknown number of values"
    count = int(np.prod([int(size) for size in sizes if isinstance(size, int)]))
    return f"a reduction over {count} values" if count > LARGE_REDUCTION else None


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return list(range(rank))
    axes = constant_of(node.inputs[1])
    return None if axes is None else [int(axis) for axis in axes.ravel()]


def _by_constant(node: ir.Node, target: Target) -> str | None:
    """An epsilon that 16 bit makes zero; small weights and biases lose no more than others round."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Conv", "ConvTranspose", "Gemm"):
        return None
    for value in filter(is_float, node.inputs):
        constant = constant_of(value)
        if constant is None or value is None or constant.size != 1:
            continue
        peak = float(np.abs(constant).max(initial=0))
        if 0 < peak < target.smallest_normal:
            return f"its constant {value.name} of {peak:.3g} is too small for {target.name}"
    return None


def _by_range(node: ir.Node, target: Target) -> str | None:
    """Inputs count as well: what is kept in front of a node would overflow in its Cast."""
    if node.op_type == "QuantizeLinear":  # takes the type of its input
        return None
    values = [
        value for value in [*node.inputs, *node.outputs] if value is not None and is_float(value)
    ]
    return next((reason for value in values if (reason := target.overflows(value))), None)


def _products_of_kept(nodes: list[ir.Node], kept: Mapping[ir.Node, str]) -> dict[ir.Node, str]:
    """Products with an operand whose DQ is kept, and all that dequantizes their operands.

    TensorRT builds no int8 product then ("type mismatch between matmul operand scales"); but for a convolution whose
    weight alone has float32 scales, with a Cast behind its DQ.
    """
    found: dict[ir.Node, str] = {}
    while True:
        new: dict[ir.Node, str] = {}
        for product in (node for node in nodes if node.op_type in WEIGHTED_OPS):
            operands = [_dequantizing(value) for value in product.inputs[:2]]
            decisive = operands[:1] if is_op(product, "Conv", "ConvTranspose") else operands
            if not any(node in kept or node in found for path in decisive for node in path[-1:]):
                continue
            reason = "an operand of its product has float32 scales, and the scales of both must be of one type"
            behind = [node for path in operands for node in path]
            new |= {
                node: reason
                for node in (*behind, product)
                if node not in kept and node not in found
            }
        if not new:
            return found
        found |= new


def _dequantizing(value: ir.Value | None) -> list[ir.Node]:
    """The copies between a DQ and a value, then the DQ; nothing if there is none."""
    nodes: list[ir.Node] = []
    while (node := _producer(value)) is not None:
        nodes.append(node)
        if is_op(node, "DequantizeLinear"):
            return nodes
        if not is_op(node, *COPY_OPS):
            break
        value = node.inputs[0]
    return []


def _decomposed_normalizations(nodes: list[ir.Node]) -> Iterator[ir.Node]:
    """All of x - mean(x), its square, the mean of that, epsilon, the root, and the division by it."""
    for root in nodes:
        if root.op_type != "Sqrt":
            continue
        variance = _producer(root.inputs[0])
        before: list[ir.Node | None] = [root]
        if variance is not None and variance.op_type in ("Add", "Max", "Clip"):
            before.append(variance)
            variance = next((made for value in variance.inputs if (made := _producer(value))), None)
        if variance is None or variance.op_type not in ("ReduceMean", "ReduceSum"):
            continue
        square = _producer(variance.inputs[0])
        before += [variance, square]
        if square is not None and square.op_type in ("Mul", "Pow"):
            centered = _producer(square.inputs[0])
            if centered is not None and centered.op_type == "Sub":
                before += [centered, _producer(centered.inputs[1])]
        yield from (
            node for node in before if node is not None and node.op_type not in WEIGHTED_OPS
        )
        for user in root.outputs[0].consumers():
            yield user
            if user.op_type == "Reciprocal":
                yield from user.outputs[0].consumers()


def _divisions_by_floored(nodes: list[ir.Node], target: Target) -> Iterator[ir.Node]:
    """Behind max(|x|, 1e-12): copies, roots and products of it up to the division, which 16 bit makes one by zero."""
    floors = [
        node for node in nodes if is_op(node, "Clip", "Max", "Add") and _by_constant(node, target)
    ]
    pending = [(node, False) for node in floors]  # and whether 1 / x has been taken already
    seen: set[ir.Node] = set()
    while pending:
        node, is_inverse = pending.pop()
        for user in node.outputs[0].consumers():
            if user in seen or not is_op(user, "Div", "Mul", "Sqrt", "Reciprocal", *COPY_OPS):
                continue
            seen.add(user)
            yield user
            if not is_op(user, "Div") and not (is_inverse and is_op(user, "Mul")):
                pending.append((user, is_inverse or is_op(user, "Reciprocal")))


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _regions_between(
    nodes: list[ir.Node], kept: Mapping[ir.Node, str], target: Target
) -> set[ir.Node]:
    """Nodes where 16 bit would only add a Cast in front and one behind: all around them is float32 anyway.

    Matrix products are none of them: they belong in 16 bit.
    """
    inside = {
        node
        for node in nodes
        if node not in kept and node.op_type not in (*WEIGHTED_OPS, "QuantizeLinear")
    }
    while open_ := {node for node in inside if not _is_closed(node, inside | kept.keys(), target)}:
        inside -= open_
    found: set[ir.Node] = set()
    frontier = list(
        kept
    )  # only what hangs together with a kept node: float32 inputs and outputs are no reason
    while frontier:
        node = frontier.pop()
        producers = [made for value in node.inputs if (made := _producer(value)) is not None]
        users = [user for value in node.outputs for user in value.consumers()]
        new = (inside & {*producers, *users}) - found
        found |= new
        frontier += new
    return found


def _is_closed(node: ir.Node, float32: AbstractSet[ir.Node], target: Target) -> bool:
    """Whether it reads float32 only, and only float32 reads it; what takes either type decides nothing."""
    for value in node.inputs:
        if value is None or not is_float(value) or constant_of(value) is not None:
            continue
        producer = value.producer()
        if not (target.keep_io_types if producer is None else producer in float32):
            return False
    for value in filter(is_float, node.outputs):
        if value.is_graph_output() and not target.keep_io_types:
            return False
        if any(
            user.graph is node.graph and user not in float32 and not takes_either(user)
            for user in value.consumers()
        ):
            return False
    return True
