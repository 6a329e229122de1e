"""Read an ONNX file as protobuf and as graph, as far as it can be read; rules report its faults."""

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
    """Result of `load_onnx`.

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
    """Read a file, whether or not it is valid.

    Raises:
        CheckError: The file is missing, empty, truncated, or not ONNX.
    """
    proto = _read_proto(path)
    is_utf8 = not _make_readable(proto)
    faults = find_tensor_faults(proto, path.parent)
    for fault in faults:
        # onnx-ir refuses a file with an invalid location
        fault.tensor.ClearField("external_data")
        fault.tensor.ClearField("data_location")
    try:
        with silence_onnx_ir():
            model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, os.path.dirname(path))
    except Exception as error:  # onnx-ir wraps an exception again at each level
        reason = first_line(_root_cause(error))
        if faults:
            reason = f"the constant {faults[0].name}: {faults[0].message}"
        raise _invalid(path, reason) from error
    return LoadedModel(path, proto, model, is_utf8, tuple(faults))


def _read_proto(path: Path) -> onnx.ModelProto:
    """Parse a file.

    Raises:
        CheckError: The file is missing, empty, truncated, or not ONNX.
    """
    require_file(path)
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf and the file system raise their own errors
        raise _invalid(path, first_line(error)) from error
    if not proto.HasField("graph"):
        raise _invalid(path, "it contains no graph")
    if not proto.graph.node:
        raise CheckError(
            f"{path} contains no ONNX graph.",
            "export it again: the file may be empty or truncated.",
        )
    return proto


def require_whole(loaded: LoadedModel) -> None:
    """Refuse a file with parts that would be lost when it is rewritten.

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
            f"{loaded.path} contains parts that would be lost when it is rewritten: {list_names(reasons, 3)}.",
            "nothing was written; export the model without them (sparse weights as dense ones, no training graph).",
        )


def _invalid(path: Path, reason: str) -> CheckError:
    """The error of a file that is not valid ONNX."""
    return CheckError(f"{path} is not a valid ONNX file: {reason}.", "export it again.")


def _root_cause(error: BaseException) -> Exception:
    """The first exception of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, Exception):
        return error
    return RuntimeError(str(error))


def _make_readable(message: Any) -> bool:
    """Replace the texts of a protobuf message that are not UTF-8, which it gives as bytes.

    Returns:
        Whether there were any.
    """
    is_changed = False
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            messages = [value] if hasattr(value, "ListFields") else value
            for item in messages:
                is_changed |= _make_readable(item)
        elif field.type == field.TYPE_STRING:
            is_changed |= _make_field_readable(message, field.name, value)
    return is_changed


def _make_field_readable(message: Any, name: str, value: Any) -> bool:
    """Replace the text, or the texts, of one field.

    Returns:
        Whether there were any that are not UTF-8.
    """
    if isinstance(value, str):
        return False
    if isinstance(value, bytes):
        setattr(message, name, _decode(value))
        return True

    texts = list(value)
    readable = [_decode(text) for text in texts]
    if texts == readable:
        return False
    del value[:]
    value.extend(readable)
    return True


def _decode(text: str | bytes) -> str:
    """A text with escapes for the bytes that are not UTF-8."""
    return text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
