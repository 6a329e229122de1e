"""A model of ONNX opset 18 written as one of opset 13 to 17: with the same meaning, or not at all.

torch's exporter writes opset 18 and above. An operator needs work here only where its definition changed in between;
`onnx.defs` knows when. The rules below follow the ONNX operator changelog (onnx/docs/Changelog.md): one table entry
is one operator and the opset that changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, repeat
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import defs

from qdq.errors import ArgumentError, ExportError
from qdq.graph.pairs import constant_of
from qdq.text import group_names, list_names

LOWEST, HIGHEST = 13, 18  # Q/DQ have an axis from 13 on; what changed after 18 has no rules here

_Edit = Callable[[], object]
# Looks at a node and says what to edit, if anything; raises _UnfitError where the older operator cannot say the same.
_Rule = Callable[[ir.Node], "_Edit | None"]


class LowerOpset(ir.passes.InPlacePass):
    """Lower a model from opset 18 or below to an older one, in place; a model that is there already stays.

    Looks into subgraphs and functions. Types and, for Split, shapes of values are needed where an operator changed:
    torch writes them, `onnx_ir.passes.common.ShapeInferencePass` adds them to files of others.

    Args:
        target: The opset to arrive at, 13 to 18.

    Raises:
        ArgumentError: A target out of range.
        ExportError: The model is of an opset above 18, or has operators that the target cannot express; it is
            unchanged then.
    """

    def __init__(self, target: int) -> None:
        super().__init__()
        if not LOWEST <= target <= HIGHEST:
            raise ArgumentError(
                f"target is {target}; it must be {LOWEST} to {HIGHEST}.", f"use {LOWEST}."
            )
        self._target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check all nodes, then edit all: a refused model is left as it was."""
        bodies = [body for body in _bodies(model) if body.opset_imports.get("", 0) > self._target]
        if (found := max((body.opset_imports[""] for body in bodies), default=0)) > HIGHEST:
            raise ExportError(
                f"the model is of opset {found}; only {HIGHEST} and below can be lowered.",
                f"export it with opset {HIGHEST} first.",
            )
        edits, obstacles = _plan(bodies, self._target)
        if obstacles:
            lowest = next(
                n for n in range(self._target + 1, HIGHEST + 1) if not _plan(bodies, n)[1]
            )
            raise ExportError(
                f"opset {self._target} cannot express the model: {_describe(obstacles)}; "
                f"the lowest opset that can is {lowest}.",
                f"export with opset {lowest} or above.",
            )
        for edit in edits:
            edit()
        for body in bodies:
            body.opset_imports[""] = self._target
            for node in body.all_nodes():
                node.version = (
                    None  # torch notes the definition it used; now it is the one of the imports
                )
        return ir.passes.PassResult(model, modified=bool(bodies))


class _UnfitError(Exception):
    """Why a node has no equal at the older opset."""


