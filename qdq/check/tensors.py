"""Check whether the data of a constant fit its type and shape, in the file itself or in an external file."""

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
_READ_ERRORS = (OSError, RuntimeError, ValueError)
"""Exceptions of the file system; RuntimeError is a loop of links before Python 3.13."""


@dataclass(frozen=True)
class TensorFault:
    """A constant that cannot be read.

    Args:
        name: Of the constant; of its node if it has none.
        message: The fault, a sentence without period.
        tensor: The constant itself.
    """

    name: str
    message: str
    tensor: TensorProto


def find_tensor_faults(proto: onnx.ModelProto, folder: Path) -> list[TensorFault]:
    """Find every constant whose data do not fit its type and shape.

    Args:
        proto: The model.
        folder: Where its external data are.
    """
    faults = []
    for name, tensor in list_tensors(proto):
        message = _describe_fault(tensor, folder)
        if message:
            faults.append(TensorFault(tensor.name or name, message, tensor))
    return faults


def count_bytes(tensor: TensorProto) -> int | None:
    """Number of bytes of the data of a constant, from its type and shape.

    Returns:
        The number; None for strings and unknown types.
    """
    try:
        bits: int = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):  # no such type, or one without a size
        return None
    values: int = math.prod(tensor.dims)
    return (values * bits + 7) // 8


def _describe_fault(tensor: TensorProto, folder: Path) -> str:
    """Describe why a constant cannot be read.

    Args:
        tensor: The constant.
        folder: The folder of the model.

    Returns:
        A sentence without period, to follow the name; empty if all fits.
    """
    data_types = set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
    if tensor.data_type not in data_types:
        return f"its type is {tensor.data_type}, which ONNX does not have"
    if min(tensor.dims, default=0) < 0:
        return f"its shape is {list(tensor.dims)}"

    if tensor.data_location == TensorProto.EXTERNAL:
        return _describe_external_fault(tensor, folder)
    if tensor.HasField("raw_data"):
        return _describe_raw_fault(tensor)
    return _describe_typed_fault(tensor)


def _describe_raw_fault(tensor: TensorProto) -> str:
    """Data as bytes in the file."""
    expected = count_bytes(tensor)
    if expected is None:
        return "it holds strings as raw bytes"
    size = len(tensor.raw_data)
    if size != expected:
        return f"it has {size} bytes; its type and shape {list(tensor.dims)} take {expected}"
    return ""


def _describe_typed_fault(tensor: TensorProto) -> str:
    """Data as a list of numbers or strings in the file."""
    if _is_packed(tensor):
        return ""

    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    values = len(getattr(tensor, field))
    expected = math.prod(tensor.dims)
    if tensor.data_type in _COMPLEX:  # real and imaginary part
        expected *= 2
    if values != expected:
        return f"it has {values} values in {field}; its shape {list(tensor.dims)} takes {expected}"
    return ""


def _is_packed(tensor: TensorProto) -> bool:
    """Whether one number of the list holds several values."""
    if tensor.data_type == TensorProto.STRING:
        return False
    return ir.DataType(tensor.data_type).bitwidth < 8


def _describe_external_fault(tensor: TensorProto, folder: Path) -> str:
    """Data in another file."""
    location = external_fields(tensor).get("location", "")
    if not location or "\0" in location:
        return "its data are in another file, but no valid name of that file is given"
    try:
        reason = _describe_location_fault(location, folder)
        if reason:
            return reason
        file_bytes = (folder / location).stat().st_size
    except _READ_ERRORS as error:
        return (
            f"its data are in {_shorten(location)}, which cannot be read: {_describe_cause(error)}"
        )
    return _describe_range_fault(tensor, location, file_bytes)


def _describe_location_fault(location: str, folder: Path) -> str:
    """Why data may not be there.

    Args:
        location: The file, relative to the model.
        folder: The folder of the model.

    Raises:
        OSError, RuntimeError, ValueError: The file system refuses the path.
    """
    path = folder / location
    is_inside = path.resolve().is_relative_to(folder.resolve())
    if Path(location).is_absolute() or not is_inside:
        return f"its data are outside the folder of the model: {_shorten(location)}"
    if path.is_file():
        return ""

    if path.exists():
        return f"its data are in {_shorten(location)}, which is a folder or a device and not a file"
    return f"its data are in {_shorten(location)}, but that file does not exist"


def _describe_range_fault(tensor: TensorProto, location: str, file_bytes: int) -> str:
    """Why the data of a constant are not in a range of another file.

    Args:
        tensor: The constant.
        location: The file, relative to the model.
        file_bytes: Its size.
    """
    fields = external_fields(tensor)
    try:
        offset, length = int(fields.get("offset", 0)), int(fields.get("length", -1))
    except ValueError:
        return (
            f"offset {fields.get('offset')!r} or length {fields.get('length')!r} of its data "
            "is not a number"
        )

    size = count_bytes(tensor)
    if size is None:
        return "it holds strings in another file"
    is_in_file = 0 <= offset <= file_bytes - size
    if not is_in_file:
        return (
            f"its data are {size} bytes at {offset} of {_shorten(location)}, "
            f"but that file has {file_bytes}"
        )
    if "length" in fields and length != size:
        return (
            f"its data are {length} bytes of {_shorten(location)}; "
            f"its type and shape {list(tensor.dims)} take {size}"
        )
    return ""


def _describe_cause(error: Exception) -> str:
    """The reason of an error of the file system, without the path."""
    if isinstance(error, RuntimeError):  # its text contains the whole path
        return "a loop of symbolic links"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _shorten(location: str) -> str:
    """A location for a message: a very long one is cut."""
    if len(location) <= _SHOWN_CHARACTERS:
        return location
    return f"{location[:_SHOWN_CHARACTERS]}... ({len(location)} characters)"
