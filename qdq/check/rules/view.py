"""The view of a graph for rules: readers, constants, quantized values, and shapes and types if they are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.payoff import Payoff
from qdq.check.signatures import describe_misfit
from qdq.graph import pairs
from qdq.graph.code_types import find_code_type
from qdq.graph.pairs import has_reference, input_of
from qdq.graph.pairs import is_op as is_op
from qdq.graph.work import WEIGHTED_OPS

Array = npt.NDArray[Any]

COPY_OPS = pairs.COPY_OPS | {"Identity"}
"""Operators that only move values: Q and DQ pass through them (R-COPY)."""
MOVING_OPS = COPY_OPS | {"Cast", "Dropout", "Pad"}
COMMUTING_OPS = MOVING_OPS | {"MaxPool"}
"""Operators through which the DQ before them reaches the operator after them (R-MP)."""
_SHAPE_KEEPING_OPS = ("QuantizeLinear", "DequantizeLinear", "Identity", "Cast")


class GraphView:
    """The nodes of a model, of its `If` and `Loop` bodies and of its functions, with indices that are built once.

    Args:
        model: Not changed.
        file: Facts about the file that it was read from; None for a model in memory.
        payoff: Its predicted times on a GPU; None if none was chosen.
        sm: Compute capability of the GPU that it is for, 89 for 8.9; None if that is not known.
    """

    def __init__(
        self,
        model: ir.Model,
        file: FileFacts | None = None,
        *,
        payoff: Payoff | None = None,
        sm: int | None = None,
    ) -> None:
        self.model = model
        self.file = file
        self.payoff = payoff
        self.sm = sm
        self.opset = model.opset_imports.get("", 0)
        self.nodes: list[ir.Node] = [*model.graph.all_nodes()]
        for function in model.functions.values():
            self.nodes += function.all_nodes()
        self._position = {node: position for position, node in enumerate(self.nodes)}
        self._constants: dict[ir.Value, Array | None] = {}

    # --- nodes --------------------------------------------------------------------------------------------------

    def select(self, *op_types: str) -> list[ir.Node]:
        """Nodes of standard operators.

        Nodes that do not fit their operator (QDQ210) are left out, and so are nodes of functions with an attribute
        that each call sets.

        Args:
            *op_types: Types of the operators, such as "Conv".

        Returns:
            The nodes, type by type, each type in graph order.
        """
        selected: list[ir.Node] = []
        for op_type in op_types:
            selected += self._by_op.get(op_type, [])
        return selected

    @cached_property
    def _by_op(self) -> dict[str, list[ir.Node]]:
        """Readable nodes of standard operators by operator."""
        nodes: dict[str, list[ir.Node]] = {}
        for node in self.nodes:
            if node.domain == "" and self._is_readable(node):
                nodes.setdefault(node.op_type, []).append(node)
        return nodes

    @cached_property
    def misfits(self) -> dict[ir.Node, str]:
        """Nodes of standard operators that do not fit their operator, and the reason.

        Such a node lacks inputs, outputs or attributes of its operator, or has too many.
        """
        reasons = {}
        for node in self.nodes:
            reason = describe_misfit(node, self.opset)
            if reason:
                reasons[node] = reason
        return reasons

    @cached_property
    def quantizers(self) -> list[ir.Node]:
        """Every QuantizeLinear."""
        return self.select("QuantizeLinear")

    @cached_property
    def dequantizers(self) -> list[ir.Node]:
        """Every DequantizeLinear."""
        return self.select("DequantizeLinear")

    @cached_property
    def qdq_nodes(self) -> list[ir.Node]:
        """Every QuantizeLinear and DequantizeLinear, in graph order."""
        return sorted([*self.quantizers, *self.dequantizers], key=self.position)

    @cached_property
    def weighted(self) -> list[ir.Node]:
        """Every Conv, ConvTranspose, Gemm and MatMul, in graph order."""
        return sorted(self.select(*WEIGHTED_OPS), key=self.position)

    def position(self, node: ir.Node) -> int:
        """The index of a node in `nodes`."""
        return self._position[node]

    def _is_readable(self, node: ir.Node) -> bool:
        """Whether a node fits its operator and has no attribute that the call of a function sets."""
        return node not in self.misfits and not has_reference(node)

    # --- constants ----------------------------------------------------------------------------------------------

    @cached_property
    def _computed(self) -> set[ir.Value]:
        """Values that depend on an input of the model; inputs of bodies and functions may be constant."""
        computed: set[ir.Value] = set()
        for value in self.model.graph.inputs:
            if value.const_value is None:
                computed.add(value)

        for node in self.nodes:
            depends_on_input = not computed.isdisjoint(node.inputs)
            if depends_on_input or _is_variable(node):
                computed.update(node.outputs)
        return computed

    def is_computed(self, value: ir.Value | None) -> bool:
        """Whether a value surely depends on the model's inputs.

        Args:
            value: A value; None, for an input that is left out, is not computed.
        """
        return value in self._computed

    def computed_inputs(self, node: ir.Node) -> list[ir.Value]:
        """The inputs of a node that surely depend on the model's inputs."""
        values = []
        for value in node.inputs:
            if value is not None and self.is_computed(value):
                values.append(value)
        return values

    def has_constant_input(self, node: ir.Node) -> bool:
        """Whether an input of a node may be a constant, or is left out."""
        return len(self.computed_inputs(node)) < len(node.inputs)

    def constant(self, value: ir.Value | None) -> Array | None:
        """The numbers of a value, also after Identity and Cast (R-DYN).

        Args:
            value: A value; None for an input that is left out.

        Returns:
            The array; None if the numbers are not in the file, or cannot be read.
        """
        if value is None:
            return None
        if value not in self._constants:
            self._constants[value] = _read_constant(value)
        return self._constants[value]

    def scale(self, node: ir.Node) -> Array | None:
        """The scales of a Q or DQ.

        Args:
            node: A QuantizeLinear or DequantizeLinear.

        Returns:
            The scales in their shape, as float64; None if they are not in the file.
        """
        array = self.constant(node.inputs[1])
        if array is None or array.dtype.kind == "c":
            return None
        scales: Array = array.astype(np.float64)
        return scales

    def is_weight(self, node: ir.Node) -> bool:
        """Whether a Q quantizes a constant, or a DQ reads the codes of one."""
        return not self.is_computed(node.inputs[0])

    # --- shapes and types ---------------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> tuple[int | None, ...] | None:
        """The shape of a value, taken from before Q, DQ, Identity and Cast if it is not declared.

        Args:
            value: A value; None for an input that is left out.

        Returns:
            The sizes, with None for a size that is not known; None if the number of dimensions is not known.
        """
        while value is not None:
            shape = _declared_shape(value)
            if shape is not None:
                return shape

            node = value.producer()
            if not is_op(node, *_SHAPE_KEEPING_OPS):
                return None
            value = input_of(node, 0)
        return None

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The type of a value, followed through DQ, Cast and copy operators.

        The output of a DQ has the type of its scale (R-CONV-2 in half precision), whatever the file declares.

        Args:
            value: A value; None for an input that is left out.

        Returns:
            The type; None if it is not known.
        """
        while value is not None:
            node = value.producer()
            if node is None:
                return _declared_dtype(value)
            if has_reference(node):
                return value.dtype

            if is_op(node, "DequantizeLinear"):
                output_type = _type_attribute(node, "output_dtype")
                if output_type is not None:
                    return output_type
                value = input_of(node, 1)
            elif is_op(node, "Cast"):
                return _type_attribute(node, "to")
            elif is_op(node, *COPY_OPS):
                value = input_of(node, 0)
            else:
                return _declared_dtype(value)
        return None

    def code_type(self, node: ir.Node) -> ir.DataType | None:
        """The type of the codes that a Q writes or a DQ reads; None if the file does not show it."""
        return pairs.code_type_of(node)

    def code_word(self, node: ir.Node | None) -> str:
        """The word for the type of the codes of a Q or DQ, such as "int8" or "FP8".

        Args:
            node: A Q or DQ, or None for one that is not known: TensorRT takes int8 if a file shows no type.
        """
        return "int8" if node is None else find_code_type(node).name

    # --- what feeds a value, and what reads it ------------------------------------------------------------------

    def source(self, value: ir.Value | None, through: Iterable[str]) -> ir.Node | None:
        """The node that computes a value, skipping operators.

        Args:
            value: Where to start.
            through: Types of operators that are skipped: their first input is followed.

        Returns:
            The first node that is not skipped; None if the value comes from an input or a constant.
        """
        while value is not None:
            node = value.producer()
            if node is None:
                return None
            if not is_op(node, *through) or not node.inputs:
                return node
            value = node.inputs[0]
        return None

    def dequantizer(
        self, value: ir.Value | None, through: Iterable[str] = COMMUTING_OPS
    ) -> ir.Node | None:
        """The DQ that a value comes from.

        Args:
            value: Where to start.
            through: Types of operators that are skipped: those that a DQ reaches through.

        Returns:
            The DQ; None if the value comes from another operator, or if the DQ does not fit its operator.
        """
        node = self.source(value, through)
        if is_op(node, "DequantizeLinear") and self._is_readable(node):
            return node
        return None

    def is_quantized(self, value: ir.Value | None, through: Iterable[str] = COMMUTING_OPS) -> bool:
        """Whether a value comes from a DQ, or from a Concat of such values.

        Args:
            value: Where to start.
            through: Types of operators that are skipped: those that a DQ reaches through.
        """
        visited: set[ir.Node] = set()
        values = [value]
        while values:
            node = self.source(values.pop(), through)
            if not is_op(node, "DequantizeLinear", "Concat") or not self._is_readable(node):
                return False
            if node.op_type == "Concat" and node not in visited:
                visited.add(node)
                values += node.inputs
        return True

    def has_quantized_operands(self, node: ir.Node) -> bool:
        """Whether both operands of a weighted node are quantized."""
        return all(self.is_quantized(value) for value in node.inputs[:2])

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, in graph order, each once."""
        return sorted({node for node, _ in value.uses()}, key=self.position)

    def reached(self, value: ir.Value, through: Iterable[str]) -> Iterator[ir.Node]:
        """The nodes that read a value, each once.

        Args:
            value: Where to start.
            through: Types of operators that are skipped: the readers of their outputs count.

        Yields:
            The nodes that are not skipped.
        """
        visited: set[ir.Node] = set()
        values = [value]
        while values:
            for node in self.readers(values.pop()):
                if node in visited:
                    continue
                visited.add(node)

                if is_op(node, *through):
                    values += node.outputs
                else:
                    yield node


