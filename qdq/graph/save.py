"""Save a model in one file, or with its weights in a second file if it exceeds protobuf's limit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from qdq.errors import ArgumentError, ExportError
from qdq.files import is_replaceable, write_atomic

_PROTOBUF_BYTES = 2**31
_ONE_FILE_BYTES = _PROTOBUF_BYTES - 2**24  # the rest is for nodes and names
_EXTERNAL_BYTES = 1024  # smaller tensors, such as scales and shapes, stay in the model
_ALIGNMENT = 4096  # offsets that can be mapped into memory

# Encoding of protobuf (https://protobuf.dev/programming-guides/encoding).
_LENGTH_DELIMITED = 2  # wire type of a message in a field
_WIRE_TYPE_BITS = 3
_VARINT_BITS = 7  # bits of a number in one byte
_VARINT_CONTINUES = 1 << _VARINT_BITS  # set in every byte except the last


def save_model(model: ir.Model, path: Path) -> int:
    """Write a model completely or not at all.

    If the weights are larger than a protobuf file can be, they go to `NAME.data` in the same folder, written before the
    model. An old model is removed before the old data are replaced, so a model is never next to the data of another
    model.

    Args:
        model: The model; its tensors do not change.
        path: The file.

    Returns:
        Bytes of all that was written.

    Raises:
        ArgumentError: The folder cannot be written to, or the path is not a regular file and two files are needed.
        ExportError: The model without its weights is too large.
    """
    values = []
    for graph in model.graphs():
        values += [value for value in graph.initializers.values() if value.const_value]

    if sum(_bytes_of(value) for value in values) < _ONE_FILE_BYTES:
        return _save_one_file(model, path)
    return _save_two_files(model, values, path)


def _save_one_file(model: ir.Model, path: Path) -> int:
    """Write model and weights to one file; returns its bytes."""
    with _explaining_size():
        parts = _Parts(model)
    write_atomic(path, lambda: parts)
    return parts.size


def _save_two_files(model: ir.Model, values: list[ir.Value], path: Path) -> int:
    """Write the model to one file and its weights to another; returns the bytes of both.

    Args:
        model: The model.
        values: All its initializers.
        path: The file of the model.
    """
    if not is_replaceable(path):
        raise ArgumentError(
            f"the model has more than 2 GB and needs two files, but {path} is not a regular file.",
            "write to a regular file.",
        )
    path = Path(os.path.realpath(path))  # the weights are next to the file that a link leads to
    data_path = path.with_name(f"{path.name}.data")

    large_values = [value for value in values if _bytes_of(value) >= _EXTERNAL_BYTES]
    placed_values = _place(large_values)
    with _external(placed_values, data_path.name):
        content = serialize(model)

    partial_path = data_path.with_name(f".{data_path.name}.partial")
    partial = write_atomic(partial_path, lambda: _chunks(placed_values))
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.replace(partial, data_path)
    finally:
        partial.unlink(missing_ok=True)

    write_atomic(path, content)
    return len(content) + data_path.stat().st_size


def serialize(model: ir.Model) -> bytes:
    """A model as the bytes of one protobuf message, the same bytes for the same model.

    Raises:
        ExportError: The message would be too large.
    """
    with _explaining_size():
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@contextlib.contextmanager
def _explaining_size() -> Iterator[None]:
    """Turn protobuf's error for a message over 2 GB into one that says what to do."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"the model does not fit one ONNX file even without its weights: {error}.",
            "export parts of it, each to a separate file.",
        ) from error


# --- one file -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TensorPart:
    """An initializer of the file.

    Args:
        value: A large initializer, which becomes protobuf when it is written; None for a small one.
        proto: A small initializer; of a large one all but its numbers.
    """

    value: ir.Value | None
    proto: onnx.TensorProto

    def to_proto(self) -> onnx.TensorProto:
        """The whole initializer."""
        if self.value is None:
            return self.proto
        return _tensor_proto(self.value)


class _Parts:
    """One file, part by part: the bytes of the complete message, with one large tensor in memory at a time.

    A protobuf message is the bytes of its fields in the order of their numbers, and a message in a field follows its
    length. So the file is the graph's initializers, each after its length, between the bytes of all other fields.

    Args:
        model: The model.

    Attributes:
        size: Bytes of all parts.
    """

    def __init__(self, model: ir.Model) -> None:
        values = model.graph.initializers.values()
        large_values = {
            value.name: value for value in values if _bytes_of(value) >= _EXTERNAL_BYTES
        }
        references = [_PlacedValue(value, offset=0) for value in large_values.values()]
        with _external(references, location=""):
            proto = ir.to_proto(model)

        self._tensors: list[tuple[bytes, _TensorPart]] = []
        tensor_bytes = 0
        for tensor in proto.graph.initializer:
            part = _TensorPart(large_values.get(tensor.name), tensor)
            part_bytes = part.to_proto().ByteSize()
            head = _head_of(onnx.GraphProto, "initializer", part_bytes)
            self._tensors.append((head, part))
            tensor_bytes += len(head) + part_bytes

        graph_start, graph_end = _around(proto.graph, "initializer")
        model_start, model_end = _around(proto, "graph")
        graph_bytes = len(graph_start) + tensor_bytes + len(graph_end)
        graph_head = _head_of(onnx.ModelProto, "graph", graph_bytes)
        self._start = model_start + graph_head + graph_start
        self._end = graph_end + model_end

        self.size: int = len(self._start) + tensor_bytes + len(self._end)
        if self.size >= _PROTOBUF_BYTES:
            raise ValueError(f"{self.size / 1e9:.2f} GB")

    def __iter__(self) -> Iterator[bytes]:
        yield self._start
        for head, part in self._tensors:
            yield head
            yield part.to_proto().SerializeToString(deterministic=True)
        yield self._end


