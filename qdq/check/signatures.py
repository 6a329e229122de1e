"""Check whether a node has the inputs, outputs and attributes of its operator."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

_REQUIRED = onnx.defs.OpSchema.FormalParameterOption.Single


def describe_misfit(node: ir.Node, opset: int) -> str:
    """Describe why a node does not fit its operator, if that is one of ONNX's own.

    Args:
        node: The node.
        opset: Opset of the model; for a number that onnx does not know, its newest opset is used.

    Returns:
        A text; empty if the node fits its operator, or if onnx does not know the operator.
    """
    if node.domain != "":
        return ""
    schema = _find_schema(node.op_type, opset)
    if schema is None:
        return ""

    descriptions = (
        _describe_count(node, "inputs", len(node.inputs), schema.min_input, schema.max_input),
        _describe_count(node, "outputs", len(node.outputs), schema.min_output, schema.max_output),
        _describe_missing_input(node, schema),
        _describe_attribute(node, schema),
        _describe_missing_attribute(node, schema),
    )
    return next(filter(None, descriptions), "")


def _describe_count(node: ir.Node, values: str, count: int, least: int, most: int) -> str:
    """A text about the number of inputs or outputs, if it is wrong.

    Args:
        node: The node.
        values: "inputs" or "outputs".
        count: How many it has.
        least: How many it must have.
        most: How many it may have.
    """
    if least <= count <= most:
        return ""
    expected = f"{least}" if least == most else f"{least} or more"
    return f"{node.op_type} has {count} {values}, expected {expected}"


def _describe_missing_input(node: ir.Node, schema: Any) -> str:
    """The first input that is left out but must not be."""
    for formal, value in zip(schema.inputs, node.inputs, strict=False):
        if value is None and formal.option == _REQUIRED:
            return f"{node.op_type} has no input {formal.name}"
    return ""


def _describe_attribute(node: ir.Node, schema: Any) -> str:
    """The first attribute that the operator does not have, or that has another type."""
    for name, attribute in node.attributes.items():
        if name not in schema.attributes:
            return f"{node.op_type} has no attribute {name}"
        expected = schema.attributes[name].type
        if attribute.type.value != expected.value:
            return f"attribute {name} of {node.op_type} is {attribute.type.name}, expected {expected.name}"
    return ""


def _describe_missing_attribute(node: ir.Node, schema: Any) -> str:
    """The first required attribute that the node does not have."""
    for name, formal in schema.attributes.items():
        if formal.required and name not in node.attributes:
            return f"{node.op_type} lacks the attribute {name}"
    return ""


@lru_cache(maxsize=4096)
def _find_schema(op_type: str, opset: int) -> Any:
    """The definition of an operator of ONNX; None if onnx has none."""
    newest = onnx.defs.onnx_opset_version()
    version = newest
    if 0 < opset < newest:
        version = opset
    try:
        return onnx.defs.get_schema(op_type, version)
    except Exception:  # onnx.defs.SchemaError, which is not a public name of every version
        return None
