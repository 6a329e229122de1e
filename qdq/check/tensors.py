"""Do the data of a constant fit its type and shape, in the file itself or in one beside it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto

from qdq.graph.tensors import external_fields, list_tensors

_SHOWN_CHARACTERS = 100  # of a location
_COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)


@dataclass(frozen=True)
class TensorFault:
    """A constant that cannot be read.

    Args:
        name: Of the constant; of its node where it has none.
        message: What does not fit.
        tensor: The constant itself.
    """

    name: str
    message: str
    tensor: TensorProto


def find_tensor_faults(proto: onnx.ModelProto, folder: Path) -> list[TensorFault]:
    """Every constant whose data do not fit its type and shape.

    Args:
        proto: The model.
        folder: Where its external data are.
    """
    faults = []
    for name, tensor in list_tensors(proto):
        if message := _describe_fault(tensor, folder):
            faults.append(TensorFault(tensor.name or name, message, tensor))
    return faults


def count_bytes(tensor: TensorProto) -> int | None:
    """How many bytes the data of a constant take by its type and shape; None for strings and unknown types."""
    try:
        bits: int = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):  # no such type, or one without a size
        return None
    values: int = math.prod(tensor.dims)
    return -(-values * bits // 8)


def _describe_fault(tensor: TensorProto, folder: Path) -> str:
    if (
        tensor.data_type not in TensorProto.DataType.values()
        or tensor.data_type == TensorProto.UNDEFINED
    ):
        return f"its type is {tensor.data_type}, which ONNX does not have"
    if any(size < 0 for size in tensor.dims):
        return f"its shape is {list(tensor.dims)}"
    size = count_bytes(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _describe_external_fault(tensor, folder, size)
    if tensor.HasField("raw_data"):
        if size is None:
            return "it holds strings as raw bytes"
        if len(tensor.raw_data) != size:
            return f"it has {len(tensor.raw_data)} bytes; its type and shape {list(tensor.dims)} take {size}"
        return ""
    return _describe_typed_fault(tensor)


def _describe_typed_fault(tensor: TensorProto) -> str:
    """Data as a list of numbers or strings."""
    if _is_packed(tensor):
        return ""
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    values = len(getattr(tensor, field))
    expected = math.prod(tensor.dims) * (2 if tensor.data_type in _COMPLEX else 1)
    shape = list(tensor.dims)
    return (
        ""
        if values == expected
        else f"it has {values} values in {field}; its shape {shape} takes {expected}"
    )


def _is_packed(tensor: TensorProto) -> bool:
    """Whether one number of the list holds several values."""
    return tensor.data_type != TensorProto.STRING and ir.DataType(tensor.data_type).bitwidth < 8


def _describe_external_fault(tensor: TensorProto, folder: Path, size: int | None) -> str:
    fields = external_fields(tensor)
    location = fields.get("location", "")
    if not location or "\0" in location:
        return "its data lie in another file, and which one is not said"
    try:
        if reason := _describe_location_fault(location, folder):
            return reason
        file_bytes = (folder / location).stat().st_size
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: a loop of links, before Python 3.13
        return (
            f"its data lie in {_shorten(location)}, which cannot be read: {_describe_cause(error)}"
        )
    try:
        offset, length = int(fields.get("offset", 0)), int(fields.get("length", -1))
    except ValueError:
        return f"offset {fields.get('offset')!r} or length {fields.get('length')!r} of its data is no number"
    if size is None:
        return "it holds strings in another file"
    if offset < 0 or file_bytes - offset < size:
        return f"{size} bytes at {offset} of {_shorten(location)} are its data, and that file has {file_bytes}"
    if "length" in fields and length != size:
        expected = f"its type and shape {list(tensor.dims)} take {size}"
        return f"its data are {length} bytes of {_shorten(location)}; {expected}"
    return ""


def _describe_location_fault(location: str, folder: Path) -> str:
    """Why data may not lie there; the file system may raise errors of its own."""
    path = folder / location
    if Path(location).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        return f"its data lie outside the folder of the model: {_shorten(location)}"
    if path.is_file():
        return ""
    if path.exists():
        return f"its data lie in {_shorten(location)}, which is a folder or a device and no file"
    return f"its data lie in {_shorten(location)}, and there is no such file"


def _describe_cause(error: Exception) -> str:
    if isinstance(error, RuntimeError):  # its text holds the whole path
        return "a loop of symbolic links"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shorten(location: str) -> str:
    if len(location) <= _SHOWN_CHARACTERS:
        return location
    return f"{location[:_SHOWN_CHARACTERS]}... ({len(location)} characters)"
