"""An ONNX file as protobuf and as graph, read as far as it can be read; what is wrong with it, rules say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qdq.check.parity import require_file
from qdq.check.tensors import TensorFault, find_tensor_faults
from qdq.errors import CheckError
from qdq.graph.carried import list_lost_fields
from qdq.graph.shapes import silence_onnx_ir
from qdq.graph.validate import first_line
from qdq.text import list_names


@dataclass(frozen=True)
class LoadedModel:
    """What `load_onnx` returns.

    Args:
        path: The file.
        proto: Its content; texts that are not UTF-8 are made readable.
        model: The graph.
        is_utf8: Whether all texts were UTF-8.
        tensor_faults: Constants whose data cannot be read.
    """

    path: Path
    proto: onnx.ModelProto
    model: ir.Model
    is_utf8: bool
    tensor_faults: tuple[TensorFault, ...]


def load_onnx(path: Path) -> LoadedModel:
    """Read a file. Nothing is said here of whether it is sound.

    Raises:
        CheckError: The file is missing, empty, truncated, or no ONNX.
    """
    require_file(path)
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf and the file system each have their own
        raise invalid(path, first_line(error)) from error
    if not proto.HasField("graph"):
        raise invalid(path, "it holds no graph")
    if not proto.graph.node:
        raise CheckError(
            f"{path} holds no ONNX graph.", "export it again: the file may be empty or truncated."
        )
    is_utf8 = not _make_readable(proto)
    faults = find_tensor_faults(proto, path.parent)
    for fault in faults:
        fault.tensor.ClearField(
            "external_data"
        )  # onnx-ir refuses the file for a location that is none
        fault.tensor.ClearField("data_location")
    try:
        with silence_onnx_ir():
            model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, os.path.dirname(path))
    except Exception as error:  # onnx-ir wraps what it finds, each time once more
        reason = (
            f"the constant {faults[0].name}: {faults[0].message}"
            if faults
            else first_line(_root_cause(error))
        )
        raise invalid(path, reason) from error
    return LoadedModel(path, proto, model, is_utf8, tuple(faults))


def require_whole(loaded: LoadedModel) -> None:
    """Refuse a file of which something would be lost when it is written again.

    Args:
        loaded: The file, its model not changed yet.

    Raises:
        CheckError: Something would be lost.
    """
    reasons = list_lost_fields(loaded.proto, loaded.model)
    if not loaded.is_utf8:
        reasons.append("texts that are not UTF-8")
    if loaded.tensor_faults:
        reasons.append(f"the constant {loaded.tensor_faults[0].name}, whose data cannot be read")
    if reasons:
        raise CheckError(
            f"{loaded.path} holds what would be lost when it is written again: {list_names(reasons, 3)}.",
            "nothing is written; export the model without it (sparse weights as dense ones, no training graph).",
        )


def invalid(path: Path, reason: str) -> CheckError:
    """The error of a file that is no valid ONNX."""
    return CheckError(f"{path} is no valid ONNX file: {reason}.", "export it again.")


def _root_cause(error: BaseException) -> Exception:
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _make_readable(message: Any) -> bool:
    """Replace texts of a protobuf message that are not UTF-8, which it gives as bytes; whether there were any."""
    changed = False
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for item in [value] if hasattr(value, "ListFields") else value:
                changed |= _make_readable(item)
        elif field.type == field.TYPE_STRING:
            changed |= _make_field_readable(message, field.name, value)
    return changed


def _make_field_readable(message: Any, name: str, value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        if isinstance(value, bytes):
            setattr(message, name, value.decode(errors="backslashreplace"))
        return isinstance(value, bytes)
    texts = list(value)
    if not any(isinstance(text, bytes) for text in texts):
        return False
    del value[:]
    value.extend(
        text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
        for text in texts
    )
    return True
