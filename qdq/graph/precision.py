"""Convert the float part of a quantized graph to float16 or bfloat16: TensorRT 11 takes types literally (rule 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import defs

from qdq.errors import ArgumentError, ExportError
from qdq.graph.edits import add_initializer, is_needed
from qdq.graph.opset import FIRST_WITH_HALF_SCALES
from qdq.graph.pairs import constant_of
from qdq.graph.precision_rules import (
    KeptNode,
    Target,
    choose_float32,
    is_float,
    parameter_types,
    takes_either,
)
from qdq.graph.work import WEIGHTED_OPS
from qdq.text import list_names

_FLOAT = ir.DataType.FLOAT
_HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Ends of the names of converted values.
_SUFFIXES = {_FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


class ConvertPrecision(ir.passes.InPlacePass):
    """Convert the float32 values of the main graph to 16 bit, except those that `graph.precision_rules` keeps.

    Every value has one type, and one Cast serves all readers that need the other type. So there are no chains of Casts,
    and a region of float32 nodes has one Cast in and one out. Int8 codes do not change. A QuantizeLinear has the type
    of its input: after a float32 value its scale stays float32, and the scale of its DequantizeLinear is a 16 bit copy,
    which leads into the 16 bit region without a Cast.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        peaks: Largest magnitude of values by name, for FLOAT16 (`check.precision.measure_peaks`).
        keep_io_types: Leave inputs and outputs of the graph in float32.

    Raises:
        ArgumentError: Another dtype.
        ExportError: The opset is too old; the model is then unchanged.
    """

    def __init__(
        self,
        dtype: ir.DataType,
        *,
        peaks: Mapping[str, float] | None = None,
        keep_io_types: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in _HALF_TYPES:
            raise ArgumentError(
                f"dtype is {dtype.name}; it must be FLOAT16 or BFLOAT16.", "use FLOAT16."
            )
        self.kept: tuple[KeptNode, ...] = ()
        """Nodes, inputs and outputs that stay float32, after a run."""
        self.casts = 0
        """Number of Casts in the graph, after a run."""
        self._dtype = dtype
        self._peaks = peaks or {}
        self._keep_io_types = keep_io_types

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Decide which nodes stay float32, change the types of the others, then connect the two."""
        graph = model.graph
        opset = model.opset_imports.get("", 0)
        target = Target(self._dtype, opset, self._peaks, self._keep_io_types)
        _require_opset(graph, target)

        reasons = choose_float32(graph, target)
        rewriter = _Rewriter(graph, target, frozenset(reasons))
        rewriter.retype()
        rewriter.connect()
        _fold_casts(graph)

        kept_nodes = [
            KeptNode(node.name or "", node.op_type, reason) for node, reason in reasons.items()
        ]
        self.kept = (*rewriter.kept_io, *kept_nodes)
        self.casts = sum(node.op_type == "Cast" for node in graph)
        return ir.passes.PassResult(model, modified=True)


# --- opset ----------------------------------------------------------------------------------------------------------


def _require_opset(graph: ir.Graph, target: Target) -> None:
    """Refuse an opset that has no 16 bit scales, or no such type for a convolution or matrix product.

    Args:
        graph: The graph.
        target: Its precision.

    Raises:
        ExportError: It names the lowest opset that can be used.
    """
    if target.opset < FIRST_WITH_HALF_SCALES:
        raise ExportError(
            f"opset {target.opset} has no {target.name} scales; "
            f"the lowest that has is {FIRST_WITH_HALF_SCALES}.",
            f"export with opset {FIRST_WITH_HALF_SCALES} or above, or in fp32.",
        )

    products = [node for node in graph if node.op_type in WEIGHTED_OPS and node.domain == ""]
    refused_nodes = _select_without_type(products, target, target.opset)
    if not refused_nodes:
        return

    lowest = _lowest_opset_for(products, target)
    op_types = sorted({node.op_type for node in refused_nodes})
    names = list_names([node.name or node.op_type for node in refused_nodes], 5)
    raise ExportError(
        f"{'/'.join(op_types)} of opset {target.opset} has no {target.name}: {names}; "
        f"the lowest opset that has is {lowest}.",
        f"export with opset {lowest} or above, or in fp16.",
    )


def _lowest_opset_for(products: list[ir.Node], target: Target) -> int:
    """The lowest opset above that of the graph where all products have the 16 bit type.

    Every product has it in the newest opset, so the search always ends.

    Args:
        products: Convolutions and matrix products.
        target: The precision of the graph.
    """
    opset = target.opset + 1
    while _select_without_type(products, target, opset):
        opset += 1

    return opset


