"""Every constant of a model in protobuf, wherever it is, and the file that contains its data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from qdq.files import read_file


def list_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every constant of a model, its subgraphs and its functions.

    Yields:
        The name of its node, "" for an initializer, and the constant.
    """
    yield from _list_in_graph(proto.graph)
    for function in proto.functions:
        yield from _list_in_nodes(function.node)


def _list_in_graph(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The initializers of a graph and the constants of its nodes."""
    for tensor in graph.initializer:
        yield "", tensor
    yield from _list_in_nodes(graph.node)


def _list_in_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The constants in the attributes of nodes, and in their subgraphs.

    Args:
        nodes: The nodes of a graph or of a function.
    """
    for node in nodes:
        name = _name_of(node)
        for attribute in node.attribute:
            for tensor in _tensors_of(attribute):
                yield name, tensor
            for body in _bodies_of(attribute):
                yield from _list_in_graph(body)


def _name_of(node: onnx.NodeProto) -> str:
    """The name of a node, or of its first output if it has none.

    ONNX does not require names of nodes, and a damaged node may have no output either: its name is "".
    """
    if node.name or not node.output:
        return str(node.name)
    return str(node.output[0])


def _tensors_of(attribute: onnx.AttributeProto) -> list[onnx.TensorProto]:
    """The constants directly in an attribute."""
    tensors = list(attribute.tensors)
    if attribute.HasField("t"):
        tensors.append(attribute.t)
    return tensors


def _bodies_of(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """The subgraphs in an attribute, such as the branches of an If."""
    bodies = list(attribute.graphs)
    if attribute.HasField("g"):
        bodies.append(attribute.g)
    return bodies


def external_fields(tensor: onnx.TensorProto) -> dict[str, str]:
    """`location`, `offset` and `length` of data in another file."""
    return {entry.key: entry.value for entry in tensor.external_data}


def list_data_files(path: Path) -> list[Path]:
    """The files next to a model that contain its data.

    Args:
        path: The model.

    Returns:
        Each file once. None if the model cannot be read: its user reports that.
    """
    try:
        proto = onnx.load_model_from_string(read_file(path))
    except Exception:  # protobuf has its own types
        return []

    files: dict[Path, None] = {}
    for _, tensor in list_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue

        location = os.fsdecode(external_fields(tensor).get("location", ""))
        is_path = bool(location) and "\0" not in location
        if is_path:
            files[path.parent / location] = None

    return list(files)
