"""Where the tensors of torch are in an ONNX file, by the names that the export gives to its nodes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdq.diverge.record import Site
from qdq.graph.pairs import COPY_OPS, QDQ_OPS, constant_of, is_op
from qdq.metrics import Array

_MOST_COPIES = 6
_BIAS_ROUNDING = 2.0**-10  # the bias may be in float16
_COPIES = COPY_OPS | {"Pad"}
_NUMBERED = re.compile(r"_(\d+)")
_PREFIX = "qdq.diverge"


@dataclass(frozen=True)
class PlacePair:
    """The values of the file before and after a Q/DQ pair.

    Args:
        before: Name of what Q reads.
        codes: Name of what Q writes; "" behind copies.
        after: Name of what DQ writes.
    """

    before: str
    codes: str
    after: str


@dataclass(frozen=True)
class Places:
    """Where the sites of a model are.

    Args:
        quantizers: Site -> the values around its pair. The export moves pairs before copies (reshape, transpose): then
            the tensor of torch is one of the values behind these copies, so there are several.
        layers: Site -> name of the value.
        nodes: Site -> the node that computes it; the Q of a quantizer.
    """

    quantizers: dict[Site, list[PlacePair]]
    layers: dict[Site, str]
    nodes: dict[Site, ir.Node]

    def list_values(self, model: ir.Model) -> list[ir.Value]:
        """The values of the places and the outputs of the graph that has them."""
        names = {str(value.name) for value in model.graph.outputs} | set(self.layers.values())
        for pairs in self.quantizers.values():
            for pair in pairs:
                names |= {pair.before, pair.codes, pair.after}
        values = []
        for node in model.graph:
            values += [value for value in node.outputs if value.name in names]
        return values


def split_name(node: ir.Node) -> tuple[str, int]:
    """The module in the name of a node, and the number of earlier nodes of the same operator in it."""
    place, _, operator = str(node.name).rpartition("/")
    numbered = _NUMBERED.fullmatch(operator.removeprefix(node.op_type))
    return place, int(numbered.group(1)) - 1 if numbered else 0


def find_places(
    model: ir.Model, quantizers: Collection[str], layers: Collection[str], *, add_outputs: bool
) -> Places:
    """Find the values of the file for quantizers and layers.

    Args:
        model: The graph; with `add_outputs` all values that are found become outputs of it.
        quantizers: Dotted names.
        layers: Likewise.
        add_outputs: Also add nodes that copy what is before a pair like the nodes behind it do.
    """
    graph = model.graph
    nodes: dict[Site, ir.Node] = {}
    added: dict[str, ir.Value] = {}
    pairs: dict[Site, list[PlacePair]] = {}
    for node in list(graph):
        place, call = split_name(node)
        if is_op(node, "QuantizeLinear") and place in quantizers:
            site = Site(place, call)
            nodes[site] = node
            pairs[site] = list(_follow_copies(graph, node, added, add_outputs=add_outputs))
    outputs: dict[Site, str] = {}
    for name, node in _find_last_nodes(graph, layers).items():
        site = Site(name, 0, "layer")
        nodes[site] = node
        outputs[site] = str(node.outputs[0].name)
        added[outputs[site]] = node.outputs[0]
    for value in graph.outputs:
        producer = value.producer()
        if producer is not None:
            nodes[Site(str(value.name), 0, "output")] = producer
    if add_outputs:
        _add_outputs(graph, added)
    return Places(pairs, outputs, nodes)


def find_moved_layers(
    graph: ir.Graph, biases: Mapping[str, Array], offsets: Collection[float]
) -> set[str]:
    """The layers whose output in the file is not that of torch, because `FoldOffsets` moved an offset into their bias.

    Args:
        graph: The graph.
        biases: Layer -> its bias in torch.
        offsets: The offsets of the model.
    """
    moved = set()
    for node in graph:
        place, _ = split_name(node)
        bias = constant_of(node.inputs[2]) if len(node.inputs) == 3 else None
        if place not in biases or bias is None or bias.shape != biases[place].shape:
            continue
        difference = biases[place] - bias.astype(np.float32)
        tolerance = _BIAS_ROUNDING * np.abs(bias).max()
        for offset in offsets:
            is_moved = np.abs(difference - offset).max() <= tolerance + _BIAS_ROUNDING * abs(offset)
            if is_moved and np.abs(difference).max() > abs(offset) / 2:
                moved.add(place)
    return moved


def _find_last_nodes(graph: ir.Graph, layers: Collection[str]) -> dict[str, ir.Node]:
    """The last node of each layer, unless its value is an output of the graph, which is compared anyway."""
    last_nodes: dict[str, ir.Node] = {}
    for node in graph:
        place, _ = split_name(node)
        if place in layers and node.op_type not in (*QDQ_OPS, "Constant"):
            last_nodes[place] = node
    inner = {}
    for name, node in last_nodes.items():
        if not node.outputs[0].is_graph_output():
            inner[name] = node
    return inner


def _add_outputs(graph: ir.Graph, added: Mapping[str, ir.Value]) -> None:
    """Make values outputs of a graph, except its inputs."""
    present = {str(value.name) for value in graph.outputs}
    for name, value in added.items():
        if name not in present and not value.is_graph_input():
            graph.outputs.append(value)


def _follow_copies(
    graph: ir.Graph, quantize: ir.Node, added: dict[str, ir.Value], *, add_outputs: bool
) -> Iterator[PlacePair]:
    """The values around a pair, then those behind each copy that reads it."""
    before, codes = quantize.inputs[0], quantize.outputs[0]
    if before is None or constant_of(before) is not None:
        return
    for dequantize, _ in codes.uses():
        if not is_op(dequantize, "DequantizeLinear"):
            continue
        after = dequantize.outputs[0]
        _add(added, before, codes, after)
        yield PlacePair(str(before.name), str(codes.name), str(after.name))
        if add_outputs:
            yield from _copy_alike(graph, before, after, added, _MOST_COPIES)


def _copy_alike(
    graph: ir.Graph, before: ir.Value, after: ir.Value, added: dict[str, ir.Value], most: int
) -> Iterator[PlacePair]:
    """Copy what is before a pair as the readers of the pair copy what is behind it."""
    if not most:
        return
    for reader, position in list(after.uses()):
        if position != 0 or not is_op(reader, *_COPIES):
            continue
        inputs = [before, *reader.inputs[1:]]
        copy = ir.node(
            reader.op_type,
            inputs,
            attributes=dict(reader.attributes),
            num_outputs=len(reader.outputs),
        )
        graph.insert_after(reader, copy)
        for copied, output in zip(copy.outputs, reader.outputs, strict=True):
            copied.name = f"{_PREFIX}.{output.name}"
            copied.type, copied.shape = output.type, output.shape
            _add(added, copied, output)
            yield PlacePair(str(copied.name), "", str(output.name))
            yield from _copy_alike(graph, copied, output, added, most - 1)


def _add(added: dict[str, ir.Value], *values: ir.Value) -> None:
    for value in values:
        added[str(value.name)] = value