def name_of(node: ir.Node) -> str:
    """The name of a node; without a name, that of its first output."""
    if node.name:
        return node.name
    if node.outputs:
        return str(node.outputs[0].name)
    return f"a nameless {node.op_type}"


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value.

    Args:
        value: A value; None for an input that is left out.

    Returns:
        The node; None for an input of a graph or function, an initializer, and an input that is left out.
    """
    if value is None:
        return None
    return value.producer()


def producers_of(node: ir.Node) -> list[ir.Node]:
    """The nodes that compute the inputs of a node, in the order of the inputs."""
    producers = []
    for value in node.inputs:
        producer = producer_of(value)
        if producer is not None:
            producers.append(producer)
    return producers


def has_only(nodes: Sequence[ir.Node], *op_types: str) -> bool:
    """Whether all nodes are of these standard operators; also if there are none."""
    return all(is_op(node, *op_types) for node in nodes)


def _is_variable(node: ir.Node) -> bool:
    """Whether outputs may vary although all inputs are constant: random numbers, or a body that reads other values."""
    if node.op_type.startswith("Random"):
        return True
    attributes: Iterable[ir.Attr] = node.attributes.values()
    return any(attribute.type == ir.AttributeType.GRAPH for attribute in attributes)


def _read_constant(value: ir.Value) -> Array | None:
    """The numbers of a value that comes from a constant through Identity and Cast.

    Returns:
        The array; None if the value does not come from a constant, or if the constant is damaged.
    """
    casts = []
    source: ir.Value | None = value
    while is_op(node := producer_of(source), "Identity", "Cast"):
        if has_reference(node):
            return None
        if node.op_type == "Cast":
            casts.append(ir.DataType(node.attributes.get_int("to", 0)))
        source = input_of(node, 0)

    if source is None:
        return None
    try:
        return _read_tensor(source, reversed(casts))
    except Exception:  # onnx-ir raises and asserts if data do not fit (QDQ205)
        return None


def _read_tensor(value: ir.Value, casts: Iterable[ir.DataType]) -> Array | None:
    """The numbers of a constant after casts.

    Args:
        value: The constant.
        casts: Types to which it is cast, in this order.

    Returns:
        The array; None for strings, and if the value is not a constant.
    """
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    array: Array = tensor.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype in casts:
            array = array.astype(dtype.numpy())
    return array


def _declared_shape(value: ir.Value) -> tuple[int | None, ...] | None:
    """The shape of a constant, or the shape that the file declares for another value.

    Returns:
        The sizes, with None for a size that is not known; None if the file declares no shape.
    """
    tensor = ir.convenience.get_const_tensor(value)
    shape = value.shape if tensor is None else tensor.shape
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in shape)


def _declared_dtype(value: ir.Value) -> ir.DataType | None:
    """The type of a constant, or the type that the file declares for another value."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return value.dtype
    return tensor.dtype


def _type_attribute(node: ir.Node, name: str) -> ir.DataType | None:
    """An attribute whose value is a type.

    Returns:
        The type; None if the attribute is missing or 0.
    """
    number = node.attributes.get_int(name, 0)
    if number == 0:
        return None
    return ir.DataType(number)
