"""Q/DQ at the wrong edge: QDQ111, QDQ112 and QDQ116."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import (
    COMMUTING_OPS,
    MOVING_OPS,
    GraphView,
    is_op,
    name_of,
    producer_of,
    producers_of,
)

_ACTIVATIONS = (
    "Celu",
    "Clip",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mish",
    "PRelu",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Swish",
    "Tanh",
)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = (*_CONVOLUTIONS, "Gemm", "MatMul")
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_EPILOGUE = ("BatchNormalization", "Identity", "Cast")
_AFTER_OPERATOR = COMMUTING_OPS | {"BatchNormalization", "Concat", *_ACTIVATIONS}


@register_rule(
    "QDQ111",
    "warning",
    "Q/DQ between a product and its activation, or the constant added to it (R-ACT).",
    "The activation would be fused into the product. With Q/DQ between them it becomes a separate kernel and works on "
    "rounded values.",
    "[doc] recommendation 2; [probe] SiLU, HardSwish, GELU and ReLU6 fuse with the Q after them",
)
def _epilogue_is_split(view: GraphView) -> Iterator[Flaw]:
    """Name the activation or the Add."""
    for node in view.select(*_ACTIVATIONS):
        yield from _check_epilogue(view, node, node.inputs[0])
    for node in view.select("Add"):
        computed = view.computed_inputs(node)
        if len(computed) == 1:
            yield from _check_epilogue(view, node, computed[0])


def _check_epilogue(view: GraphView, node: ir.Node, value: ir.Value | None) -> Iterator[Flaw]:
    """A pair between an int8 product and a node that could be fused into it.

    Args:
        view: The graph.
        node: An activation, or an Add of a constant.
        value: Its input that is not a constant.
    """
    quantized = _skip_pair(view, value)
    if quantized is value:
        return
    if _find_product(view, quantized, _PRODUCTS) is not None:
        yield Flaw(
            node=name_of(node),
            message=f"Q/DQ are between a product and this {node.op_type} (R-ACT)",
            fix=f"quantize after the {node.op_type}, not before it.",
        )


def _skip_pair(view: GraphView, value: ir.Value | None) -> ir.Value | None:
    """The tensor that a pair quantizes, if a value comes directly from the pair.

    Args:
        view: The graph.
        value: The output of the pair, or any other value.

    Returns:
        The input of the Q; the value itself if it does not come directly from Q and DQ.
    """
    dequantizer = view.source(value, ())
    if not is_op(dequantizer, "DequantizeLinear"):
        return value
    quantizer = view.source(dequantizer.inputs[0], ())
    if not is_op(quantizer, "QuantizeLinear"):
        return value
    return quantizer.inputs[0]


def _find_product(
    view: GraphView, value: ir.Value | None, op_types: tuple[str, ...]
) -> ir.Node | None:
    """The int8 product that a value comes directly from; BatchNormalization and constant factors are fused.

    Args:
        view: The graph.
        value: Where to start.
        op_types: The operators that count as products.

    Returns:
        The product; None if the value comes from another operator, or from a product in float.
    """
    node = view.source(value, _EPILOGUE)
    while is_op(node, "Mul"):
        computed = view.computed_inputs(node)
        if len(computed) != 1:
            return None
        node = view.source(computed[0], _EPILOGUE)

    if is_op(node, *op_types) and view.has_quantized_operands(node):
        return node
    return None


@register_rule(
    "QDQ112",
    "warning",
    "A residual Add without Q/DQ on its shortcut, or with Q/DQ on the branch of the convolution (R-ADD-1, R-ADD-2).",
    "The other operand of an Add decides the output type of the fused Conv + Add. With a float shortcut it is float, "
    "and with Q/DQ after the convolution nothing fuses.",
    "[doc] recommendation 4; [src] pytorch-quantization's ResNet, BEVFusion, ModelOpt (R-ADD-3); [iss] 1992",
)
def _shortcut_is_wrong(view: GraphView) -> Iterator[Flaw]:
    """Name the Add, if it joins the branch of an int8 convolution and a shortcut.

    Sums after an activation, of different shapes, with a constant or with an input of the model are not residual
    (R-ADD-4, R-ADD-5). After a convolution in FP8 the sum is float anyway (R-FP8).
    """
    for node in view.select("Add"):
        if not _may_be_residual(view, node):
            continue
        branch = _find_branch(view, node)
        if branch is None or _is_fp8_branch(view, node.inputs[branch]):
            continue

        faults = _list_faults(view, node.inputs[branch], node.inputs[1 - branch])
        if faults:
            yield Flaw(
                node=name_of(node),
                message=f"a residual Add has {' and '.join(faults)} (R-ADD-1)",
                fix="quantize the shortcut only, with the quantizer of the block's input if they are the same tensor.",
            )


def _is_fp8_branch(view: GraphView, branch: ir.Value | None) -> bool:
    """Whether an operand of an Add comes from a convolution in FP8."""
    convolution = _find_product(view, _skip_pair(view, branch), _CONVOLUTIONS)
    if convolution is None:
        return False
    return view.code_word(view.dequantizer(convolution.inputs[0])) == "FP8"


def _may_be_residual(view: GraphView, add: ir.Node) -> bool:
    """Whether both operands are computed by nodes, and their shapes may be equal."""
    operands = view.computed_inputs(add)
    if len(operands) != 2:
        return False
    if any(operand.is_graph_input() for operand in operands):
        return False
    return _may_have_one_shape(view, operands[0], operands[1])


def _may_have_one_shape(view: GraphView, first: ir.Value, second: ir.Value) -> bool:
    """Whether two values may have equal shapes; False only if that is known."""
    shape_of_first, shape_of_second = view.shape(first), view.shape(second)
    if shape_of_first is None or shape_of_second is None:
        return True
    if len(shape_of_first) != len(shape_of_second):
        return False

    return all(map(_may_be_equal, shape_of_first, shape_of_second))


def _may_be_equal(first: int | None, second: int | None) -> bool:
    """Whether two sizes may be equal; one that is not known may be any size."""
    return first == second or None in (first, second)


def _list_faults(view: GraphView, branch: ir.Value | None, shortcut: ir.Value | None) -> list[str]:
    """List the faults of the operands of a residual Add.

    Args:
        view: The graph.
        branch: The operand that comes from the convolution.
        shortcut: The other operand.

    Returns:
        Noun phrases; empty if there are none.
    """
    faults = []
    # A DQ -> MaxPool before an Add costs TensorRT-RTX a second, float MaxPool: no pair reaches through it here.
    if not view.is_quantized(shortcut, MOVING_OPS):
        faults.append("no Q/DQ on its shortcut")
    if _skip_pair(view, branch) is not branch:
        faults.append("Q/DQ on the branch of the convolution")
    return faults


def _find_branch(view: GraphView, add: ir.Node) -> int | None:
    """Find the branch of the convolution among the operands of an Add.

    Returns:
        The position of the input; None if it is not a residual Add.
    """
    first, second = _skip_pair(view, add.inputs[0]), _skip_pair(view, add.inputs[1])
    product_of_first = _find_product(view, first, _CONVOLUTIONS)
    product_of_second = _find_product(view, second, _CONVOLUTIONS)
    if product_of_first is product_of_second:  # one product for both, or none at all
        return None
    if product_of_first is not None and product_of_second is not None:
        return _choose_branch(view, add, product_of_first, product_of_second)

    if product_of_first is not None and _is_branch(view, product_of_first, first, second):
        return 0
    if product_of_second is not None and _is_branch(view, product_of_second, second, first):
        return 1
    return None


def _is_branch(
    view: GraphView, product: ir.Node, branch: ir.Value | None, shortcut: ir.Value | None
) -> bool:
    """Whether the only convolution before an Add is the end of a block.

    Args:
        view: The graph.
        product: The convolution.
        branch: The operand of the Add that comes from it.
        shortcut: The other operand.
    """
    # if the shortcut comes from the convolution, the block begins with that convolution (ConvNeXt)
    if _depends_on(view, shortcut, product):
        return False

    beginning = view.source(shortcut, _EPILOGUE)
    if not is_op(beginning, *_CONVOLUTIONS):
        return True
    # there is no shortcut if the branch begins directly after a convolution, even one in float (R-ADD-2)
    return not _depends_on(view, branch, beginning)


def _choose_branch(view: GraphView, add: ir.Node, first: ir.Node, second: ir.Node) -> int | None:
    """Which of two convolutions before an Add ends the branch: the one with the longer path (R-ADD-2).

    If both paths have the same length, either side may be the shortcut: the quantized side is taken as the shortcut.

    Returns:
        The position of the input; None if one convolution depends on the other.
    """
    lengths = _lengths_to_ancestor(view, first, second)
    if lengths is None:
        return None
    length_of_first, length_of_second = lengths
    if length_of_first > length_of_second:
        return 0
    if length_of_first < length_of_second:
        return 1
    return 0 if view.is_quantized(add.inputs[1]) else 1


def _depends_on(view: GraphView, value: ir.Value | None, ancestor: ir.Node) -> bool:
    """Whether a value is computed from the output of a node.

    Args:
        view: The graph, whose order bounds the search: no node reads a later one.
        value: The value; None, for an input that is left out, depends on nothing.
        ancestor: The node.
    """
    start = producer_of(value)
    if start is None:
        return False

    visited, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        if node is ancestor:
            return True
        if view.position(node) < view.position(ancestor):  # it cannot read the ancestor
            continue

        new = set(producers_of(node)) - visited
        visited |= new
        waiting += new
    return False


def _lengths_to_ancestor(
    view: GraphView, first: ir.Node, second: ir.Node
) -> tuple[int, int] | None:
    """Nodes between each of two nodes and the last one that both depend on, Q/DQ not counted (R-ADD-2).

    Returns:
        Both lengths; if the nodes share only the model's input, the lengths of the paths to it. None if one node
        depends on the other.
    """
    from_first, from_second = _distances(view, first), _distances(view, second)
    common = from_first.keys() & from_second.keys()
    if first in common or second in common:
        return None
    if not common:
        return max(from_first.values()), max(from_second.values())
    ancestor = max(common, key=view.position)
    return from_first[ancestor], from_second[ancestor]


def _distances(view: GraphView, start: ir.Node) -> dict[ir.Node, int]:
    """The longest path from a node back to each node that it depends on.

    Args:
        view: The graph.
        start: Where the paths begin.

    Returns:
        Node -> length of the path, in nodes other than Q and DQ; 0 for the node itself.
    """
    ancestors = _list_ancestors(view, start)
    distances = {start: 0}
    for node in sorted(ancestors, key=view.position, reverse=True):
        for producer in producers_of(node):
            if producer not in ancestors:
                continue
            step = 0 if is_op(producer, *_PAIR) else 1
            distance = distances[node] + step
            distances[producer] = max(distances.get(producer, 0), distance)
    return distances


def _list_ancestors(view: GraphView, start: ir.Node) -> set[ir.Node]:
    """A node and the nodes that it depends on, without those of constants."""
    ancestors, waiting = {start}, [start]
    while waiting:
        for producer in producers_of(waiting.pop()):
            if producer in ancestors:
                continue
            if not view.is_computed(producer.outputs[0]):
                continue
            ancestors.add(producer)
            waiting.append(producer)
    return ancestors


@register_rule(
    "QDQ116",
    "warning",
    "AveragePool, Mul or Add with quantized inputs, but no Q after it.",
    "Operators without weights run in int8 only with int8 in and out. This one dequantizes, computes in float and "
    "adds a rounding. The rule does not apply to a residual Add with one quantized side, which is what TensorRT wants "
    "(R-ADD-1).",
    "[doc] recommendation 5 (R-AP, R-ADD-4, R-MUL)",
)
def _output_is_float(view: GraphView) -> Iterator[Flaw]:
    """Name the operator, if all of its inputs are int8."""
    for node in view.select("AveragePool", "GlobalAveragePool", "Mul", "Add"):
        if not _has_int8_inputs(view, node):
            continue
        if node.op_type == "Add" and _find_branch(view, node) is not None:  # QDQ112
            continue
        if _reaches_quantizer(view, node):
            continue

        word = view.code_word(view.dequantizer(node.inputs[0], MOVING_OPS))
        yield Flaw(
            node=name_of(node),
            message=f"{node.op_type} has {word} inputs, but no Q follows it",
            fix="quantize its output too, or remove the pairs before it.",
        )


def _has_int8_inputs(view: GraphView, node: ir.Node) -> bool:
    """Whether all operands of a node are computed and come from a DQ."""
    for value in node.inputs[:2]:
        if not view.is_computed(value):
            return False
        if view.dequantizer(value, MOVING_OPS) is None:
            return False
    return True


def _reaches_quantizer(view: GraphView, node: ir.Node) -> bool:
    """Whether the output of a node is quantized, directly or after operators that are fused or commute."""
    readers = view.reached(node.outputs[0], _AFTER_OPERATOR)
    return any(is_op(reader, "QuantizeLinear") for reader in readers)
