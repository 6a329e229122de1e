"""The tensors of an ONNX graph that the quantizers of a torch model quantize, and their names in range files.

A layer is found by its node: by the scopes that torch's exporter wrote, by the name of the node (`MODULE/OP` of qdq,
`/layer1/layer1.0/conv1/Conv` of the earlier exporter), or by the name of its weight. The quantizer of a function call
is found by its own name in files of qdq, else by the node of the call if `range_files.calls` is sure of it. From the
node, the search goes upwards through Q/DQ and operators that keep the range, so that the float graph, ONNX Runtime's
QDQ graph and qdq's own all lead to the same quantizers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from qdq.functions import FUNCTIONS
from qdq.graph.coverage import TRANSPARENT_OPS, module_of, output_axis
from qdq.graph.names import SCOPES, scope_of
from qdq.graph.pairs import is_op
from qdq.graph.work import WEIGHTED_OPS
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.nn.attention import QuantMultiheadAttention
from qdq.nn.functions import QuantFunctionsMixin
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.range_files.aimet import MODULE_INPUT, MODULE_OUTPUT
from qdq.range_files.calls import find_calls, function_of
from qdq.range_files.format import METADATA_ERRORS

_SAME_RANGE = ("QuantizeLinear", "DequantizeLinear", *TRANSPARENT_OPS)
# ONNX Runtime adds "_quantized".
_WEIGHT_NAME = re.compile(r"(?:(?P<module>.*)\.)?weight(?:[._].*)?")


@dataclass(frozen=True)
class Place:
    """A tensor that a quantizer quantizes.

    Args:
        tensor: Its name in a file that is written.
        names: All names that it may have in a file, the most exact first.
        is_weight: Whether it is a weight.
        axis: The only possible axis of channels; None if any axis with the right number of channels is accepted.
        dequantize: The DequantizeLinear after it, if the graph has one.
    """

    tensor: str
    names: tuple[str, ...]
    is_weight: bool
    axis: int | None = None
    dequantize: ir.Node | None = None


@dataclass(frozen=True)
class Places:
    """The places of the quantizers of a model.

    Args:
        of: Quantizer -> its places; more than one if a module runs several times.
        reasons: Quantizer of a function call -> why its call was not found in the graph.
    """

    of: dict[str, list[Place]]
    reasons: dict[str, str]


def list_places(model: nn.Module, graph: ir.Graph | None = None) -> Places:
    """The places of every quantizer.

    Args:
        model: A swapped model.
        graph: A graph of the same model, with or without Q/DQ. Without one, a place has its name in a file with the
            names of torch modules; a quantizer that a forward calls directly has no place.
    """
    finder = _Finder(model, graph)
    quantizers = dict(named_quantizers(model))
    names = {quantizer: name for name, quantizer in quantizers.items()}
    places: dict[str, list[Place]] = {name: [] for name in quantizers}
    for module_name, module in model.named_modules():
        for quantizer, place in finder.find_module(module_name, module):
            places[names[quantizer]].append(place)

    reasons = {}
    for name, of_quantizer in places.items():
        of_quantizer += finder.find_by_name(name, {place.tensor for place in of_quantizer})
        if not of_quantizer and name in finder.reasons:
            reasons[name] = finder.reasons[name]
    return Places(places, reasons)


_Found = Iterator[tuple[TensorQuantizer, Place]]


class _Finder:
    """The nodes of a graph by the torch module whose forward made them.

    Args:
        model: A swapped model.
        graph: The graph, or None.

    Attributes:
        reasons: Quantizer of a function call -> why its call was not found in the graph.
    """

    def __init__(self, model: nn.Module, graph: ir.Graph | None) -> None:
        self._has_graph = graph is not None
        self._owners = _OwnerFinder(model)
        self._nodes: dict[str, list[ir.Node]] = defaultdict(list)
        self._dequantizers: dict[str, list[ir.Node]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        for node in graph or ():
            owner = self._owners.find(node)
            if is_op(node, "DequantizeLinear"):
                self._dequantizers[module_of(node)].append(node)
            elif owner is not None and not is_op(node, "QuantizeLinear") and _has_operands(node):
                self._nodes[owner].append(node)

    def find_module(self, name: str, module: nn.Module) -> _Found:
        """Find the places of the quantizers of a module.

        Args:
            name: Dotted name.
            module: The module.

        Yields:
            Quantizers, each with one of its places.
        """
        if isinstance(module, QuantInputMixin):
            yield from self._find_layer(name, module)
        elif isinstance(module, QuantFunctionsMixin):
            yield from self._find_functions(name, module)

    def find_by_name(self, quantizer: str, tensors: set[str]) -> list[Place]:
        """The places of pairs that are named after the quantizer itself, as in files that qdq wrote.

        Args:
            quantizer: Dotted name.
            tensors: Tensors of places that are already listed; they are left out.
        """
        places: dict[str, Place] = {}
        for node in self._dequantizers.get(quantizer, []):
            is_weight = _is_constant(_float_value(node.outputs[0]))
            place = self._make_place(node.outputs[0], is_weight=is_weight)
            if place.tensor not in tensors:
                places.setdefault(place.tensor, place)
        return list(places.values())

    # -- layers ------------------------------------------------------------------------------------------------------

    def _find_layer(self, name: str, layer: QuantInputMixin) -> _Found:
        """The input and the weights of a layer.

        Without a node, the weights still have their names in the model. Without a graph, so does the input.

        Args:
            name: Dotted name.
            layer: The layer.
        """
        if isinstance(layer, QuantMultiheadAttention):
            yield from self._find_projections(name, layer)
        # The quantizers of a layer with its own forward, which becomes several nodes, are found by name only.
        nodes = [] if layer.replaces_forward else self._list_entries(name, layer)
        weights = _list_weights(name, layer)
        input_name = MODULE_INPUT.format(name)
        for node in nodes:
            yield layer.input_quantizer, self._make_place(node.inputs[0], (input_name,))
            for quantizer, weight_name in weights:
                yield quantizer, self._make_weight_place(node, weight_name)
        if nodes:
            return
        if not self._has_graph and not layer.replaces_forward:
            yield layer.input_quantizer, Place(input_name, (input_name,), is_weight=False)
        for quantizer, weight_name in weights:
            yield quantizer, Place(weight_name, (weight_name,), is_weight=True)

    def _find_projections(self, name: str, layer: QuantMultiheadAttention) -> _Found:
        """The inputs of attention: one product if query, key and value are one tensor, or several.

        The float module computes `out_proj` in its own forward, last; the quantized one calls it as a module.

        Args:
            name: Dotted name.
            layer: The layer.
        """
        products = []
        for node in self._list_entries(name, layer):
            if _is_constant(list(_upstream(node.inputs[1]))[-1]):
                products.append(node)

        output = layer.out_proj
        if products and not self._nodes.get(_join(name, "out_proj")):
            output_product = products.pop()
            if isinstance(output, QuantInputMixin):
                yield output.input_quantizer, self._make_place(output_product.inputs[0])
        # More products are several runs, and nothing shows which belong together.
        if not 1 <= len(products) <= 3:
            return
        query, value = products[0], products[-1]
        key = products[min(1, len(products) - 1)]
        yield layer.input_quantizer, self._make_place(query.inputs[0])
        yield layer._key_quantizer, self._make_place(key.inputs[0])
        yield layer._value_quantizer, self._make_place(value.inputs[0])

    def _list_entries(self, name: str, layer: QuantInputMixin) -> list[ir.Node]:
        """The nodes that read the input of a layer: one for each time it runs.

        Args:
            name: Dotted name.
            layer: The layer.
        """
        entries = []
        has_weight = isinstance(layer, QuantMixin)
        for node in self._nodes.get(name, []):
            if has_weight:
                is_entry = is_op(node, *WEIGHTED_OPS)
            else:
                is_entry = len(node.inputs) > 0 and self._is_outside(node.inputs[0], name)
            if is_entry:
                entries.append(node)
        return entries

    def _is_outside(self, value: ir.Value | None, module: str) -> bool:
        """Whether a tensor is computed outside of a module.

        Args:
            value: An operand of a node of the module.
            module: Dotted name.
        """
        if value is None or _is_constant(value):
            return False
        producer = value.producer()
        return producer is None or self._owners.get(producer) != module

    # -- function calls ----------------------------------------------------------------------------------------------

    def _find_functions(self, name: str, module: QuantFunctionsMixin) -> _Found:
        """The operands of the calls that a module's own forward makes.

        Operands are left out if the file names their quantizers, because `find_by_name` lists these.

        Args:
            name: Dotted name.
            module: The module.
        """
        for site, operands in module.function_quantizers.items():
            function = function_of(site)
            calls, reason = find_calls(function, module.function_calls, self._nodes.get(name, []))
            nodes = [node for called, node in calls if called == site]
            for operand, attribute in operands.items():
                path = _join(name, attribute)
                if reason and self._has_graph:
                    self.reasons[path] = reason
                if path in self._dequantizers:
                    continue
                quantizer = getattr(module, attribute)
                factors = FUNCTIONS[function].factors
                position = factors.index(operand) if operand in factors else operand
                is_weight = position == 1 and quantizer.axis is not None
                for place in self._list_operand_places(position, nodes, is_weight=is_weight):
                    yield quantizer, place

    def _list_operand_places(
        self, operand: int, nodes: Iterable[ir.Node], *, is_weight: bool
    ) -> list[Place]:
        """The places of one operand in all nodes of a call.

        Args:
            operand: Position among the inputs of a node.
            nodes: The nodes of the call.
            is_weight: Whether it is the weight of a product.
        """
        if is_weight:
            products = [node for node in nodes if is_op(node, *WEIGHTED_OPS)]
            return [self._make_weight_place(node) for node in products]
        places = []
        for node in nodes:
            if operand < len(node.inputs) and not _is_constant(node.inputs[operand]):
                places.append(self._make_place(node.inputs[operand]))
        return places

    # -- places ------------------------------------------------------------------------------------------------------

    def _make_weight_place(self, node: ir.Node, *names: str) -> Place:
        """The place of the second operand of a node.

        The axis of its channels is certain only if the operand is dequantized directly before the node, without a
        transpose.

        Args:
            node: A node with a weight.
            *names: Names that come before those of the graph.
        """
        value = node.inputs[1]
        axis = None
        shape = None if value is None else value.shape
        if value is not None and shape is not None and _is_dequantized(value):
            axis = output_axis(node, len(shape))
        return self._make_place(value, names, is_weight=True, axis=axis)

    def _make_place(
        self,
        value: ir.Value | None,
        names: Iterable[str] = (),
        *,
        is_weight: bool = False,
        axis: int | None = None,
    ) -> Place:
        """The place of an operand.

        Args:
            value: The operand.
            names: Names that come before those of the graph.
            is_weight: As for `Place`.
            axis: As for `Place`.
        """
        all_names = list(names)
        dequantize = None
        for ancestor in _upstream(value):
            all_names += self._list_names(ancestor)
            if dequantize is None and _is_dequantized(ancestor):
                dequantize = ancestor.producer()
        tensor = str(_float_value(value).name)
        return Place(tensor, tuple(all_names), is_weight, axis, dequantize)

    def _list_names(self, value: ir.Value) -> list[str]:
        """The tensor's own name, and its name as the output of a module.

        A tensor is the output of a module if another module reads it.

        Args:
            value: A tensor of the graph.
        """
        names = [str(value.name)]
        producer = value.producer()
        owner = None if producer is None else self._owners.get(producer)
        if owner and any(self._owners.get(user) != owner for user, _ in value.uses()):
            names.append(MODULE_OUTPUT.format(owner))
        return names


class _OwnerFinder:
    """Finds the torch module whose forward made a node, by its scope, its name or its weight.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name for name, _ in model.named_modules()}
        self._owners: dict[ir.Node, str | None] = {}

    def get(self, node: ir.Node) -> str | None:
        """The result of an earlier `find`; None for any other node."""
        return self._owners.get(node)

    def find(self, node: ir.Node) -> str | None:
        """The dotted name of the module that made a node, None if unknown.

        Args:
            node: A node of the graph.
        """
        owner = self._owners[node] = self._find(node)
        return owner

    def _find(self, node: ir.Node) -> str | None:
        """The module from the scope, else from the name of the node, else from the name of the weight.

        The scope "", of the model itself, counts only if the name of the node has no module.

        Args:
            node: A node of the graph.
        """
        scope = _read_scope(node)
        if scope and scope in self._modules:
            return scope
        module = self._module_of_path(node.name or "")
        if module is not None:
            return module
        if scope == "":
            return ""
        if is_op(node, *WEIGHTED_OPS):
            return self._owner_of_weight(node)
        return None

    def _module_of_path(self, name: str) -> str | None:
        """The module in the name of a node, None if there is none.

        qdq writes `MODULE/OP`. The earlier exporter wrote `/layer1/layer1.0/relu_1/Relu`, where a part may repeat the
        previous one and have a number.

        Args:
            name: Name of a node.
        """
        if "/" not in name:
            return None
        parts: list[str] = []
        for part in name.rpartition("/")[0].split("/"):
            if parts and part.startswith(f"{parts[-1]}."):
                parts.pop()
            parts.append(part)
        path = ".".join(filter(None, parts))
        for candidate in (path, re.sub(r"_\d+$", "", path)):
            if candidate in self._modules:
                return candidate
        return None

    def _owner_of_weight(self, node: ir.Node) -> str | None:
        """The module whose parameter a node multiplies with.

        Args:
            node: A node with a weight.

        Returns:
            Dotted name, None if the weight has no name of the model.
        """
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        for value in _upstream(weight):
            match = _WEIGHT_NAME.fullmatch(str(value.name))
            module = None if match is None else match.group("module") or ""
            if module in self._modules:
                return module
        return None


