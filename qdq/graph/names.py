"""Nodes, scales and zero points named after the torch modules they came from."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.coverage import WEIGHTED_OPS, dequantizer_of
from qdq.graph.pairs import constant_of, input_of, is_op

SCOPES = "pkg.torch.onnx.name_scopes"  # written by torch.onnx: the modules around a node, then the node itself


@dataclass(frozen=True)
class QuantizerScale:
    """A quantizer and its scale.

    Args:
        name: Dotted name of the quantizer.
        scale: float32; 0-D per tensor, 1-D per channel.
    """

    name: str
    scale: npt.NDArray[np.float32]


class NameNodes(ir.passes.InPlacePass):
    """Node `MODULE/OP`, scale `QUANTIZER.scale`, zero point `QUANTIZER.zero_point`.

    A second node of the same kind in one module gets `_2`, and so on. TensorRT shows these names in its layer list.

    Args:
        scales: Mark -> the quantizer that it stands for (see `qdq.capture`). The scale of each Q and DQ that holds a
            mark becomes that of the quantizer. What torch writes of the modules around a node may be wrong, and decides
            only where there is no mark.
        modules: Dotted names of all modules of the model.
    """

    def __init__(
        self,
        scales: Mapping[float, QuantizerScale] | None = None,
        modules: Collection[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.quantizers: set[str] = set()
        """Quantizers whose pair is in the graph."""
        self._scales = scales or {}
        self._modules = modules

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename everything and put the scales in; types, shapes and other values stay."""
        marked = {
            node: scale for node in model.graph if (scale := self._read_mark(node)) is not None
        }
        self.quantizers = {scale.name for scale in marked.values()}
        places = {node: self._place_of(node, marked) for node in model.graph}
        used: Counter[str] = Counter()
        for node, place in places.items():
            name = f"{place}/{node.op_type}"
            used[name] += 1
            node.name = name if used[name] == 1 else f"{name}_{used[name]}"
            if node.op_type == "QuantizeLinear":
                _name_parameters(model, node, place, marked.get(node))
        return ir.passes.PassResult(model, modified=True)

    def _read_mark(self, node: ir.Node) -> QuantizerScale | None:
        if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
            return None
        scale = constant_of(input_of(node, 1))
        return None if scale is None or not scale.size else self._scales.get(float(scale.flat[0]))

    def _place_of(self, node: ir.Node, marked: Mapping[ir.Node, QuantizerScale]) -> str:
        """The quantizer of a Q or DQ; the module whose quantizer a product reads; else what torch says."""
        if node in marked:
            return marked[node].name
        if is_op(node, *WEIGHTED_OPS):
            for dequantize in _own_dequantizers(node):
                if dequantize in marked:
                    return marked[dequantize].name.rpartition(".")[0]
        return scope_of(node, self._modules)


def _own_dequantizers(node: ir.Node) -> list[ir.Node]:
    """The DQ at the operands of a product: that of the weight, which may stand behind copies, then that of the input.

    A quantizer quantizes for the call or the layer that has it alone, as long as no pairs are merged.
    """
    weight = dequantizer_of(input_of(node, 1))
    nodes = [] if weight is None or not _is_of_constant(weight) else [weight]
    for value in node.inputs[1::-1]:
        producer = None if value is None else value.producer()
        if producer is not None and is_op(producer, "DequantizeLinear"):
            nodes.append(producer)
    return nodes


def _is_of_constant(dequantize: ir.Node) -> bool:
    codes = dequantize.inputs[0]
    quantize = None if codes is None else codes.producer()
    return constant_of(codes if quantize is None else quantize.inputs[0]) is not None


def scope_of(node: ir.Node, modules: Collection[str] = frozenset()) -> str:
    """Dotted name of the torch module whose forward made the node, as torch has written it; "" for the model itself.

    Args:
        node: Any node.
        modules: Dotted names of all modules. Inside a forward that is set on the instance torch counts paths from
            there, not from the model; with these it is noticed.
    """
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return ""
    path, written = "", ""
    for scope in ast.literal_eval(scopes)[:-1]:
        if written and scope.startswith(f"{written}."):
            path += scope.removeprefix(written)
        elif f"{path}.{scope}" in modules:
            path = f"{path}.{scope}"
        else:
            path = scope
        written = scope
    return str(path)


def _name_parameters(
    model: ir.Model, node: ir.Node, place: str, marked: QuantizerScale | None
) -> None:
    """Give a node's scale and zero point the quantizer's name, as values of its own.

    The exporter shares equal constants between quantizers; here each gets its own, so that a name says whose it is.
    """
    users = [
        node,
        *(user for user, _ in node.outputs[0].uses() if user.op_type == "DequantizeLinear"),
    ]
    for position, suffix in ((1, "scale"), (2, "zero_point")):
        old = node.inputs[position]
        if old is None or old.const_value is None:
            continue
        array = old.const_value.numpy()
        if marked is not None and suffix == "scale":
            array = marked.scale
        new = _register(model.graph, f"{place}.{suffix}", array)
        for user in users:
            user.replace_input_with(position, new)
        if not old.uses():
            model.graph.initializers.pop(str(old.name), None)


def _register(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer of that name and with these numbers: there already where a quantizer is used twice.

    One of the same name and with other numbers is not of the same quantizer: this one is numbered then.
    """
    number = 1
    candidate = name
    while (existing := graph.initializers.get(candidate)) is not None:
        if _is_equal(constant_of(existing), array):
            return existing
        number += 1
        candidate = f"{name}_{number}"
    tensor = ir.tensor(array, name=candidate)
    value = ir.Value(
        name=candidate,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _is_equal(constant: npt.NDArray[Any] | None, array: npt.NDArray[Any]) -> bool:
    return (
        constant is not None and constant.dtype == array.dtype and np.array_equal(constant, array)
    )
