"""Q/DQ at the wrong edge: QDQ111, QDQ112 and QDQ116."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COMMUTING_OPS, MOVING_OPS, GraphView, is_op, name_of

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


def _producing_product(
    view: GraphView, value: ir.Value | None, kinds: tuple[str, ...]
) -> ir.Node | None:
    """The int8 product of the kinds named that a value comes straight from: BatchNormalization and factors fuse."""
    node = view.source(value, _EPILOGUE)
    while node is not None and is_op(node, "Mul"):
        computed = [operand for operand in node.inputs if view.is_computed(operand)]
        if len(computed) != 1:
            return None
        node = view.source(computed[0], _EPILOGUE)
    if node is None or not is_op(node, *kinds):
        return None
    return node if all(view.is_quantized(operand) for operand in node.inputs[:2]) else None


def _before_pair(view: GraphView, value: ir.Value | None) -> ir.Value | None:
    """What is quantized, where a value comes straight from Q and DQ; else the value."""
    dequantizer = view.source(value, ())
    if dequantizer is None or not is_op(dequantizer, "DequantizeLinear"):
        return value
    quantizer = view.source(dequantizer.inputs[0], ())
    return (
        quantizer.inputs[0]
        if quantizer is not None and is_op(quantizer, "QuantizeLinear")
        else value
    )


@register_rule(
    "QDQ111",
    "warning",
    "Q/DQ between a product and its activation, or the constant added to it (R-ACT).",
    "The activation would be fused into the product. With Q/DQ between them it is a kernel of its own, and is "
    "computed from rounded values.",
    "[doc] recommendation 2; [probe] SiLU, HardSwish, GELU and ReLU6 fuse with the Q behind them",
)
def _epilogue_is_split(view: GraphView) -> Iterator[Flaw]:
    for node in view.select(*_ACTIVATIONS):
        if _splits(view, node.inputs[0]):
            yield _split(node)
    for node in view.select("Add"):
        plain = [value for value in node.inputs if view.is_computed(value)]
        if len(plain) == 1 and _splits(view, plain[0]):
            yield _split(node)


def _splits(view: GraphView, value: ir.Value | None) -> bool:
    before = _before_pair(view, value)
    return before is not value and _producing_product(view, before, _PRODUCTS) is not None


def _split(node: ir.Node) -> Flaw:
    message = f"Q/DQ stand between a product and this {node.op_type} (R-ACT)"
    return Flaw(name_of(node), message, f"quantize behind the {node.op_type}, not in front of it.")


@register_rule(
    "QDQ112",
    "warning",
    "A residual Add without Q/DQ on its shortcut, or with Q/DQ on the branch of the convolution (R-ADD-1, R-ADD-2).",
    "The other operand of an Add decides the output type of the fused Conv + Add. With a float shortcut it is float, "
    "and with Q/DQ behind the convolution nothing fuses.",
    "[doc] recommendation 4; [src] pytorch-quantization's ResNet, BEVFusion, ModelOpt (R-ADD-3); [iss] 1992",
)
def _shortcut_is_wrong(view: GraphView) -> Iterator[Flaw]:
    for node in view.select("Add"):
        if len(node.inputs) != 2 or not all(view.is_computed(value) for value in node.inputs):
            continue
        if any(value is None or value.is_graph_input() for value in node.inputs) or _broadcasts(
            view, node
        ):
            continue
        branch = _find_branch(view, node)
        if branch is None:
            continue
        faults = []
        # a DQ -> MaxPool in front of an Add costs TensorRT-RTX a second, float MaxPool
        if not view.is_quantized(node.inputs[1 - branch], MOVING_OPS):
            faults.append("no Q/DQ on its shortcut")
        if _before_pair(view, node.inputs[branch]) is not node.inputs[branch]:
            faults.append("Q/DQ on the branch of the convolution")
        if faults:
            message = f"a residual Add has {' and '.join(faults)} (R-ADD-1)"
            fix = "quantize the shortcut only, with the quantizer of the block's input where they are one tensor."
            yield Flaw(name_of(node), message, fix)


def _broadcasts(view: GraphView, add: ir.Node) -> bool:
    """Whether the operands surely have different shapes: then it is no residual Add."""
    shapes = [view.shape(value) for value in add.inputs]
    if shapes[0] is None or shapes[1] is None:
        return False
    if len(shapes[0]) != len(shapes[1]):
        return True
    return any(
        a != b for a, b in zip(shapes[0], shapes[1], strict=True) if a is not None and b is not None
    )


def _find_branch(view: GraphView, add: ir.Node) -> int | None:
    """Which input of an Add is the branch of the convolution; None if it is no residual Add."""
    sources = [_before_pair(view, value) for value in add.inputs]
    products = [_producing_product(view, value, _CONVOLUTIONS) for value in sources]
    if products[0] is products[1]:
        return None
    if products[0] is None or products[1] is None:
        branch = 0 if products[0] is not None else 1
        product = products[branch]
        # A convolution that the other side comes from is the beginning of the block, not its end (ConvNeXt).
        if product is None or _depends_on(view, sources[1 - branch], product):
            return None
        # Nor is there a shortcut where the branch begins right behind a convolution, be it in float (R-ADD-2).
        begin = view.source(sources[1 - branch], _EPILOGUE)
        is_begin = (
            begin is not None
            and is_op(begin, *_CONVOLUTIONS)
            and _depends_on(view, sources[branch], begin)
        )
        return None if is_begin else branch
    lengths = _lengths_to_ancestor(view, products[0], products[1])
    if lengths is None:
        return None
    if lengths[0] != lengths[1]:
        return 0 if lengths[0] > lengths[1] else 1
    # Two branches of one length: either may be the shortcut, so the one that is quantized is taken for it.
    return 0 if view.is_quantized(add.inputs[1]) else 1


def _depends_on(view: GraphView, value: ir.Value | None, ancestor: ir.Node) -> bool:
    values, seen = [value], set()
    while values:
        value = values.pop()
        node = value.producer() if value is not None else None
        if node is ancestor:
            return True
        if node is not None and node not in seen and view.position(node) > view.position(ancestor):
            seen.add(node)
            values += node.inputs
    return False


def _lengths_to_ancestor(
    view: GraphView, first: ir.Node, second: ir.Node
) -> tuple[int, int] | None:
    """Nodes between each of two nodes and the last one that both depend on, Q/DQ not counted (R-ADD-2).

    None if one of them depends on the other. Where they share only the model's input, the way to it counts.
    """
    distances = _distances(view, first), _distances(view, second)
    common = distances[0].keys() & distances[1].keys()
    if first in common or second in common:
        return None
    if not common:
        return max(distances[0].values()), max(distances[1].values())
    last = max(common, key=view.position)
    return distances[0][last], distances[1][last]


def _distances(view: GraphView, start: ir.Node) -> dict[ir.Node, int]:
    """Longest way back from a node to each one that it depends on, in nodes other than Q and DQ."""
    needed, stack = {start}, [start]
    while stack:
        for value in stack.pop().inputs:
            node = value.producer() if value is not None else None
            if node is not None and node not in needed and view.is_computed(node.outputs[0]):
                needed.add(node)
                stack.append(node)
    found = {start: 0}
    for node in sorted(needed, key=view.position, reverse=True):
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in needed and producer is not None:
                step = 0 if is_op(producer, *_PAIR) else 1
                found[producer] = max(found.get(producer, 0), found[node] + step)
    return found


@register_rule(
    "QDQ116",
    "warning",
    "AveragePool, Mul or Add with int8 inputs, and no Q behind it.",
    "Operators without weights run in int8 only with int8 in and out. This one dequantizes, computes in float and has "
    "gained a rounding. The residual Add with one quantized side is what TensorRT wants, and is not meant (R-ADD-1).",
    "[doc] recommendation 5 (R-AP, R-ADD-4, R-MUL)",
)
def _output_is_float(view: GraphView) -> Iterator[Flaw]:
    through = COMMUTING_OPS | {"BatchNormalization", "Concat", *_ACTIVATIONS}
    for node in view.select("AveragePool", "GlobalAveragePool", "Mul", "Add"):
        count = 1 if "Pool" in node.op_type else 2
        values = node.inputs[:count]
        if not all(
            view.is_computed(v) and view.dequantizer(v, MOVING_OPS) is not None for v in values
        ):
            continue
        if node.op_type == "Add" and _find_branch(view, node) is not None:  # QDQ112
            continue
        behind = list(view.reached(node.outputs[0], through))
        if not any(is_op(reader, "QuantizeLinear") for reader in behind):
            message = f"{node.op_type} has int8 inputs, and no Q stands behind it"
            yield Flaw(
                name_of(node),
                message,
                "quantize its output too, or take the pairs in front of it away.",
            )