def _list_weights(name: str, layer: QuantInputMixin) -> list[tuple[TensorQuantizer, str]]:
    """The weight quantizers of a layer, and the dotted names of their weights.

    Args:
        name: Dotted name of the layer.
        layer: The layer; one without weights gives an empty list.
    """
    if not isinstance(layer, QuantMixin):
        return []
    quantizers = layer.quantizers()
    weights = []
    for attribute, parameter in layer.weights_of(layer).items():
        weights.append((quantizers[attribute], _join(name, parameter)))
    return weights


def _read_scope(node: ir.Node) -> str | None:
    """The module that torch's exporter wrote for a node.

    Returns:
        Dotted name, "" for the model itself; None if there is none, or if it cannot be parsed.
    """
    if SCOPES not in node.metadata_props:
        return None
    try:
        return scope_of(node)
    except METADATA_ERRORS:
        return None


def _has_operands(node: ir.Node) -> bool:
    """Whether the node has the inputs that are read here.

    Args:
        node: A node; one with a weight needs two inputs.
    """
    num_operands = 2 if is_op(node, *WEIGHTED_OPS) else 1
    return len(node.inputs) > 0 and None not in node.inputs[:num_operands]


def _upstream(value: ir.Value | None) -> Iterator[ir.Value]:
    """A tensor, and the tensors before it that its values come from.

    The path goes through the first inputs of Q, DQ and operators that keep the range.

    Args:
        value: An operand; None gives nothing.
    """
    while value is not None:
        yield value
        producer = value.producer()
        if producer is None or not is_op(producer, *_SAME_RANGE):
            return
        value = producer.inputs[0]


def _float_value(value: ir.Value | None) -> ir.Value:
    """The tensor before Q/DQ; the operand itself if there are none before it.

    If the codes are stored, it is the tensor of the codes.

    Args:
        value: An operand; not None.
    """
    assert value is not None  # noqa: S101  # the operands of these operators are required
    chain = list(_upstream(value))
    for position, ancestor in enumerate(chain):
        if _is_dequantized(ancestor):
            codes = chain[position + 1]
            is_computed = is_op(codes.producer(), "QuantizeLinear")
            return chain[position + 2] if is_computed else codes
    return value


def _is_dequantized(value: ir.Value) -> bool:
    """Whether a tensor comes out of a DequantizeLinear."""
    return is_op(value.producer(), "DequantizeLinear")


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a tensor is stored in the graph."""
    if value is None:
        return False
    return value.is_initializer() or is_op(value.producer(), "Constant")


def _join(module: str, attribute: str) -> str:
    """Dotted name of an attribute of a module, whose name is "" for the model itself."""
    return f"{module}.{attribute}" if module else attribute
