"""How to express a newer operator in an older ONNX opset: one rule for each change.

The rules follow the ONNX operator changelog (onnx/docs/Changelog.md). Each looks at a node and plans its edit; nothing
is edited before all nodes of a model are planned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import defs

from qdq.graph.edits import is_needed
from qdq.graph.pairs import constant_of, input_of

HIGHEST = 19
"""The newest opset whose changes have a rule here."""

Edit = Callable[[], object]
# Returns the edit of a node, None if it needs none; raises UnfitError if the older operator cannot do the same.
Rule = Callable[[ir.Node], "Edit | None"]


class UnfitError(Exception):
    """The reason why an older opset cannot express a node."""


@cache
def schema_of(op_type: str, opset: int) -> Any:
    """The definition of an operator that is in force at an opset.

    Returns:
        An `onnx.defs.OpSchema`; None if the operator has no definition yet.
    """
    try:
        return defs.get_schema(op_type, opset)
    except defs.SchemaError:
        return None


# --- rules ----------------------------------------------------------------------------------------------------------


def _keep(node: ir.Node) -> None:
    """Do not change a node: only its list of types grew, which is checked for all nodes."""


def _without(**neutral_values: Any) -> Rule:
    """The rule for new attributes: they are removed if the older operator does the same without them.

    Args:
        neutral_values: For each attribute, the value with which it has no effect; for a list, the value of all its
            elements. None: there is no such value.
    """

    def rule(node: ir.Node) -> Edit | None:
        present_names = [name for name in neutral_values if name in node.attributes]
        for name in present_names:
            value = _attribute(node, name)
            elements = list(value) if isinstance(value, tuple) else [value]
            if set(elements) != {neutral_values[name]}:
                shown_value = elements if isinstance(value, tuple) else value
                raise UnfitError(f"{name}={shown_value}")

        return partial(_remove_attributes, node, *present_names)

    return rule


def _reshape_14(node: ir.Node) -> Edit | None:
    """In 13 a 0 in the shape copies a size, and in 14 too unless allowzero is set.

    Both do the same if the shape cannot contain 0.
    """
    if _attribute(node, "allowzero", 0) and not _copies_no_size(node):
        raise UnfitError("allowzero=1 with a shape that may contain 0")
    return partial(_remove_attributes, node, "allowzero")


def _copies_no_size(node: ir.Node) -> bool:
    """Whether a Reshape with allowzero=1 gives the same result without it.

    If its shape is computed, look at its output: with allowzero, a 0 in the shape gives a size of 0 there. So a size
    that is a number other than 0 rules it out, and a size that equals that of the input may be copied.
    """
    data, shape = node.inputs
    sizes = _integers_of(shape)
    if sizes is not None:
        return 0 not in sizes

    input_shape = data.shape if data else None
    output_shape = node.outputs[0].shape
    if input_shape is None or output_shape is None:
        return False

    for position, size in enumerate(output_shape):
        if isinstance(size, int):
            is_safe = size != 0
        elif position < len(input_shape):
            is_safe = _is_same_name(size, input_shape[position])
        else:
            is_safe = False
        if not is_safe:
            return False

    return True


def _is_same_name(size: ir.SymbolicDim, input_size: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions have the same name; a dimension without name equals no other.

    Args:
        size: Dimension of the output.
        input_size: Dimension of the input at the same position.
    """
    if size.value is None or not isinstance(input_size, ir.SymbolicDim):
        return False
    return size.value == input_size.value


def _shape_15(node: ir.Node) -> Edit | None:
    """15 has start and end; a Slice takes that part here, with the same clamping and counting from the end."""
    start = _attribute(node, "start", 0)
    end = _attribute(node, "end")
    if start == 0 and end is None:
        return partial(_remove_attributes, node, "start")
    if end is None:
        end = np.iinfo(np.int64).max

    def edit() -> None:
        shape = _node_like(node, "Shape", node.inputs)
        shape.outputs[0].type = node.outputs[0].type

        starts = _integer_constant(node, "starts", [start])
        ends = _integer_constant(node, "ends", [end])
        slice_inputs = [shape.outputs[0], starts.outputs[0], ends.outputs[0]]
        slice_node = _node_like(node, "Slice", slice_inputs)
        _replace(node, [shape, starts, ends, slice_node])

    return edit


