"""Edits that several passes make: add a constant, remove what nothing reads any more."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Register a constant in a graph, with the type and shape of its array.

    Args:
        graph: Graph that gets the constant.
        name: Its name, which no other value of the graph has.
        array: Its numbers.

    Returns:
        The value that nodes can read.
    """
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def remove_if_unused(value: ir.Value | None) -> None:
    """Remove an initializer that nothing reads any more.

    Inputs of the graph stay, because they belong to its signature. The outputs of nodes stay, too: `remove_if_unread`
    removes a node.

    Args:
        value: Any value, such as a former input of a node; None for one that was left out.
    """
    if value is None or is_needed(value) or value.is_graph_input():
        return
    if value.is_initializer() and value.graph is not None:
        value.graph.initializers.pop(str(value.name), None)


def remove_if_unread(node: ir.Node) -> bool:
    """Remove a node with one output that nothing reads any more.

    Args:
        node: The node. It may have been removed already.

    Returns:
        Whether it was removed now.
    """
    if node.graph is None or is_needed(node.outputs[0]):
        return False

    node.graph.remove(node, safe=True)
    return True


def is_needed(value: ir.Value) -> bool:
    """Whether a node reads a value, or the graph returns it."""
    return bool(value.uses()) or value.is_graph_output()


def find_free_name(graph: ir.Graph, stem: str, first: int) -> str:
    """A name that no initializer has: the stem and a number.

    Args:
        graph: The graph.
        stem: How the name begins.
        first: The lowest number to try.
    """
    number = first
    while f"{stem}{number}" in graph.initializers:
        number += 1

    return f"{stem}{number}"
