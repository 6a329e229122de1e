"""Why a tensor of a file differs: what a fresh export of the model writes there, and how the values differ."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import nn

from qdq.diverge.places import find_places
from qdq.diverge.record import Site
from qdq.errors import QdqError
from qdq.export import export_onnx
from qdq.graph.pairs import constant_of, is_op
from qdq.metrics import Array
from qdq.text import list_names

_MOST_NAMES = 3
_EQUAL = 1e-6  # relative
_STRAIGHT = 1e-3  # relative deviation from a multiple


def find_causes(model: nn.Module, actual: ir.Model, batch: Any, site: Site) -> list[str]:
    """Compare the nodes that compute a tensor with those that a fresh export writes.

    Args:
        model: The torch model.
        actual: The graph of the file.
        batch: An example for the export.
        site: The tensor.

    Returns:
        As for `compare_graphs`, or why it is not known.
    """
    try:
        expected = _export_again(model, actual, batch)
    except QdqError as error:
        return [f"not known: the model cannot be exported again to compare: {error.message}"]
    return compare_graphs(expected, actual, site)


def compare_graphs(expected: ir.Model, actual: ir.Model, site: Site) -> list[str]:
    """The differences between the nodes that compute a tensor in two graphs.

    Args:
        expected: A fresh export.
        actual: The file.
        site: The tensor.

    Returns:
        The differences in words, nearest first; or one line that there are none.
    """
    quantizers = {site.name} if site.kind == "quantizer" else set()
    layers = {site.name} if site.kind == "layer" else set()
    places = []
    for graph in (expected, actual):
        places.append(find_places(graph, quantizers, layers, add_outputs=False))
    expected_node, actual_node = (place.nodes.get(site) for place in places)
    if expected_node is None or actual_node is None:
        return ["a fresh export has no such tensor: the file is of another model or version"]
    differences = list(_compare_nodes(expected_node, actual_node))
    if differences:
        return differences
    return [
        "the nodes before it are those of a fresh export: the runtime computes them differently, or the export is wrong"
    ]


def _export_again(model: nn.Module, actual: ir.Model, batch: Any) -> ir.Model:
    """The graph that the model gives with the options of the file."""
    types = {value.dtype for node in actual.graph for value in node.outputs}
    precision = "fp32"
    if ir.DataType.FLOAT16 in types:
        precision = "fp16"
    elif ir.DataType.BFLOAT16 in types:
        precision = "bf16"
    sizes = [value.shape[0] for value in actual.graph.inputs if value.shape]
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        report = export_onnx(
            model,
            batch,
            Path(folder) / "model.onnx",
            opset=actual.opset_imports.get("", 0),
            dynamic_batch=not all(isinstance(size, int) for size in sizes),
            weights="float" if _has_float_weights(actual) else "int8",
            precision=precision,
        )
        loaded = ir.load(report.path)
        ir.external_data.load_to_model(loaded)
        return loaded


def _has_float_weights(model: ir.Model) -> bool:
    """Whether a Q of the graph reads a constant."""
    quantize_nodes = [node for node in model.graph if is_op(node, "QuantizeLinear")]
    return any(constant_of(node.inputs[0]) is not None for node in quantize_nodes)


def _compare_nodes(expected: ir.Node, actual: ir.Node) -> Iterator[str]:
    """The differences of two nodes and of the nodes before them, up to the activations that were quantized before."""
    expected_nodes, actual_nodes = _list_segment(expected), _list_segment(actual)
    missing = [name for name in expected_nodes if name not in actual_nodes]
    added = [name for name in actual_nodes if name not in expected_nodes]
    if missing:
        yield f"{list_names(missing, _MOST_NAMES)} of a fresh export is missing"
    if added:
        yield f"{list_names(added, _MOST_NAMES)} is not in a fresh export"
    unpaired = {*missing, *added}
    for name, node in actual_nodes.items():
        if name in expected_nodes:
            yield from _compare_node(expected_nodes[name], node, unpaired)


def _list_segment(last: ir.Node) -> dict[str, ir.Node]:
    """A node and those before it by name, nearest first; a DQ of an activation ends the search. A Q has its DQ, too."""
    segment: dict[str, ir.Node] = {}
    nodes = [last]
    if is_op(last, "QuantizeLinear"):
        nodes += [reader for reader, _ in last.outputs[0].uses()]
    while nodes:
        node = nodes.pop(0)
        if str(node.name) in segment:
            continue
        segment[str(node.name)] = node
        if is_op(node, "DequantizeLinear") and constant_of(node.inputs[0]) is None:
            continue
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer.op_type != "Constant":
                nodes.append(producer)
    return segment


def _compare_node(expected: ir.Node, actual: ir.Node, unpaired: Set[str]) -> Iterator[str]:
    """The differences of two nodes of one name: attributes, constants and where the inputs come from.

    Args:
        expected: The node of a fresh export.
        actual: The node of the file.
        unpaired: Names of nodes that only one of the two graphs has.
    """
    name = actual.name
    if expected.op_type != actual.op_type:
        yield f"{name} is {actual.op_type}, a fresh export has {expected.op_type}"
        return
    for key in sorted({*expected.attributes, *actual.attributes}):
        yield from _compare_attributes(name, key, expected, actual)
    sources = [list(map(_name_source, node.inputs)) for node in (expected, actual)]
    if sources[0] != sources[1] and sorted(sources[0]) == sorted(sources[1]):
        yield f"the inputs of {name} are in another order: {sources[1]}, a fresh export has {sources[0]}"
        return
    if len(actual.inputs) < len(expected.inputs):
        yield f"{name} has {len(actual.inputs)} inputs, a fresh export has {len(expected.inputs)}: a bias is missing"
    for position, (first, second) in enumerate(zip(expected.inputs, actual.inputs, strict=False)):
        if unpaired.isdisjoint((sources[0][position], sources[1][position])):
            yield from _compare_inputs(name, position, first, second)


def _compare_inputs(
    name: str | None, position: int, expected: ir.Value | None, actual: ir.Value | None
) -> Iterator[str]:
    """The difference of two inputs at the same position of a node."""
    arrays = [constant_of(value) for value in (expected, actual)]
    if arrays[0] is not None and arrays[1] is not None:
        difference = compare_constants(arrays[0], arrays[1])
        if difference:
            label = None if actual is None else actual.name
            yield f"{label} of {name} {difference}"
        return
    sources = _name_source(expected), _name_source(actual)
    if sources[0] != sources[1]:
        yield f"input {position} of {name} comes from {sources[1]}, in a fresh export from {sources[0]}"


def _name_source(value: ir.Value | None) -> str:
    """Where an input comes from: a node, the caller, a constant, or nowhere."""
    if value is None:
        return "nothing"
    if constant_of(value) is not None:
        return f"constant {value.name}" if value.producer() is None else "a constant"
    producer = value.producer()
    if producer is None:
        return f"input {value.name}"
    if len(producer.outputs) > 1:
        return f"output {value.index()} of {producer.name}"
    return str(producer.name)


def _compare_attributes(
    name: str | None, key: str, expected: ir.Node, actual: ir.Node
) -> Iterator[str]:
    """The difference of an attribute of two nodes. Graphs in attributes are not compared."""
    first, second = (_read_attribute(node, key) for node in (expected, actual))
    if isinstance(first, ir.TensorProtocol) and isinstance(second, ir.TensorProtocol):
        difference = compare_constants(first.numpy(), second.numpy())
        if difference:
            yield f"{key} of {name} {difference}"
        return
    if isinstance(first, ir.Graph) and isinstance(second, ir.Graph):
        return
    if first != second:
        yield f"{name} has {key} {second}, a fresh export has {first}"


def _read_attribute(node: ir.Node, key: str) -> Any:
    attribute = node.attributes.get(key)
    if attribute is None:
        return "its default"
    if isinstance(attribute.value, tuple | list):
        return list(attribute.value)
    return attribute.value


def compare_constants(expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> str:
    """The difference of two arrays in words; "" if they are equal.

    Args:
        expected: Of a fresh export.
        actual: Of the file.
    """
    if expected.shape != actual.shape:
        return f"has shape {list(actual.shape)}, a fresh export has {list(expected.shape)}"
    first, second = expected.astype(np.float64), actual.astype(np.float64)
    if np.allclose(first, second, rtol=_EQUAL, atol=0, equal_nan=True):
        return ""
    if (np.isfinite(first) & ~np.isfinite(second)).any():
        return "has NaN or infinite values"
    if not second.any():
        return "is all zero"
    if first.size == 1:
        return f"is {second.item():.6g}, a fresh export has {first.item():.6g}{_describe_ratio(first, second)}"
    reordered = _find_reordering(first, second)
    if reordered:
        return reordered
    factors = _find_factors(first, second)
    if factors is not None:
        return factors
    is_close = np.isclose(first, second, rtol=_EQUAL, atol=0, equal_nan=True)
    differing = int(np.count_nonzero(~is_close))
    largest = float(np.abs(first - second)[~is_close].max())
    return f"differs in {differing} of {first.size} values, by at most {largest:.3g}"


def _describe_ratio(expected: Array, actual: Array) -> str:
    if not expected.item():
        return ""
    return f" ({actual.item() / expected.item():.4g} times)"


def _find_reordering(expected: Array, actual: Array) -> str:
    """How the same numbers are in another order; "" if they are not."""
    if not np.array_equal(np.sort(expected.ravel()), np.sort(actual.ravel())):
        return ""
    is_square = expected.ndim > 1 and expected.shape[0] == expected.shape[1]
    if is_square and np.array_equal(expected.swapaxes(0, 1), actual):
        return "is transposed"
    if expected.ndim > 3 and np.array_equal(expected.swapaxes(-1, -2), actual):
        return "has its last two axes swapped"
    return "has the same values in another order"


def _find_factors(expected: Array, actual: Array) -> str | None:
    """By which factors one array is the other; None if it is not a multiple along its first axis."""
    if not np.isfinite(expected).all() or not np.isfinite(actual).all():
        return None
    rows, others = expected.reshape(len(expected), -1), actual.reshape(len(expected), -1)
    norms = np.sum(rows**2, axis=1)
    if not norms.all():
        return None
    factors = np.sum(rows * others, axis=1) / norms
    deviation = np.abs(others - factors[:, None] * rows).max()
    if deviation > _STRAIGHT * np.abs(others).max():
        return None
    if np.ptp(factors) <= _STRAIGHT * abs(factors[0]):
        return f"is {factors[0]:.4g} times that of a fresh export"
    changed = np.abs(factors - 1) > _EQUAL
    return (
        f"is {factors.min():.4g} to {factors.max():.4g} times that of a fresh export in {int(changed.sum())} of "
        f"{len(factors)} channels, as of another BatchNorm or another calibration"
    )


def explain_values(expected: Array, actual: Array) -> list[str]:
    """How a tensor differs from what torch computes from the same codes, in words.

    Args:
        expected: Of torch.
        actual: Of the file.
    """
    if expected.shape != actual.shape:
        return []
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(actual).all() and np.isfinite(expected).all():
        return ["it has NaN or infinite values, torch has none"]
    if not actual.any() and expected.any():
        return ["it is all zero"]
    tolerance = _STRAIGHT * float(np.nan_to_num(np.abs(expected)).max(initial=0.0))
    texts = []
    if expected.min() >= 0 and actual.min() < -tolerance:
        texts.append("it has negative values and torch has none, as without a ReLU")
    differing = np.abs(expected - actual) > tolerance
    if expected.ndim > 1 and differing.any():
        channels = np.moveaxis(differing, 1, 0).reshape(differing.shape[1], -1).any(axis=1)
        if channels.sum() < channels.size:
            texts.append(f"{int(channels.sum())} of {channels.size} channels differ")
    if expected.ndim > 3 and differing.any() and not differing[..., 1:-1, 1:-1].any():
        texts.append("it differs at its borders only, as with other padding")
    return texts
