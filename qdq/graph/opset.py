"""Rewrite a model of ONNX opset 18 or 19 as an older opset from 13 on: with the same meaning, or not at all.

torch's exporter writes opset 18 and above. An operator needs work here only if its definition changed in between;
`onnx.defs` knows when. `graph.opset_rules` has one rule for each such change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import onnx_ir as ir
from onnx import defs

from qdq.errors import ArgumentError, ExportError
from qdq.graph.opset_rules import HIGHEST as HIGHEST
from qdq.graph.opset_rules import RULES, Edit, UnfitError, schema_of
from qdq.text import group_names, list_names

LOWEST = 13
"""The first opset where Q/DQ have an axis."""

LOWEST_OF_TORCH = 18
"""The oldest opset that torch's exporter writes."""

DEFAULT_OPSET = 19
"""The opset that export writes by default: the lowest one with 16-bit scales."""

NEWEST_OPSET = 23
"""The newest opset to write: TensorRT 10 and ONNX Runtime do not read opsets far above it."""

FIRST_WITH_HALF_SCALES = 19
"""The first opset where the scales of Q/DQ may be float16 or bfloat16."""

_Body = ir.Graph | ir.Function


class LowerOpset(ir.passes.InPlacePass):
    """Lower a model from opset 19 or below to an older one, in place; a model of the target opset does not change.

    Subgraphs and functions are lowered too. Types and, for Split, shapes of values are needed if an operator changed:
    torch writes them, and `onnx_ir.passes.common.ShapeInferencePass` adds them to files of other tools.

    Args:
        target: The target opset, 13 to 19.

    Raises:
        ArgumentError: The target is out of range.
        ExportError: The model is of an opset above 19, or has operators that the target cannot express; it is
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
        """Plan all edits, then make them: a model that is refused does not change."""
        bodies = _list_bodies_above(model, self._target)
        _require_rules(bodies)

        plan = _plan_edits(bodies, self._target)
        if plan.obstacles:
            raise self._explain(bodies, plan.obstacles)

        for edit in plan.edits:
            edit()
        for body in bodies:
            _set_opset(body, self._target)
        return ir.passes.PassResult(model, modified=bool(bodies))

    def _explain(self, bodies: Sequence[_Body], obstacles: list[_Obstacle]) -> ExportError:
        """The error that names the obstacles and the lowest opset without any.

        The search always ends, because the opset of the model itself has no obstacles.

        Args:
            bodies: The bodies to lower.
            obstacles: The nodes that the target cannot express.
        """
        lowest = self._target + 1
        while _plan_edits(bodies, lowest).obstacles:
            lowest += 1

        return ExportError(
            f"opset {self._target} cannot express the model: {_describe(obstacles)}; "
            f"the lowest opset that can is {lowest}.",
            f"export with opset {lowest} or above.",
        )


def _list_bodies_above(model: ir.Model, target: int) -> list[_Body]:
    """The main graph and the functions whose opset is above the target.

    Subgraphs are not listed: they have the opset of the graph that contains them.
    """
    bodies: list[_Body] = [model.graph, *model.functions.values()]
    return [body for body in bodies if body.opset_imports.get("", 0) > target]


def _require_rules(bodies: Sequence[_Body]) -> None:
    """Refuse a model of an opset without rules for its changes."""
    opsets = [body.opset_imports[""] for body in bodies]
    opset = max(opsets, default=0)
    if opset > HIGHEST:
        raise ExportError(
            f"the model is of opset {opset}; only {HIGHEST} and below can be lowered.",
            f"export it with opset {HIGHEST} first.",
        )


def _set_opset(body: _Body, opset: int) -> None:
    """Write an opset into a body and drop the operator versions that torch stored in its nodes."""
    body.opset_imports[""] = opset
    for node in body.all_nodes():
        node.version = None


# --- planning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Obstacle:
    """A node that the target cannot express.

    Args:
        node: The node.
        reason: Why.
    """

    node: ir.Node
    reason: str


@dataclass(frozen=True)
class _Plan:
    """The edits for an older opset, or the reasons against it.

    Args:
        edits: Functions that edit the nodes, in graph order.
        obstacles: The nodes that the opset cannot express.
    """

    edits: list[Edit] = field(default_factory=list)
    obstacles: list[_Obstacle] = field(default_factory=list)


def _plan_edits(bodies: Sequence[_Body], target: int) -> _Plan:
    """Plan the edits for a target; changes nothing.

    Args:
        bodies: Graphs and functions, each with its subgraphs.
        target: The target opset.
    """
    plan = _Plan()
    for body in bodies:
        for node in body.all_nodes():
            if node.domain != "":
                continue
            try:
                plan.edits.extend(_edits_of(node, body.opset_imports[""], target))
            except UnfitError as error:
                plan.obstacles.append(_Obstacle(node, str(error)))

    return plan


def _edits_of(node: ir.Node, source: int, target: int) -> list[Edit]:
    """The edits of one node.

    They follow the definitions of its operator back, from the one in force at `source` to the one at `target`.

    Raises:
        UnfitError: A change in between has no rule, or its rule does not fit the node.
    """
    edits = []
    newest_schema = schema_of(node.op_type, source)
    schema = newest_schema
    while schema is not None and schema.since_version > target:
        older_schema = schema_of(node.op_type, schema.since_version - 1)
        rule = RULES.get((node.op_type, schema.since_version))
        if rule is None:
            change = "new" if older_schema is None else "changed"
            raise UnfitError(f"{change} in opset {schema.since_version}")

        edit = rule(node)
        if edit is not None:
            edits.append(edit)
        schema = older_schema

    if schema is not None and schema is not newest_schema:
        _require_types(node, schema)
    return edits


def _describe(obstacles: list[_Obstacle]) -> str:
    """Operators and why they do not fit, each with the names of its nodes."""
    entries = []
    for obstacle in obstacles:
        group = f"{obstacle.node.op_type} ({obstacle.reason})"
        entries.append((group, obstacle.node.name or "a node without name"))

    descriptions = []
    for group, names in group_names(entries).items():
        descriptions.append(f"{group} at {list_names(names, 5)}")
    return ", ".join(descriptions)


# --- types ----------------------------------------------------------------------------------------------------------


def _require_types(node: ir.Node, schema: Any) -> None:
    """Refuse a node whose types do not fit an older definition of its operator.

    Args:
        node: The node.
        schema: The definition, an `onnx.defs.OpSchema`.

    Raises:
        UnfitError: The definition does not list a type, or requires two types to be equal that are not.
    """
    bound_types: dict[str, str] = {}
    _require_types_of(node.inputs, schema.inputs, bound_types)
    _require_types_of(node.outputs, schema.outputs, bound_types)


def _require_types_of(
    values: Sequence[ir.Value | None], parameters: Sequence[Any], bound_types: dict[str, str]
) -> None:
    """Refuse the inputs or the outputs of a node whose types do not fit.

    Args:
        values: The inputs or outputs.
        parameters: Their definitions. There may be fewer, because a rule removes the inputs that came later.
        bound_types: Type variable of the definition, such as `T` -> its type; is filled here.
    """
    for value, parameter in zip(values, _repeat_variadic(parameters), strict=False):
        if value is None:
            continue

        type_name = _type_name(value.type)
        if type_name is None:
            raise UnfitError(f"the type of {value.name} is not known")
        if type_name not in parameter.types:
            raise UnfitError(f"{type_name} came later")
        if not parameter.is_homogeneous:
            continue

        bound_type = bound_types.setdefault(parameter.type_str, type_name)
        if bound_type != type_name:
            raise UnfitError(f"{bound_type} together with {type_name} came later")


def _repeat_variadic(parameters: Sequence[Any]) -> Iterator[Any]:
    """The parameters of a definition; a variadic last one is repeated without end."""
    variadic = defs.OpSchema.FormalParameterOption.Variadic
    if not parameters or parameters[-1].option != variadic:
        return iter(parameters)
    return chain(parameters, repeat(parameters[-1]))


def _type_name(value_type: ir.TypeProtocol | None) -> str | None:
    """A type as in operator definitions: `tensor(float)`, `seq(tensor(int64))`.

    Args:
        value_type: Type of a value.

    Returns:
        None for a type that is not known.
    """
    if isinstance(value_type, ir.TensorType):
        return f"tensor({value_type.dtype.name.lower()})"
    if not isinstance(value_type, ir.SequenceType | ir.OptionalType):
        return None

    element_name = _type_name(value_type.elem_type)
    if element_name is None:
        return None
    container = "seq" if isinstance(value_type, ir.SequenceType) else "optional"
    return f"{container}({element_name})"
