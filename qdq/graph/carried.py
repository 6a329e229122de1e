"""What a model loses on its way through onnx-ir, which has no place for some parts of ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir


def list_lost_fields(proto: onnx.ModelProto, model: ir.Model) -> list[str]:
    """The fields of a file that would not come back, such as `graph.sparse_initializer`.

    Args:
        proto: What stands in the file.
        model: What onnx-ir made of it, unchanged.
    """
    try:
        copy = ir.to_proto(model)
    except Exception as error:  # onnx-ir wraps whatever it finds
        return [f"all ({type(error).__name__})"]
    return list(dict.fromkeys(_compare(proto, copy, "")))


def _compare(original: Any, copy: Any, path: str) -> Iterator[str]:
    """Fields of a protobuf message that its copy lacks or has otherwise."""
    present = {field.name: value for field, value in copy.ListFields()}
    for field, value in original.ListFields():
        name = f"{path}{field.name}"
        if field.type != field.TYPE_MESSAGE:
            if (
                value and value != "ai.onnx" and present.get(field.name) != value
            ):  # "" and "ai.onnx" are one domain
                yield name
        elif field.name not in present:
            yield name
        elif field.message_type.name == "TensorProto":
            continue  # numbers written in another way
        elif hasattr(value, "ListFields"):
            yield from _compare(value, present[field.name], f"{name}.")
        elif len(value) != len(present[field.name]):
            yield name
        else:
            for item, other in zip(value, present[field.name], strict=True):
                yield from _compare(item, other, f"{name}.")