def _tensor_proto(value: ir.Value) -> onnx.TensorProto:
    """An initializer as protobuf, under the name of its value."""
    tensor = value.const_value
    assert tensor is not None  # noqa: S101  # save_model takes only values that have one
    tensor.name = value.name
    return ir.to_proto(tensor)


def _around(message: onnx.ModelProto | onnx.GraphProto, name: str) -> tuple[bytes, bytes]:
    """The bytes of a message before one of its fields, and those after it.

    Args:
        message: The message.
        name: Name of the field.
    """
    fields = message.DESCRIPTOR.fields
    number = message.DESCRIPTOR.fields_by_name[name].number
    names_before = [field.name for field in fields if field.number < number]
    names_behind = [field.name for field in fields if field.number > number]

    start = _bytes_without(message, [name, *names_behind])
    end = _bytes_without(message, [*names_before, name])
    return start, end


def _bytes_without(message: onnx.ModelProto | onnx.GraphProto, names: list[str]) -> bytes:
    """The bytes of a message without some of its fields."""
    copy = type(message)()
    copy.CopyFrom(message)
    for name in names:
        copy.ClearField(name)

    content: bytes = copy.SerializeToString(deterministic=True)
    return content


def _head_of(
    message_type: type[onnx.ModelProto | onnx.GraphProto], name: str, byte_count: int
) -> bytes:
    """The bytes before a message in a field of another message: the tag of the field, then the length.

    Args:
        message_type: Type of the outer message.
        name: Name of the field.
        byte_count: Length of the inner message.
    """
    number = message_type.DESCRIPTOR.fields_by_name[name].number
    tag = number << _WIRE_TYPE_BITS | _LENGTH_DELIMITED
    return _varint(tag) + _varint(byte_count)


def _varint(number: int) -> bytes:
    """A number in protobuf's encoding: 7 bits per byte, the lowest first."""
    content = bytearray()
    while number >= _VARINT_CONTINUES:
        low_bits = number % _VARINT_CONTINUES
        content.append(low_bits | _VARINT_CONTINUES)
        number >>= _VARINT_BITS

    content.append(number)
    return bytes(content)


# --- two files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PlacedValue:
    """An initializer whose numbers are in another file.

    Args:
        value: The initializer.
        offset: Where its numbers begin, in bytes.
    """

    value: ir.Value
    offset: int


def _place(values: list[ir.Value]) -> list[_PlacedValue]:
    """Place initializers in a data file one after another, at offsets that can be mapped into memory."""
    placed_values = []
    end = 0
    for value in values:
        pages = -(-end // _ALIGNMENT)  # rounded up
        offset = pages * _ALIGNMENT
        placed_values.append(_PlacedValue(value, offset))
        end = offset + _bytes_of(value)

    return placed_values


def _chunks(placed_values: list[_PlacedValue]) -> Iterator[bytes]:
    """The data file, one tensor at a time, with zeros between them."""
    end = 0
    for placed in placed_values:
        tensor = placed.value.const_value
        assert tensor is not None  # noqa: S101  # save_model takes only values that have one

        yield bytes(placed.offset - end)
        content = tensor.tobytes()
        yield content
        end = placed.offset + len(content)


@contextlib.contextmanager
def _external(placed_values: list[_PlacedValue], location: str) -> Iterator[None]:
    """Make initializers references into a file while the model is written.

    Args:
        placed_values: The initializers and where their numbers are.
        location: Name of the file.
    """
    tensors = [placed.value.const_value for placed in placed_values]
    try:
        for placed in placed_values:
            placed.value.const_value = _reference_to(placed, location)
        yield
    finally:
        for placed, tensor in zip(placed_values, tensors, strict=True):
            placed.value.const_value = tensor


def _reference_to(placed: _PlacedValue, location: str) -> ir.ExternalTensor:
    """The reference to the numbers of an initializer."""
    tensor = placed.value.const_value
    assert tensor is not None  # noqa: S101  # save_model takes only values that have one
    return ir.ExternalTensor(
        location,
        placed.offset,
        _bytes_of(placed.value),
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(placed.value.name),
    )


def _bytes_of(value: ir.Value) -> int:
    """Bytes of the numbers, or of the texts, of an initializer."""
    tensor = value.const_value
    if tensor is None:
        return 0
    if tensor.dtype == ir.DataType.STRING:
        return sum(len(text) for text in tensor.numpy().ravel())
    return tensor.nbytes
