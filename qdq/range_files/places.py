"""Which tensors of an ONNX graph the quantizers of a torch model stand at, and what a range file may call them.

A layer is found by its node: by the scopes that torch's exporter wrote down, by the name of the node (`MODULE/OP` of
qdq, `/layer1/layer1.0/conv1/Conv` of the exporter before), or by the name of its weight. The quantizer of a function
call is found by its own name in files of qdq, else by the node of the call where `ranges.calls` is sure of it. What
stands in front of the node is followed upwards through Q/DQ and operators that keep the range, so that the float graph,
ONNX Runtime's QDQ graph and qdq's own all lead to the same quantizers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from qdq.graph.coverage import TRANSPARENT_OPS, WEIGHTED_OPS, module_of, output_axis
from qdq.graph.names import SCOPES, scope_of
from qdq.graph.pairs import is_op
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.attention import QuantMultiheadAttention
from qdq.nn.functions import QuantFunctionsMixin
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.range_files.aimet import MODULE_INPUT, MODULE_OUTPUT
from qdq.range_files.calls import find_calls, function_of

_SAME_RANGE = ("QuantizeLinear", "DequantizeLinear", *TRANSPARENT_OPS)
_WEIGHT_NAME = re.compile(r"(?:(.*)\.)?weight(?:[._].*)?")  # ONNX Runtime adds "_quantized"


@dataclass(frozen=True)
class Place:
    """A tensor that a quantizer quantizes.

    Args:
        tensor: What a file that is written calls it.
        names: Everything that a file may call it, the most exact first.
        is_weight: Whether it is a weight.
        axis: The only axis that channels may lie on, None where any number of channels that fits is right.
        dequantize: The DequantizeLinear behind it, if the graph has one.
    """

    tensor: str
    names: tuple[str, ...]
    is_weight: bool
    axis: int | None = None
    dequantize: ir.Node | None = None


@dataclass(frozen=True)
class Places:
    """Where the quantizers of a model stand.

    Args:
        of: Quantizer -> its places; those of a module that runs several times are several.
        reasons: Quantizer of a function call -> why its call was not found in the graph.
    """

    of: dict[str, list[Place]]
    reasons: dict[str, str]


def list_places(model: nn.Module, graph: ir.Graph | None = None) -> Places:
    """The places of every quantizer.

    Args:
        model: A swapped model.
        graph: A graph of the same model, with or without Q/DQ. Without one, a place is what a file that names torch
            modules calls it; a quantizer that stands in a forward by hand has none.
    """
    finder = _Finder(model, graph)
    names = {id(quantizer): name for name, quantizer in named_quantizers(model)}
    places: dict[str, list[Place]] = {name: [] for name in names.values()}
    for module_name, module in model.named_modules():
        if isinstance(module, QuantInputMixin):
            found = finder.find_layer(module_name, module)
        elif isinstance(module, QuantFunctionsMixin):
            found = finder.find_functions(module_name, module)
        else:
            continue
        for quantizer, place in found:
            places[names[id(quantizer)]].append(place)
    for name in places:
        places[name] += finder.find_by_name(name, {place.tensor for place in places[name]})
    return Places(
        places, {name: reason for name, reason in finder.reasons.items() if not places[name]}
    )


class _Finder:
    """The nodes of a graph by the torch module whose forward made them."""

    def __init__(self, model: nn.Module, graph: ir.Graph | None) -> None:
        self._modules = {name for name, _ in model.named_modules()}
        self._nodes: dict[str, list[ir.Node]] = defaultdict(list)
        self._dequantizers: dict[str, list[ir.Node]] = defaultdict(list)
        self._owners: dict[ir.Node, str | None] = {}
        self._has_graph = graph is not None
        self.reasons: dict[str, str] = {}
        for node in graph or ():
            owner = self._owner_of(node)
            self._owners[node] = owner
            if is_op(node, "DequantizeLinear"):
                self._dequantizers[module_of(node)].append(node)
            elif owner is not None and not is_op(node, "QuantizeLinear") and _has_operands(node):
                self._nodes[owner].append(node)

    def find_layer(
        self, name: str, layer: QuantInputMixin
    ) -> Iterator[tuple[TensorQuantizer, Place]]:
        """The input and the weights of a layer."""
        quantizers = layer.quantizers()
        paths = {
            attribute: _join(name, parameter)
            for attribute, parameter in (
                layer.weights_of(layer) if isinstance(layer, QuantMixin) else {}
            ).items()
        }
        if isinstance(layer, QuantMultiheadAttention):
            yield from self._find_projections(name, layer)
        # A layer with a forward of its own is several nodes, and its quantizers are told by their names only.
        nodes = [] if layer.replaces_forward else self._entries_of(name, layer)
        given = MODULE_INPUT.format(name)
        for node in nodes:
            yield layer.input_quantizer, self._place(node.inputs[0], (given,))
            for attribute, path in paths.items():
                yield quantizers[attribute], self._weight_place(node, path)
        if nodes:
            return
        if not self._has_graph and not layer.replaces_forward:
            yield layer.input_quantizer, Place(given, (given,), is_weight=False)
        for attribute, path in paths.items():
            yield quantizers[attribute], Place(path, (path,), is_weight=True)

    def _find_projections(
        self, name: str, layer: QuantMultiheadAttention
    ) -> Iterator[tuple[TensorQuantizer, Place]]:
        """The inputs of attention: one product with weights for query, key and value that are one tensor, or several.

        The float module computes `out_proj` in its own forward, last; the quantized one calls it as a module.
        """
        products = [
            node
            for node in self._entries_of(name, layer)
            if _is_constant(list(_upstream(node.inputs[1]))[-1])
        ]
        output = layer.out_proj
        if products and not self._nodes.get(_join(name, "out_proj")):
            last = products.pop()
            if isinstance(output, QuantInputMixin):
                yield output.input_quantizer, self._place(last.inputs[0])
        if 1 <= len(products) <= 3:  # more are several runs, and nothing says which is whose
            query, key, value = products[0], products[min(1, len(products) - 1)], products[-1]
            yield layer.input_quantizer, self._place(query.inputs[0])
            yield layer._key_quantizer, self._place(key.inputs[0])
            yield layer._value_quantizer, self._place(value.inputs[0])

    def find_functions(
        self, name: str, module: QuantFunctionsMixin
    ) -> Iterator[tuple[TensorQuantizer, Place]]:
        """The operands of the calls that a module's own forward makes, where the file does not name the quantizers."""
        for site, operands in module._function_quantizers.items():
            function = function_of(site)
            calls, reason = find_calls(function, module._function_calls, self._nodes.get(name, []))
            nodes = [node for called, node in calls if called == site]
            for operand, attribute in operands.items():
                quantizer, path = getattr(module, attribute), _join(name, attribute)
                if reason and self._has_graph:
                    self.reasons[path] = reason
                for node in () if self._dequantizers.get(path) else nodes:
                    if function in ("linear", "conv1d", "conv2d") and operand == 1:
                        yield quantizer, self._weight_place(node)
                    elif operand < len(node.inputs) and not _is_constant(node.inputs[operand]):
                        yield quantizer, self._place(node.inputs[operand])

    def find_by_name(self, quantizer: str, known: set[str]) -> Iterator[Place]:
        """Pairs that are called after the quantizer itself, as in files that qdq wrote."""
        for node in self._dequantizers.get(quantizer, []):
            place = self._place(
                node.outputs[0], is_weight=_is_constant(_float_value(node.outputs[0]))
            )
            if place.tensor not in known:
                known.add(place.tensor)
                yield place

    def _entries_of(self, name: str, layer: QuantInputMixin) -> list[ir.Node]:
        """The nodes that read what a layer is given: one for each time it runs."""
        nodes = self._nodes.get(name, [])
        if isinstance(layer, QuantMixin):
            return [node for node in nodes if is_op(node, *WEIGHTED_OPS)]
        return [node for node in nodes if node.inputs and not self._is_inside(node.inputs[0], name)]

    def _is_inside(self, value: ir.Value | None, module: str) -> bool:
        producer = None if value is None else value.producer()
        is_computed = producer is not None and self._owners.get(producer) == module
        return value is None or is_computed or _is_constant(value)

    def _weight_place(self, node: ir.Node, *names: str) -> Place:
        value = node.inputs[1]
        producer = value.producer() if value is not None else None
        is_direct = is_op(producer, "DequantizeLinear")
        shape = value.shape if value is not None else None
        axis = output_axis(node, len(shape)) if is_direct and shape is not None else None
        return self._place(value, names, is_weight=True, axis=axis)

    def _place(
        self,
        value: ir.Value | None,
        names: tuple[str, ...] = (),
        *,
        is_weight: bool = False,
        axis: int | None = None,
    ) -> Place:
        chain = list(_upstream(value))
        names += tuple(name for one in chain for name in self._names_of(one))
        dequantize = next(
            (one.producer() for one in chain if is_op(one.producer(), "DequantizeLinear")), None
        )
        return Place(str(_float_value(value).name), names, is_weight, axis, dequantize)

    def _names_of(self, value: ir.Value) -> Iterator[str]:
        """The tensor's own name, and the module that it is the output of."""
        yield str(value.name)
        producer = value.producer()
        owner = None if producer is None else self._owners.get(producer)
        if owner and any(self._owners.get(user) != owner for user, _ in value.uses()):
            yield MODULE_OUTPUT.format(owner)

    def _owner_of(self, node: ir.Node) -> str | None:
        """The torch module whose forward made a node, None if nothing says so."""
        if (scope := _read_scope(node)) and scope in self._modules:
            return scope
        name = node.name or ""
        if "/" in name and (module := self._module_of_path(name)) is not None:
            return module
        if scope == "":
            return ""
        return self._owner_of_weight(node) if is_op(node, *WEIGHTED_OPS) else None

    def _module_of_path(self, name: str) -> str | None:
        """`MODULE/OP`, or `/layer1/layer1.0/relu_1/Relu`, where a part may repeat those before and be numbered."""
        parts: list[str] = []
        for part in name.rpartition("/")[0].split("/"):
            if parts and part.startswith(f"{parts[-1]}."):
                parts.pop()
            parts.append(part)
        path = ".".join(filter(None, parts))
        numbered = re.sub(r"_\d+$", "", path)
        return path if path in self._modules else numbered if numbered in self._modules else None

    def _owner_of_weight(self, node: ir.Node) -> str | None:
        """The module whose parameter a node multiplies with."""
        for value in _upstream(node.inputs[1] if len(node.inputs) > 1 else None):
            match = _WEIGHT_NAME.fullmatch(str(value.name))
            if match is not None and (match[1] or "") in self._modules:
                return match[1] or ""
        return None