def _select_without_type(nodes: list[ir.Node], target: Target, opset: int) -> list[ir.Node]:
    """The nodes whose operator cannot give the 16 bit type at an opset.

    Args:
        nodes: Nodes of ONNX operators with an output.
        target: The precision of the graph.
        opset: The opset to check, which may differ from that of the graph.
    """
    refused_nodes = []
    for node in nodes:
        output_types = defs.get_schema(node.op_type, opset).outputs[0].types
        if not target.allows(output_types):
            refused_nodes.append(node)

    return refused_nodes


# --- rewriting ------------------------------------------------------------------------------------------------------


class _Rewriter:
    """Rewrites one graph once.

    Args:
        graph: The graph.
        target: What it becomes.
        float32_nodes: The nodes that stay float32.

    Attributes:
        kept_io: Inputs and outputs of the graph that stay float32 because their values do not fit 16 bit.
    """

    def __init__(self, graph: ir.Graph, target: Target, float32_nodes: frozenset[ir.Node]) -> None:
        self.kept_io: list[KeptNode] = []
        self._graph = graph
        self._target = target
        self._float32_nodes = float32_nodes
        # Constants are not among the values: they get the type of each reader.
        self._values = _list_float_values(graph)
        self._value_set = frozenset(self._values)
        # This is decided while all values are float32.
        self._indifferent_nodes = frozenset(node for node in graph if takes_either(node))
        self._converted: dict[ir.Value, ir.Value] = {}

    def retype(self) -> None:
        """Give every float value its type.

        Attributes that name the type of an output get the new type, too. Readers are not considered: `connect` gives
        them the types that they need.
        """
        for value in self._values:
            if self._becomes_half(value):
                value.type = ir.TensorType(self._target.dtype)

        for node in self._graph:
            has_float_output = any(value in self._value_set for value in node.outputs)
            if has_float_output and node not in self._float32_nodes:
                _retype_attributes(node, self._target.dtype)

    def _becomes_half(self, value: ir.Value) -> bool:
        """Whether an input of the graph, or the output of a node, becomes 16 bit.

        An input of the graph is measured, too: it stays float32 if it may overflow.
        """
        producer = value.producer()
        if producer is not None:
            return producer not in self._float32_nodes
        if self._target.keep_io_types:
            return False
        return self._fits(value, "input")

    def connect(self) -> None:
        """Insert Casts and converted constants for readers that need another type than their value has.

        Outputs of the graph come first, because a Cast there takes over the name of the output.
        """
        half_nodes = [node for node in self._graph if node not in self._float32_nodes]
        for output in list(self._graph.outputs):
            self._connect_output(output)

        for node in half_nodes:
            for position, dtype in enumerate(self._input_types_of(node)):
                self._connect_input(node, position, dtype)

        self._connect_float32_readers()
        self._remove_unused_constants()

    def _connect_float32_readers(self) -> None:
        """Connect the readers that stay float32.

        These are the nodes that `graph.precision_rules` keeps, and all nodes in subgraphs, which read values of the
        main graph by name.
        """
        for value in self._values:
            if value.dtype == _FLOAT:
                continue
            for user, position in list(value.uses()):
                is_in_subgraph = user.graph is not self._graph
                if is_in_subgraph or user in self._float32_nodes:
                    self._connect_input(user, position, _FLOAT)

    def _remove_unused_constants(self) -> None:
        """Remove the float32 constants that nothing reads any more; their 16 bit copies take over their names."""
        for value, converted in self._converted.items():
            is_constant = constant_of(value) is not None
            if is_constant and not is_needed(value):
                _remove_constant(self._graph, value)
                converted.name = value.name

    def _input_types_of(self, node: ir.Node) -> list[ir.DataType | None]:
        """The type that a node in 16 bit needs at each input.

        Args:
            node: The node.

        Returns:
            None for an input of any type; inputs at the end may be left out. The scale of a Q must
            have the type of its data.
        """
        if node.op_type == "QuantizeLinear":
            data = node.inputs[0]
            scale_type = None if data is None else data.dtype
            return [None, scale_type]
        if node in self._indifferent_nodes:
            return []

        input_types = []
        for parameter in parameter_types(node, self._target.opset):
            if parameter.is_input:
                input_types.append(self._type_for(parameter.value, parameter.types))
        return input_types

    def _type_for(
        self, value: ir.Value | None, allowed_types: frozenset[str]
    ) -> ir.DataType | None:
        """The type for an input of a node in 16 bit.

        Args:
            value: The input.
            allowed_types: The types that the operator allows there.

        Returns:
            float32 if the operator has no 16 bit input there; None for a value that was never float32.
        """
        was_float = value in self._value_set or is_float(value)
        if not was_float:
            return None
        if self._target.allows(allowed_types):
            return self._target.dtype
        return _FLOAT

    def _connect_input(self, node: ir.Node, position: int, dtype: ir.DataType | None) -> None:
        """Let a node read an input in another type.

        Args:
            node: The node.
            position: Position of the input.
            dtype: The type that it needs; None for any.
        """
        value = node.inputs[position]
        if value is None or dtype is None or value.dtype == dtype:
            return

        node.replace_input_with(position, self._in_other_type(value))

    def _connect_output(self, output: ir.Value) -> None:
        """Give an output of the graph its type.

        It keeps its name, because callers use it. If a Cast is needed, the value before the Cast gets a new name.
        """
        if output not in self._value_set or output.producer() is None:
            return

        stays_float32 = self._target.keep_io_types or not self._fits(output, "output")
        dtype = _FLOAT if stays_float32 else self._target.dtype
        if output.dtype == dtype:
            return

        name = str(output.name)
        result = self._in_other_type(output)
        output.name = f"{name}.{_suffix_of(output.dtype)}"
        result.name = name
        index = self._graph.outputs.index(output)
        self._graph.outputs[index] = result

    def _fits(self, value: ir.Value, role: str) -> bool:
        """Whether an input or output of the graph fits 16 bit; if it does not, `kept_io` gets its name."""
        reason = self._target.overflows(value)
        if reason is None:
            return True

        self.kept_io.append(KeptNode(str(value.name), role, reason))
        return False

    def _in_other_type(self, value: ir.Value) -> ir.Value:
        """The value in its other type, shared by all readers that need it.

        A constant gets a 16 bit copy. Any other value gets a Cast.
        """
        if value not in self._converted:
            constant = constant_of(value)
            self._converted[value] = (
                self._cast(value) if constant is None else self._convert(value, constant)
            )
        return self._converted[value]

    def _cast(self, value: ir.Value) -> ir.Value:
        """The value in its other type, through a Cast directly after the node that computes it."""
        producer = value.producer()
        producer_name = value.name if producer is None else producer.name
        dtype = self._target.dtype if value.dtype == _FLOAT else _FLOAT
        cast = ir.node(
            "Cast", [value], attributes={"to": dtype.value}, name=f"{producer_name}/Cast"
        )
        result = cast.outputs[0]
        result.name = f"{value.name}.{_suffix_of(dtype)}"
        result.shape = value.shape
        result.type = ir.TensorType(dtype)

        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            cast.metadata_props.update(producer.metadata_props)
            self._graph.insert_after(producer, cast)

        return result

    def _convert(self, value: ir.Value, constant: npt.NDArray[Any]) -> ir.Value:
        """A 16 bit copy of a constant."""
        # The -inf of a mask overflows without harm; a node with finite numbers that overflow stays float32.
        with np.errstate(over="ignore"):
            numbers = constant.astype(self._target.dtype.numpy())

        name = f"{value.name}.{_suffix_of(self._target.dtype)}"
        result = add_initializer(self._graph, name, numbers)
        result.shape = value.shape
        return result