def _split_18(node: ir.Node) -> Edit | None:
    """With num_outputs, 18 makes parts of the same size, rounded up, and a smaller last part.

    13 needs the sizes of the parts, so the size must be known.
    """
    count = _attribute(node, "num_outputs")
    if count is None:
        return None

    data = node.inputs[0]
    axis = _attribute(node, "axis", 0)
    size = data.shape[axis] if data and data.shape else None
    if not isinstance(size, int):
        raise UnfitError("num_outputs on a size that is not known")

    part = -(-size // count)  # rounded up
    last_part = size - part * (count - 1)
    if last_part < 1 or count != len(node.outputs):
        raise UnfitError(f"num_outputs={count} on a size of {size}")

    def edit() -> None:
        parts = [part] * (count - 1) + [last_part]
        sizes = _integer_constant(node, "split", parts)
        _graph_of(node).insert_before(node, sizes)
        _remove_attributes(node, "num_outputs")
        node.resize_inputs(2)
        node.replace_input_with(1, sizes.outputs[0])

    return edit


def _reduce_18(node: ir.Node) -> Edit | None:
    """Axes are an input in 18 and an attribute in 13.

    Without axes both reduce all of them, unless noop_with_empty_axes says that 18 reduces none.
    """
    axes_input = input_of(node, 1)
    axes = [] if axes_input is None else _integers_of(axes_input)
    if axes is None:
        raise UnfitError("axes that are not constant")
    if not axes and _attribute(node, "noop_with_empty_axes", 0):
        raise UnfitError("noop_with_empty_axes=1 without axes")

    def edit() -> None:
        _remove_attributes(node, "noop_with_empty_axes")
        node.resize_inputs(1)
        if axes:
            node.attributes.add(ir.AttrInt64s("axes", axes))
        if axes_input is not None:
            _remove_if_unused(axes_input)

    return edit


def _pad_18(node: ir.Node) -> Edit | None:
    """13 has no axes: it needs pads for every axis."""
    if any(node.inputs[3:]):
        raise UnfitError("an axes input")

    input_count = min(3, len(node.inputs))
    return partial(node.resize_inputs, input_count)


def _scatter_18(node: ir.Node) -> None:
    """The reductions max and min are new; the others are those of 16."""
    reduction = _attribute(node, "reduction", "none")
    if reduction in ("max", "min"):
        raise UnfitError(f"reduction={reduction}")


def _roi_align_16(node: ir.Node) -> Edit | None:
    """10 does what 16 calls output_half_pixel, which is not the default of 16."""
    mode = _attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode != "output_half_pixel":
        raise UnfitError(f"coordinate_transformation_mode={mode}")
    return partial(_remove_attributes, node, "coordinate_transformation_mode")


def _average_pool_19(node: ir.Node) -> Edit | None:
    """19 has dilations, and counts the last window with ceil_mode in another way."""
    if _attribute(node, "ceil_mode", 0):
        raise UnfitError("ceil_mode=1")
    return _without(dilations=1)(node)


def _lacking(name: str, value: str) -> Rule:
    """The rule for a new value of an attribute."""

    def rule(node: ir.Node) -> None:
        if _attribute(node, name) in (value, value.encode()):
            raise UnfitError(f"{name}={value}")

    return rule


def _expand(node: ir.Node) -> Edit:
    """Replace an elementwise operator by the older operators of its ONNX definition."""
    body = schema_of(node.op_type, HIGHEST).function_body

    def edit() -> None:
        values = dict(zip(body.input, node.inputs, strict=True))
        steps = []
        for definition in body.node:
            inputs = [values[name] for name in definition.input]
            step = _node_like(node, definition.op_type, inputs)
            for attribute in definition.attribute:
                step.attributes[attribute.name] = ir.from_proto(attribute)

            result = step.outputs[0]
            result.type = node.outputs[0].type
            result.shape = node.outputs[0].shape
            values[definition.output[0]] = result
            steps.append(step)

        _replace(node, steps)

    return edit


# Only the types of these grew.
_MORE_TYPES = (
    ("Add", 14),
    ("BatchNormalization", 15),
    ("Constant", 19),
    ("CumSum", 14),
    ("DequantizeLinear", 19),
    ("Div", 14),
    ("Equal", 19),
    ("GreaterOrEqual", 16),
    ("Identity", 14),
    ("Identity", 16),
    ("Identity", 19),
    ("If", 16),
    ("If", 19),
    ("LeakyRelu", 16),
    ("LessOrEqual", 16),
    ("Loop", 16),
    ("Loop", 19),
    ("Mul", 14),
    ("PRelu", 16),
    ("Pow", 15),
    ("Relu", 14),
    ("Reshape", 19),
    ("Scan", 16),
    ("Scan", 19),
    ("Shape", 19),
    ("Size", 19),
    ("Sub", 14),
    ("Where", 16),
)
# The axes of these became an input; those of ReduceSum have been one since 13.
_REDUCTIONS = (
    ("ReduceL1", 18),
    ("ReduceL2", 18),
    ("ReduceLogSum", 18),
    ("ReduceLogSumExp", 18),
    ("ReduceMax", 18),
    ("ReduceMean", 18),
    ("ReduceMin", 18),
    ("ReduceProd", 18),
    ("ReduceSumSquare", 18),
)

RULES: dict[tuple[str, int], Rule] = {
    **dict.fromkeys(_MORE_TYPES, _keep),
    **dict.fromkeys(_REDUCTIONS, _reduce_18),
    ("AveragePool", 19): _average_pool_19,
    ("BatchNormalization", 14): _without(training_mode=0),
    ("Cast", 19): _without(saturate=1),
    ("GRU", 14): _without(layout=0),
    ("HardSwish", 14): _expand,
    ("LSTM", 14): _without(layout=0),
    ("LpPool", 18): _without(ceil_mode=0, dilations=1),
    ("Mish", 18): _expand,
    ("Pad", 18): _pad_18,
    ("Pad", 19): _lacking("mode", "wrap"),
    ("QuantizeLinear", 19): _without(saturate=1),
    ("RNN", 14): _without(layout=0),
    ("Reshape", 14): _reshape_14,
    ("Resize", 18): _without(antialias=0, axes=None, keep_aspect_ratio_policy="stretch"),
    ("Resize", 19): _lacking("coordinate_transformation_mode", "half_pixel_symmetric"),
    ("RoiAlign", 16): _roi_align_16,
    ("ScatterElements", 16): _without(reduction="none"),
    ("ScatterElements", 18): _scatter_18,
    ("ScatterND", 16): _without(reduction="none"),
    ("ScatterND", 18): _scatter_18,
    ("Shape", 15): _shape_15,
    ("Split", 18): _split_18,
}
"""(operator, opset that changed it or introduced it) -> how to express it in the opset before.

A change without a rule cannot be undone; tests/graph/test_opset.py compares the table with all changes in ONNX.
"""


# --- queries --------------------------------------------------------------------------------------------------------


def _attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute.

    Raises:
        UnfitError: A function takes it from its caller, so it can be anything.
    """
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.is_ref():
        raise UnfitError(f"{name} is an argument of the function")
    return attribute.value


def _integers_of(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant, in one list.

    Returns:
        None for a value that is computed.
    """
    array = constant_of(value)
    if array is None:
        return None
    return [int(number) for number in array.ravel()]


def _graph_of(node: ir.Node) -> ir.Graph:
    """The graph or function that contains a node."""
    assert node.graph is not None  # noqa: S101  # the pass reads it from a graph
    return node.graph


# --- edits ----------------------------------------------------------------------------------------------------------


def _remove_attributes(node: ir.Node, *names: str) -> None:
    """Remove these attributes from a node, if it has them."""
    for name in names:
        node.attributes.pop(name, None)


def _remove_if_unused(value: ir.Value) -> None:
    """Remove a constant that nothing reads any more.

    Args:
        value: An initializer, or the output of a Constant, whose node is then removed.
    """
    if is_needed(value):
        return

    producer = value.producer()
    if producer is not None:
        _graph_of(producer).remove(producer, safe=True)
    elif value.graph is not None:
        value.graph.initializers.pop(str(value.name), None)


def _node_like(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], suffix: str = ""
) -> ir.Node:
    """A node that does part of the work of another one, as its name and metadata show.

    Args:
        node: The node that is replaced.
        op_type: Its operator.
        inputs: Its inputs.
        suffix: End of its name; its operator if left out.

    Returns:
        The node, which is not in a graph yet.
    """
    suffix = suffix or op_type
    part = ir.node(
        op_type,
        inputs,
        name=f"{node.name}_{suffix}",
        metadata_props=dict(node.metadata_props),
    )
    part.outputs[0].name = f"{node.outputs[0].name}_{suffix}"
    return part


def _integer_constant(node: ir.Node, suffix: str, numbers: list[int]) -> ir.Node:
    """A Constant of int64, which can be in functions and subgraphs too."""
    constant = _node_like(node, "Constant", [], suffix)
    output = constant.outputs[0]
    tensor = ir.tensor(np.array(numbers, dtype=np.int64), name=output.name)
    constant.attributes.add(ir.AttrTensor("value", tensor))
    output.type = ir.TensorType(tensor.dtype)
    output.shape = ir.Shape([len(numbers)])
    return constant


def _replace(node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Replace a node by several nodes; the output of the last one replaces its output."""
    ir.convenience.replace_nodes_and_values(
        _graph_of(node), node, [node], nodes, node.outputs, nodes[-1].outputs
    )