def _bodies(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """All that has opset imports of its own."""
    return chain([model.graph], model.functions.values())


def _plan(
    bodies: Iterable[ir.Graph | ir.Function], target: int
) -> tuple[list[_Edit], list[tuple[ir.Node, str]]]:
    """What to edit for a target, and which nodes stand in the way and why; changes nothing."""
    edits: list[_Edit] = []
    obstacles: list[tuple[ir.Node, str]] = []
    for body in bodies:
        for node in body.all_nodes():
            if node.domain == "":
                try:
                    edits += _edits_of(node, body.opset_imports[""], target)
                except _UnfitError as reason:
                    obstacles.append((node, str(reason)))
    return edits, obstacles


def _edits_of(node: ir.Node, source: int, target: int) -> list[_Edit]:
    """Walk back through the definitions of the operator, from the one in force at `source` to that at `target`."""
    edits = []
    first = schema = _schema(node.op_type, source)
    while schema is not None and schema.since_version > target:
        older = _schema(node.op_type, schema.since_version - 1)
        rule = _RULES.get((node.op_type, schema.since_version))
        if rule is None:
            raise _UnfitError(
                f"{'new' if older is None else 'changed'} in opset {schema.since_version}"
            )
        if edit := rule(node):
            edits.append(edit)
        schema = older
    if schema is not None and schema is not first:
        _require_types(node, schema)
    return edits


@cache
def _schema(op_type: str, opset: int) -> Any:
    """The definition of an operator that is in force at an opset; None where it has none."""
    try:
        return defs.get_schema(op_type, opset)
    except defs.SchemaError:
        return None


def _require_types(node: ir.Node, schema: Any) -> None:
    """Refuse types that the older definition does not list, or that it wants to be the same and are not."""
    bound: dict[str, str] = {}
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for value, parameter in zip(
            values, _repeat_variadic(parameters), strict=False
        ):  # a rule removes the rest
            if value is None:
                continue
            found = _type_name(value.type)
            if found is None:
                raise _UnfitError(f"the type of {value.name} is not known")
            if found not in parameter.types:
                raise _UnfitError(f"{found} came later")
            if parameter.is_homogeneous and bound.setdefault(parameter.type_str, found) != found:
                raise _UnfitError(f"{bound[parameter.type_str]} together with {found} came later")


def _repeat_variadic(parameters: Sequence[Any]) -> Iterator[Any]:
    is_variadic = (
        bool(parameters) and parameters[-1].option == defs.OpSchema.FormalParameterOption.Variadic
    )
    return chain(parameters, repeat(parameters[-1])) if is_variadic else iter(parameters)


def _type_name(found: ir.TypeProtocol | None) -> str | None:
    """A type as operator definitions write it: `tensor(float)`, `seq(tensor(int64))`."""
    if isinstance(found, ir.TensorType):
        return f"tensor({found.dtype.name.lower()})"
    if isinstance(found, ir.SequenceType | ir.OptionalType):
        inner = _type_name(found.elem_type)
        return inner and f"{'seq' if isinstance(found, ir.SequenceType) else 'optional'}({inner})"
    return None


def _describe(obstacles: list[tuple[ir.Node, str]]) -> str:
    """Operators and why, each with the names of its nodes."""
    groups = group_names(
        (f"{node.op_type} ({reason})", node.name or "a node without name")
        for node, reason in obstacles
    )
    return ", ".join(f"{group} at {list_names(names, 5)}" for group, names in groups.items())


def _same(node: ir.Node) -> None:
    """Only the list of types grew, and `_require_types` looks at that."""


def _without(**neutral: Any) -> _Rule:
    """The rule of attributes that came new: they go where they say what the older operator does anyway.

    Args:
        neutral: That value of each attribute; of all its elements for a list. None: there is none.
    """

    def rule(node: ir.Node) -> _Edit | None:
        present = [name for name in neutral if name in node.attributes]
        for name in present:
            value = _attribute(node, name)
            if (set(value) if isinstance(value, tuple) else {value}) != {neutral[name]}:
                raise _UnfitError(f"{name}={list(value) if isinstance(value, tuple) else value}")
        return lambda: _remove_attributes(node, *present)

    return rule


def _reshape_14(node: ir.Node) -> _Edit | None:
    """13 copies a size where the shape says 0, and so does 14 unless allowzero; the same if no 0 can be there."""
    if _attribute(node, "allowzero", 0) and not _copies_no_size(node):
        raise _UnfitError("allowzero=1 with a shape that may hold 0")
    return lambda: _remove_attributes(node, "allowzero")


def _copies_no_size(node: ir.Node) -> bool:
    """Whether a Reshape with allowzero=1 gives the same without.

    Where its shape is computed, look at what comes out: with allowzero, a 0 in the shape is a size of 0 there. So a
    size that is a number other than 0 rules it out, and one that is the input's own may as well be copied.
    """
    data, shape = node.inputs
    if (wanted := _constant(shape)) is not None:
        return 0 not in wanted
    before, after = data.shape if data else None, node.outputs[0].shape
    if before is None or after is None:
        return False
    return all(
        size != 0
        if isinstance(size, int)
        else position < len(before) and _is_same_size(size, before[position])
        for position, size in enumerate(after)
    )


def _is_same_size(one: Any, other: Any) -> bool:
    """Both dimensions are one and the same name; a dimension without name is like no other."""
    return isinstance(other, ir.SymbolicDim) and one.value is not None and one.value == other.value


def _shape_15(node: ir.Node) -> _Edit | None:
    """Slice the shape where start and end do; Slice clamps and counts from the end in the same way."""
    start, end = _attribute(node, "start", 0), _attribute(node, "end")
    if start == 0 and end is None:
        return lambda: _remove_attributes(node, "start")

    def edit() -> None:
        shape = _like(node, "Shape", node.inputs)
        starts = _int64s(node, "starts", [start])
        ends = _int64s(node, "ends", [np.iinfo(np.int64).max if end is None else end])
        inputs = [shape.outputs[0], starts.outputs[0], ends.outputs[0]]
        shape.outputs[0].type = node.outputs[0].type
        _replace(node, [shape, starts, ends, _like(node, "Slice", inputs)])

    return edit


def _split_18(node: ir.Node) -> _Edit | None:
    """num_outputs makes parts of the same size, rounded up, and a smaller last one; 13 takes the sizes."""
    if (count := _attribute(node, "num_outputs")) is None:
        return None
    data = node.inputs[0]
    size = data.shape[_attribute(node, "axis", 0)] if data and data.shape else None
    if not isinstance(size, int):
        raise _UnfitError("num_outputs on a size that is not known")
    part = -(-size // count)
    if (last := size - part * (count - 1)) < 1 or count != len(node.outputs):
        raise _UnfitError(f"num_outputs={count} on a size of {size}")

    def edit() -> None:
        sizes = _int64s(node, "split", [part] * (count - 1) + [last])
        _graph_of(node).insert_before(node, sizes)
        _remove_attributes(node, "num_outputs")
        node.resize_inputs(2)
        node.replace_input_with(1, sizes.outputs[0])

    return edit


def _reduce_18(node: ir.Node) -> _Edit | None:
    """From 18 on axes is an input, before an attribute; no axes are all axes, unless noop_with_empty_axes."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    axes = [] if value is None else _constant(value)
    if axes is None:
        raise _UnfitError("axes that are no constant")
    if not axes and _attribute(node, "noop_with_empty_axes", 0):
        raise _UnfitError("noop_with_empty_axes=1 without axes")

    def edit() -> None:
        _remove_attributes(node, "noop_with_empty_axes")
        node.resize_inputs(1)
        if axes:
            node.attributes.add(ir.AttrInt64s("axes", axes))
        if value is not None:
            _remove_if_unused(value)

    return edit


def _pad_18(node: ir.Node) -> _Edit | None:
    """13 has no axes: pads are those of every axis."""
    if any(node.inputs[3:]):
        raise _UnfitError("an input axes")
    return lambda: node.resize_inputs(min(3, len(node.inputs)))


def _scatter_18(node: ir.Node) -> None:
    """Max and min are new among the reductions."""
    if (reduction := _attribute(node, "reduction", "none")) in ("max", "min"):
        raise _UnfitError(f"reduction={reduction}")


def _roi_align_16(node: ir.Node) -> _Edit | None:
    """10 does what 16 calls output_half_pixel, and the default of 16 is another."""
    if (
        mode := _attribute(node, "coordinate_transformation_mode", "half_pixel")
    ) != "output_half_pixel":
        raise _UnfitError(f"coordinate_transformation_mode={mode}")
    return lambda: _remove_attributes(node, "coordinate_transformation_mode")


def _expand(node: ir.Node) -> _Edit:
    """Replace an elementwise operator by the older ones that ONNX defines it by."""
    body = _schema(node.op_type, HIGHEST).function_body

    def edit() -> None:
        values = dict(zip(body.input, node.inputs, strict=True))
        steps = []
        for part in body.node:
            step = _like(node, part.op_type, [values[name] for name in part.input])
            step.attributes.update({entry.name: ir.from_proto(entry) for entry in part.attribute})
            result = step.outputs[0]
            result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
            values[part.output[0]] = result
            steps.append(step)
        _replace(node, steps)

    return edit


_REDUCTIONS = (
    "L1",
    "L2",
    "LogSum",
    "LogSumExp",
    "Max",
    "Mean",
    "Min",
    "Prod",
    "SumSquare",
)  # ReduceSum: since 13

# (operator, opset that changed it or brought it) -> how to say it in the opset before.
# What is missing cannot be said; tests/graph/test_opset.py compares the table with all that ONNX changed.
_RULES: dict[tuple[str, int], _Rule] = {
    **dict.fromkeys(
        [("Add", 14), ("Sub", 14), ("Mul", 14), ("Div", 14), ("Relu", 14), ("CumSum", 14)], _same
    ),
    **dict.fromkeys(
        [("Identity", 14), ("Identity", 16), ("Pow", 15), ("BatchNormalization", 15)], _same
    ),
    **dict.fromkeys([("GreaterOrEqual", 16), ("LessOrEqual", 16), ("Where", 16)], _same),
    **dict.fromkeys(
        [("LeakyRelu", 16), ("PRelu", 16), ("If", 16), ("Loop", 16), ("Scan", 16)], _same
    ),
    **dict.fromkeys([(f"Reduce{kind}", 18) for kind in _REDUCTIONS], _reduce_18),
    **dict.fromkeys([("LSTM", 14), ("GRU", 14), ("RNN", 14)], _without(layout=0)),
    **dict.fromkeys([("ScatterND", 18), ("ScatterElements", 18)], _scatter_18),
    **dict.fromkeys([("ScatterND", 16), ("ScatterElements", 16)], _without(reduction="none")),
    ("BatchNormalization", 14): _without(training_mode=0),
    ("HardSwish", 14): _expand,
    ("LpPool", 18): _without(ceil_mode=0, dilations=1),
    ("Mish", 18): _expand,
    ("Pad", 18): _pad_18,
    ("Reshape", 14): _reshape_14,
    ("Resize", 18): _without(antialias=0, axes=None, keep_aspect_ratio_policy="stretch"),
    ("RoiAlign", 16): _roi_align_16,
    ("Shape", 15): _shape_15,
    ("Split", 18): _split_18,
}


def _attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute; one that a function takes from its caller can be anything."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.is_ref():
        raise _UnfitError(f"{name} is an argument of the function")
    return attribute.value


def _remove_attributes(node: ir.Node, *names: str) -> None:
    for name in names:
        node.attributes.pop(name, None)


def _constant(value: ir.Value | None) -> list[int] | None:
    """The whole numbers of a constant."""
    array = constant_of(value)
    return None if array is None else [int(number) for number in array.ravel()]


def _remove_if_unused(value: ir.Value) -> None:
    """Take away a constant that nothing reads any more."""
    if value.uses() or value.is_graph_output():
        return
    if (producer := value.producer()) is not None:
        _graph_of(producer).remove(producer, safe=True)
    elif value.graph is not None:
        value.graph.initializers.pop(str(value.name), None)


def _graph_of(node: ir.Node) -> ir.Graph:
    assert node.graph is not None  # noqa: S101  # it was found in one
    return node.graph


def _like(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], suffix: str = ""
) -> ir.Node:
    """A node in place of part of another, with a name that says so."""
    suffix = suffix or op_type
    made = ir.node(
        op_type, inputs, name=f"{node.name}_{suffix}", metadata_props=dict(node.metadata_props)
    )
    made.outputs[0].name = f"{node.outputs[0].name}_{suffix}"
    return made


def _int64s(node: ir.Node, suffix: str, numbers: list[int]) -> ir.Node:
    """A Constant, which functions and subgraphs can hold too."""
    made = _like(node, "Constant", [], suffix)
    tensor = ir.tensor(np.array(numbers, dtype=np.int64), name=made.outputs[0].name)
    made.attributes.add(ir.AttrTensor("value", tensor))
    made.outputs[0].type, made.outputs[0].shape = (
        ir.TensorType(tensor.dtype),
        ir.Shape([len(numbers)]),
    )
    return made


def _replace(node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put nodes where one was; the output of the last takes its place."""
    ir.convenience.replace_nodes_and_values(
        _graph_of(node), node, [node], nodes, node.outputs, nodes[-1].outputs
    )
