"""Does a node have the inputs, outputs and attributes of its operator?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir


def describe_misfit(node: ir.Node, opset: int) -> str:
    """What a node of ONNX's own operators lacks or has too much of; empty if it fits, or if onnx does not know it.

    Args:
        node: The node.
        opset: Of the model; with a number that onnx does not know, its newest one counts.
    """
    schema = _find_schema(node.op_type, opset) if node.domain == "" else None
    if schema is None:
        return ""
    counts = (
        ("inputs", len(node.inputs), schema.min_input, schema.max_input),
        ("outputs", len(node.outputs), schema.min_output, schema.max_output),
    )
    for what, count, least, most in counts:
        if not least <= count <= most:
            expected = str(least) if least == most else f"{least} or more"
            return f"{node.op_type} has {count} {what}, expected {expected}"
    for formal, value in zip(schema.inputs, node.inputs, strict=False):
        if value is None and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
            return f"{node.op_type} has no input {formal.name}"
    return _describe_attribute(node, schema)


def _describe_attribute(node: ir.Node, schema: Any) -> str:
    for name, attribute in node.attributes.items():
        if name not in schema.attributes:
            return f"{node.op_type} has no attribute {name}"
        expected = schema.attributes[name].type
        if attribute.type.value != expected.value:
            return f"attribute {name} of {node.op_type} is {attribute.type.name}, expected {expected.name}"
    for name, formal in schema.attributes.items():
        if formal.required and name not in node.attributes:
            return f"{node.op_type} lacks the attribute {name}"
    return ""


@lru_cache(maxsize=4096)
def _find_schema(op_type: str, opset: int) -> Any:
    newest = onnx.defs.onnx_opset_version()
    try:
        return onnx.defs.get_schema(op_type, min(opset, newest) if opset > 0 else newest)
    except Exception:  # onnx.defs.SchemaError, which is no public name of every version
        return None
