"""A model as a file: one up to protobuf's limit, the weights in a second one beside it above."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from qdq.errors import ArgumentError, ExportError
from qdq.files import is_replaceable, write_atomic

_PROTOBUF_BYTES = 2**31
_ONE_FILE_BYTES = _PROTOBUF_BYTES - 2**24  # the rest is for nodes and names
_EXTERNAL_BYTES = 1024  # smaller tensors, such as scales and shapes, stay in the model
_ALIGNMENT = 4096  # offsets that can be mapped into memory


def save_model(model: ir.Model, path: Path) -> int:
    """Write a model whole or not at all.

    Weights of more than protobuf can hold go to `NAME.data` in the same folder, written before the model. The old
    model, if any, goes before the old data are replaced: never does a model stand beside the data of another.

    Args:
        model: The model; its tensors stay as they are.
        path: The file.

    Returns:
        Bytes of all that was written.

    Raises:
        ArgumentError: The folder cannot be written to; two files for what is no regular file.
        ExportError: The model without its weights is too large.
    """
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value
    ]
    if sum(_bytes_of(value) for value in values) < _ONE_FILE_BYTES:
        with _explaining_size():
            parts = _Parts(model)
        write_atomic(path, lambda: parts)
        return parts.size
    if not is_replaceable(path):
        raise ArgumentError(
            f"the model has more than 2 GB and takes two files, which {path} cannot hold.",
            "write to a regular file.",
        )
    path = Path(os.path.realpath(path))  # the weights lie beside the file that a link leads to
    data = path.with_name(f"{path.name}.data")
    placed = _place([value for value in values if _bytes_of(value) >= _EXTERNAL_BYTES])
    with _external(placed, data.name):
        content = serialize(model)
    partial = write_atomic(data.with_name(f".{data.name}.partial"), lambda: _chunks(placed))
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.replace(partial, data)
    finally:
        partial.unlink(missing_ok=True)
    write_atomic(path, content)
    return len(content) + data.stat().st_size


class _Parts:
    """One file, part by part: the same bytes as of the whole message, of which memory holds one tensor at a time.

    Args:
        model: The model.

    Attributes:
        size: Bytes of all parts.
    """

    def __init__(self, model: ir.Model) -> None:
        large = [
            value
            for value in model.graph.initializers.values()
            if _bytes_of(value) >= _EXTERNAL_BYTES
        ]
        with _external([(value, 0) for value in large], ""):
            proto = ir.to_proto(model)
        values = {value.name: value for value in large}
        tensors = [(values.get(tensor.name), tensor) for tensor in proto.graph.initializer]
        sizes = [
            (_tensor_proto(value) if value else tensor).ByteSize() for value, tensor in tensors
        ]
        heads = [_head_of(onnx.GraphProto, "initializer", size) for size in sizes]
        self._tensors = [
            (head, value, tensor) for head, (value, tensor) in zip(heads, tensors, strict=True)
        ]
        self._graph_start, self._graph_end = _around(proto.graph, "initializer")
        graph_size = (
            len(self._graph_start) + sum(map(len, heads)) + sum(sizes) + len(self._graph_end)
        )
        start, self._end = _around(proto, "graph")
        self._start = start + _head_of(onnx.ModelProto, "graph", graph_size)
        self.size: int = len(self._start) + graph_size + len(self._end)
        if self.size >= _PROTOBUF_BYTES:
            raise ValueError(f"{self.size / 1e9:.2f} GB")

    def __iter__(self) -> Iterator[bytes]:
        yield self._start + self._graph_start
        for head, value, tensor in self._tensors:
            yield head
            yield (_tensor_proto(value) if value else tensor).SerializeToString(deterministic=True)
        yield self._graph_end + self._end


def _tensor_proto(value: ir.Value) -> onnx.TensorProto:
    tensor = value.const_value
    assert tensor is not None  # noqa: S101  # save_model has looked
    tensor.name = value.name
    return ir.to_proto(tensor)


def _around(message: onnx.ModelProto | onnx.GraphProto, name: str) -> tuple[bytes, bytes]:
    """The bytes of a message before and behind one of its fields: they stand in the order of the numbers."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    sides = []
    for is_outside in (number.__le__, number.__ge__):
        side = type(message)()
        side.CopyFrom(message)
        for field in message.DESCRIPTOR.fields:
            if is_outside(field.number):
                side.ClearField(field.name)
        sides.append(side.SerializeToString(deterministic=True))
    return sides[0], sides[1]


def _head_of(kind: type[onnx.ModelProto | onnx.GraphProto], name: str, size: int) -> bytes:
    """What stands before a message of so many bytes in a field of another: number, type and length, 7 bits a byte."""
    content = bytearray()
    for value in (kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2, size):
        while value >= 128:
            content.append(value & 127 | 128)
            value >>= 7
        content.append(value)
    return bytes(content)


def serialize(model: ir.Model) -> bytes:
    with _explaining_size():
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@contextlib.contextmanager
def _explaining_size() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # protobuf's own type where a message is over 2 GB
        raise ExportError(
            f"the model does not fit one ONNX file even without its weights: {error}.",
            "export parts of it, each to a file of its own.",
        ) from error


_Placed = list[tuple[ir.Value, int]]  # a tensor and its offset


def _place(values: list[ir.Value]) -> _Placed:
    placed, end = [], 0
    for value in values:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        placed.append((value, start))
        end = start + _bytes_of(value)
    return placed


def _chunks(placed: _Placed) -> Iterator[bytes]:
    """The data file, one tensor at a time."""
    end = 0
    for value, start in placed:
        assert value.const_value is not None  # noqa: S101  # save_model has looked
        yield bytes(start - end)
        content = value.const_value.tobytes()
        yield content
        end = start + len(content)


@contextlib.contextmanager
def _external(placed: _Placed, location: str) -> Iterator[None]:
    """Tensors as references into a file, while the model is written."""
    tensors = [value.const_value for value, _ in placed]
    try:
        for value, offset in placed:
            tensor = value.const_value
            assert tensor is not None  # noqa: S101
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                location, offset, _bytes_of(value), tensor.dtype, shape=shape, name=str(value.name)
            )
        yield
    finally:
        for (value, _), tensor in zip(placed, tensors, strict=True):
            value.const_value = tensor


def _bytes_of(value: ir.Value) -> int:
    tensor = value.const_value
    if tensor is None:
        return 0
    if tensor.dtype == ir.DataType.STRING:
        return sum(len(text) for text in tensor.numpy().ravel())
    return tensor.nbytes
