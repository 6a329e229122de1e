"""Name nodes, scales and zero points after the torch modules they came from."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.coverage import dequantizer_of
from qdq.graph.edits import add_initializer
from qdq.graph.pairs import QDQ_OPS, constant_of, input_of, is_op, producer_of
from qdq.graph.work import WEIGHTED_OPS

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node that torch.onnx writes: the names of the modules around it, then its own name."""


def name_unnamed(model: ir.Model) -> None:
    """Give nodes of the main graph without a name the one that TensorRT's parser gives them."""
    for node in model.graph:
        if not node.name and node.outputs:
            node.name = f"node_of_{node.outputs[0].name}"


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
    """Name each node `MODULE/OP`, its scale `QUANTIZER.scale` and its zero point `QUANTIZER.zero_point`.

    A second node of the same kind in one module gets `_2`, and so on. TensorRT shows these names in its layer list.

    Args:
        scales: Mark -> the quantizer that it stands for (see `qdq.capture`). Each Q and DQ whose scale is a mark gets
            the scale of the quantizer. The module names that torch writes for a node may be wrong, so they are used
            only if there is no mark.
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
        """Rename everything and write the scales; types, shapes and other values stay."""
        scales = self._read_marks(model)
        self.quantizers = {scale.name for scale in scales.values()}

        # All names are decided before a scale is written: the marks are scales.
        places = {node: self._place_of(node, scales) for node in model.graph}
        counts: Counter[str] = Counter()
        for node, place in places.items():
            name = f"{place}/{node.op_type}"
            counts[name] += 1
            node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
            if node.op_type == "QuantizeLinear":
                _name_parameters(model.graph, node, place, scales.get(node))

        return ir.passes.PassResult(model, modified=True)

    def _read_marks(self, model: ir.Model) -> dict[ir.Node, QuantizerScale]:
        """The quantizer of each Q and DQ whose scale is a mark."""
        scales = {}
        for node in model.graph:
            scale = self._read_mark(node)
            if scale is not None:
                scales[node] = scale

        return scales

    def _read_mark(self, node: ir.Node) -> QuantizerScale | None:
        """The quantizer of a Q or DQ, if its scale is a mark.

        Returns:
            None for other nodes and other scales.
        """
        if not is_op(node, *QDQ_OPS):
            return None

        mark = constant_of(input_of(node, 1))
        if mark is None or not mark.size:
            return None
        return self._scales.get(float(mark.flat[0]))

    def _place_of(self, node: ir.Node, scales: Mapping[ir.Node, QuantizerScale]) -> str:
        """The name before the operator.

        It is the quantizer of a marked Q or DQ. For a product it is the module whose quantizer the product reads; for
        all other nodes, the module that torch has written.
        """
        if node in scales:
            return scales[node].name

        if is_op(node, *WEIGHTED_OPS):
            for dequantize in _dequantizers_of_operands(node):
                if dequantize in scales:
                    module, _, _ = scales[dequantize].name.rpartition(".")
                    return module

        return scope_of(node, self._modules)


def _dequantizers_of_operands(product: ir.Node) -> list[ir.Node]:
    """The DQ of the operands of a product: that of the weight, which may be before copies, then that of the input.

    Before pairs are merged, each of them belongs to the call or layer that reads it.
    """
    nodes = []
    weight = dequantizer_of(input_of(product, 1))
    if weight is not None and _reads_constant(weight):
        nodes.append(weight)

    for position in (1, 0):
        producer = producer_of(input_of(product, position))
        if is_op(producer, "DequantizeLinear"):
            nodes.append(producer)

    return nodes


def _reads_constant(dequantize: ir.Node) -> bool:
    """Whether a DQ reads constant codes, or the Q of a constant."""
    quantize = producer_of(dequantize.inputs[0])
    if quantize is None:
        return constant_of(dequantize.inputs[0]) is not None
    return constant_of(quantize.inputs[0]) is not None


def scope_of(node: ir.Node, modules: Collection[str] = frozenset()) -> str:
    """Dotted name of the torch module whose forward made the node, as torch has written it.

    Args:
        node: Any node.
        modules: Dotted names of all modules. Inside a forward that is set on an instance, torch writes paths relative
            to that instance, not to the model; these names reveal that.

    Returns:
        "" for the model itself, and if torch has written nothing.
    """
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return ""

    path = ""
    last_scope = ""
    module_scopes = ast.literal_eval(scopes)[:-1]
    for written_scope in module_scopes:
        scope = _strip_source(written_scope, modules)
        is_inside_last = bool(last_scope) and scope.startswith(f"{last_scope}.")
        if is_inside_last:
            path += scope.removeprefix(last_scope)
        elif f"{path}.{scope}" in modules:
            path = f"{path}.{scope}"
        else:
            path = scope
        last_scope = scope

    return str(path)


def _strip_source(scope: str, modules: Collection[str]) -> str:
    """A scope without the way by which torch's tracer of bytecode reached the model: its longest end that is a module.

    Args:
        scope: For example `L['self'].__closure__[0].cell_contents._model.head`.
        modules: Dotted names of all modules.

    Returns:
        "" if no end of such a scope is a module.
    """
    if "[" not in scope:
        return scope
    end = scope
    while end and end not in modules:
        _, _, end = end.partition(".")
    return end


def _name_parameters(
    graph: ir.Graph, quantize: ir.Node, place: str, quantizer: QuantizerScale | None
) -> None:
    """Give the scale and zero point of a Q and of its DQ the name of the quantizer.

    The exporter shares equal constants between quantizers. Here each quantizer gets its own constants, so that the name
    says whose they are.

    Args:
        graph: The graph.
        quantize: The Q.
        place: Name before `.scale`.
        quantizer: The scale to write; None keeps the present one.
    """
    users = [quantize]
    for user, _ in quantize.outputs[0].uses():
        if user.op_type == "DequantizeLinear":
            users.append(user)

    for position, suffix in ((1, "scale"), (2, "zero_point")):
        shared = quantize.inputs[position]
        if shared is None or shared.const_value is None:
            continue

        array = shared.const_value.numpy()
        if quantizer is not None and suffix == "scale":
            array = quantizer.scale

        parameter = _add_parameter(graph, f"{place}.{suffix}", array)
        for user in users:
            user.replace_input_with(position, parameter)
        if not shared.uses():
            graph.initializers.pop(str(shared.name), None)


def _add_parameter(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer with a name and numbers; it exists already if a quantizer is used twice.

    An initializer of the same name with other numbers belongs to another quantizer: then the new name gets a number.
    """
    number = 1
    candidate = name
    while candidate in graph.initializers:
        existing = graph.initializers[candidate]
        if _is_equal(constant_of(existing), array):
            return existing

        number += 1
        candidate = f"{name}_{number}"

    return add_initializer(graph, candidate, array)


def _is_equal(constant: npt.NDArray[Any] | None, array: npt.NDArray[Any]) -> bool:
    """Whether a constant from `constant_of` has the type and the numbers of an array."""
    if constant is None or constant.dtype != array.dtype:
        return False
    return np.array_equal(constant, array)
