"""Every constant of a model as protobuf, wherever it stands, and the file in which its data lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from qdq.files import read_file


def list_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every constant, and the name of its node."""
    yield from _list_graph(proto.graph)
    for function in proto.functions:
        yield from _list_nodes(function.node)


def _list_graph(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from (("", tensor) for tensor in graph.initializer)
    yield from _list_nodes(graph.node)


def _list_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        name = node.name or (node.output[0] if node.output else "")
        for attribute in node.attribute:
            yield from ((name, tensor) for tensor in attribute.tensors)
            if attribute.HasField("t"):
                yield name, attribute.t
            for body in attribute.graphs:
                yield from _list_graph(body)
            if attribute.HasField("g"):
                yield from _list_graph(attribute.g)


def external_fields(tensor: onnx.TensorProto) -> dict[str, str]:
    """`location`, `offset` and `length` of data in another file."""
    return {entry.key: entry.value for entry in tensor.external_data}


def list_data_files(path: Path) -> list[Path]:
    """The files beside a model that hold its data; none where the model cannot be read."""
    try:
        proto = onnx.load_model_from_string(read_file(path))
    except Exception:  # protobuf has its own; who uses the model says what is wrong with it
        return []
    tensors = [
        tensor
        for _, tensor in list_tensors(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    locations = [os.fsdecode(external_fields(tensor).get("location", "")) for tensor in tensors]
    return list(
        {
            path.parent / location: None
            for location in locations
            if location and "\0" not in location
        }
    )