def _list_float_values(graph: ir.Graph) -> list[ir.Value]:
    """The float32 inputs of a graph, and the float32 outputs of its nodes, except Constants.

    Constants are converted for their readers, like initializers.
    """
    values = list(graph.inputs)
    for node in graph:
        if node.op_type != "Constant":
            values += node.outputs

    return [value for value in values if is_float(value)]


def _suffix_of(dtype: ir.DataType | None) -> str:
    """End of the name of a value that was converted to a type."""
    if dtype is None:
        return ""
    return _SUFFIXES.get(dtype, "bf16")


def _retype_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    """Write a type into the attributes of a node that name the type of its output.

    An Attention keeps the precision of its softmax, which is that of its inputs by default.

    Args:
        node: A node that becomes 16 bit.
        dtype: FLOAT16 or BFLOAT16.
    """
    if node.op_type == "Cast":
        node.attributes.add(ir.AttrInt64("to", dtype.value))
    elif node.op_type == "ConstantOfShape":
        attribute = node.attributes.get("value")
        number = attribute.as_tensor().numpy() if attribute else np.zeros(1, np.float32)
        tensor = ir.tensor(number.astype(dtype.numpy()))
        node.attributes.add(ir.AttrTensor("value", tensor))
    elif node.op_type == "Attention" and "softmax_precision" not in node.attributes:
        node.attributes.add(ir.AttrInt64("softmax_precision", _FLOAT.value))


def _remove_constant(graph: ir.Graph, value: ir.Value) -> None:
    """Remove an initializer, or a Constant with its node."""
    producer = value.producer()
    if producer is None:
        graph.initializers.pop(str(value.name))
    else:
        graph.remove(producer, safe=True)


def _fold_casts(graph: ir.Graph) -> None:
    """Remove the Casts of the model that no longer change anything.

    These are Casts from float16 to float32 or back if both sides have become 16 bit. A Cast whose output is an output
    of the graph stays, because the name must not change.
    """
    for node in list(graph):
        if node.op_type != "Cast":
            continue

        value = node.inputs[0]
        output = node.outputs[0]
        if value is None or value.dtype != output.dtype or output.is_graph_output():
            continue

        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
