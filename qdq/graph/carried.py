"""Parts of a model that onnx-ir cannot represent and would lose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir

_DEFAULT_DOMAIN = "ai.onnx"
_SHAPES = "graph.value_info"


def list_lost_fields(proto: onnx.ModelProto, model: ir.Model) -> list[str]:
    """The fields of a file that onnx-ir would not write back, such as `graph.sparse_initializer`.

    Args:
        proto: The content of the file.
        model: The model that onnx-ir read from it, unchanged.

    Returns:
        Paths of fields, each once; `all (ERROR)` if onnx-ir cannot write the model at all.
    """
    try:
        copy = ir.to_proto(model)
    except Exception as error:  # onnx-ir wraps any error in its own type
        return [f"all ({type(error).__name__})"]

    paths = _compare_messages(proto, copy, "")
    return list(dict.fromkeys(paths))


def _compare_messages(original: Any, copy: Any, prefix: str) -> Iterator[str]:
    """The fields of a protobuf message that its copy lacks or has with another value.

    Args:
        original: The message.
        copy: Its copy, of the same type.
        prefix: Path of the message, with a dot at its end.
    """
    copied_values = {field.name: value for field, value in copy.ListFields()}
    for field, value in original.ListFields():
        path = f"{prefix}{field.name}"
        copied_value = copied_values.get(field.name)
        if field.type != field.TYPE_MESSAGE:
            if value != copied_value and not _is_default(value):
                yield path
        elif field.name not in copied_values:
            yield path
        elif field.message_type.name != "TensorProto":
            # Tensors are the same numbers, stored differently.
            yield from _compare_values(value, copied_value, path)


def _is_default(value: Any) -> bool:
    """Whether a plain field has the meaning of a field that is left out.

    The domain of ONNX's operators is written "" or "ai.onnx", and onnx-ir writes the first.
    """
    return not value or value == _DEFAULT_DOMAIN


def _compare_values(value: Any, copied_value: Any, path: str) -> Iterator[str]:
    """The differences of a field with messages.

    Args:
        value: A message or a list of messages.
        copied_value: The value in the copy.
        path: Path of the field.
    """
    is_single = hasattr(value, "ListFields")
    if is_single:
        yield from _compare_messages(value, copied_value, f"{path}.")
        return

    if path.endswith(_SHAPES):
        value, copied_value = _select_common(value, copied_value)
    if len(value) != len(copied_value):
        yield path
        return

    for item, copied_item in zip(value, copied_value, strict=True):
        yield from _compare_messages(item, copied_item, f"{path}.")


def _select_common(values: Any, copied_values: Any) -> tuple[list[Any], list[Any]]:
    """The types and shapes that both have, in the order of the first.

    onnx-ir also writes those of initializers, and leaves out those of values that the graph does not have.
    """
    copied = {value.name: value for value in copied_values}
    common = [value for value in values if value.name in copied]
    return common, [copied[value.name] for value in common]