def _read_scope(node: ir.Node) -> str | None:
    """What torch's exporter says of the module, "" for the model itself; None where it says nothing."""
    try:
        return scope_of(node) if SCOPES in node.metadata_props else None
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ):  # the metadata of others
        return None


def _has_operands(node: ir.Node) -> bool:
    """Whether the inputs that are asked for are there."""
    return (
        len(node.inputs) > 0 and None not in node.inputs[: 2 if is_op(node, *WEIGHTED_OPS) else 1]
    )


def _upstream(value: ir.Value | None) -> Iterator[ir.Value]:
    """A tensor, and those it has its values from."""
    while value is not None:
        yield value
        producer = value.producer()
        value = (
            producer.inputs[0] if is_op(producer, *_SAME_RANGE) and producer is not None else None
        )


def _float_value(value: ir.Value | None) -> ir.Value:
    """The tensor before Q/DQ; the operand itself where there is none above it."""
    assert value is not None  # noqa: S101  # the operands of these operators are required
    chain = list(_upstream(value))
    for before, one in enumerate(chain):
        if is_op(one.producer(), "DequantizeLinear"):
            codes = chain[before + 1]
            return chain[before + 2] if is_op(codes.producer(), "QuantizeLinear") else codes
    return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and (value.is_initializer() or is_op(value.producer(), "Constant"))


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute
