"""A graph as rules read it: who reads what, what is constant, what is quantized, shapes and types where known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.signatures import describe_misfit
from qdq.graph import pairs
from qdq.graph.coverage import WEIGHTED_OPS
from qdq.graph.pairs import has_reference, input_of
from qdq.graph.pairs import is_op as is_op

Array = npt.NDArray[Any]

COPY_OPS = pairs.COPY_OPS | {"Identity"}
"""Operators that only move values: Q and DQ pass through them (R-COPY)."""
MOVING_OPS = COPY_OPS | {"Cast", "Dropout", "Pad"}
COMMUTING_OPS = MOVING_OPS | {"MaxPool"}
"""Operators that a DQ in front of them reaches through (R-MP)."""


class GraphView:
    """The nodes of a model, of its `If` and `Loop` bodies and of its functions, with indices made once.

    Args:
        model: Not changed.
        file: What is known of the file that it was read from; None for a model in memory.
    """

    def __init__(self, model: ir.Model, file: FileFacts | None = None) -> None:
        self.model = model
        self.file = file
        self.opset = model.opset_imports.get("", 0)
        self.nodes: list[ir.Node] = [*model.graph.all_nodes()]
        for function in model.functions.values():
            self.nodes += function.all_nodes()
        self._position = {node: position for position, node in enumerate(self.nodes)}
        self._constants: dict[ir.Value, Array | None] = {}

    def select(self, *op_types: str) -> list[ir.Node]:
        """Nodes of these standard operators, in graph order, but for those that are not `_is_readable`."""
        return [node for op_type in op_types for node in self._by_op.get(op_type, [])]

    @cached_property
    def _by_op(self) -> dict[str, list[ir.Node]]:
        nodes: dict[str, list[ir.Node]] = {}
        for node in self.nodes:
            if node.domain == "" and self._is_readable(node):
                nodes.setdefault(node.op_type, []).append(node)
        return nodes

    @cached_property
    def misfits(self) -> dict[ir.Node, str]:
        """Nodes of standard operators without the inputs, outputs and attributes of their operator, and why."""
        reasons = {node: describe_misfit(node, self.opset) for node in self.nodes}
        return {node: reason for node, reason in reasons.items() if reason}

    @cached_property
    def quantizers(self) -> list[ir.Node]:
        """Every QuantizeLinear."""
        return self.select("QuantizeLinear")

    @cached_property
    def dequantizers(self) -> list[ir.Node]:
        """Every DequantizeLinear."""
        return self.select("DequantizeLinear")

    @cached_property
    def weighted(self) -> list[ir.Node]:
        """Every Conv, ConvTranspose, Gemm and MatMul, in graph order."""
        return sorted(self.select(*WEIGHTED_OPS), key=self.position)

    def position(self, node: ir.Node) -> int:
        """Where a node stands in `nodes`."""
        return self._position[node]

    # --- constants ----------------------------------------------------------------------------------------------

    @cached_property
    def _computed(self) -> set[ir.Value]:
        """Values that depend on an input of the model. What a body or a function is given may be constant."""
        computed = {value for value in self.model.graph.inputs if value.const_value is None}
        for node in self.nodes:
            if any(value in computed for value in node.inputs if value is not None) or (
                node.op_type.startswith("Random")
                or any(a.type == ir.AttributeType.GRAPH for a in _attributes(node))
            ):
                computed.update(node.outputs)
        return computed

    def is_computed(self, value: ir.Value | None) -> bool:
        """Whether a value surely depends on the model's inputs."""
        return value is not None and value in self._computed

    def constant(self, value: ir.Value | None) -> Array | None:
        """The numbers of a value, also behind Identity and Cast (R-DYN); None if they are not written in the file."""
        if value is None:
            return None
        if value not in self._constants:
            self._constants[value] = self._read(value)
        return self._constants[value]

    def _read(self, value: ir.Value) -> Array | None:
        casts = []
        source: ir.Value | None = value
        while (
            source is not None
            and (node := source.producer()) is not None
            and is_op(node, "Identity", "Cast")
        ):
            if has_reference(node):
                return None
            if node.op_type == "Cast":
                casts.append(ir.DataType(node.attributes.get_int("to", 0)))
            source = input_of(node, 0)
        try:
            tensor = None if source is None else ir.convenience.get_const_tensor(source)
            array = None if tensor is None or tensor.dtype == ir.DataType.STRING else tensor.numpy()
            for dtype in reversed(casts):
                with np.errstate(over="ignore", invalid="ignore"):
                    array = None if array is None else array.astype(dtype.numpy())
        except Exception:  # onnx-ir raises and asserts where data do not fit (QDQ205)
            return None
        return array

    def scale(self, node: ir.Node) -> Array | None:
        """The scales of a Q or DQ as float64."""
        array = self.constant(node.inputs[1])
        return None if array is None or array.dtype.kind == "c" else array.astype(np.float64)

    def is_weight(self, node: ir.Node) -> bool:
        """Whether a Q or DQ has constants to work on, or the codes of constants."""
        return not self.is_computed(node.inputs[0])

    # --- shapes and types ---------------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> tuple[int | None, ...] | None:
        """The shape of a value, None for what is not known."""
        while value is not None:
            tensor = ir.convenience.get_const_tensor(value)
            shape = value.shape if tensor is None else tensor.shape
            if shape is not None:
                return tuple(size if isinstance(size, int) else None for size in shape)
            node = value.producer()
            if node is None or not is_op(
                node, "QuantizeLinear", "DequantizeLinear", "Identity", "Cast"
            ):
                return None
            value = input_of(node, 0)
        return None

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The type of a value; that of a DQ's output is that of its scale (R-CONV-2 in half precision)."""
        while value is not None:
            node = value.producer()
            if node is not None and has_reference(node):
                return value.dtype
            if node is not None and is_op(node, "DequantizeLinear"):
                if written := node.attributes.get_int("output_dtype", 0):
                    return ir.DataType(written)
                value = input_of(node, 1)
            elif node is not None and is_op(node, "Cast"):
                written = node.attributes.get_int("to", 0)
                return ir.DataType(written) if written else None
            elif node is not None and is_op(node, *COPY_OPS):
                value = input_of(node, 0)
            else:
                tensor = ir.convenience.get_const_tensor(value)
                return value.dtype if tensor is None else tensor.dtype
        return None

    def code_type(self, node: ir.Node) -> ir.DataType | None:
        """The type of the integers that a Q writes or a DQ reads; None if the file does not say."""
        return pairs.code_type_of(node)

    # --- who feeds what -----------------------------------------------------------------------------------------

    def dequantizer(
        self, value: ir.Value | None, through: Iterable[str] = COMMUTING_OPS
    ) -> ir.Node | None:
        """The DQ that a value comes from, looking through operators that it reaches through."""
        node = self.source(value, through)
        return node if node is not None and self._is_sound(node, "DequantizeLinear") else None

    def is_quantized(self, value: ir.Value | None, through: Iterable[str] = COMMUTING_OPS) -> bool:
        """Whether a value comes from a DQ, or from a Concat of such values."""
        visited: set[ir.Node] = set()
        values = [value]
        while values:
            node = self.source(values.pop(), through)
            if node is None or not self._is_sound(node, "DequantizeLinear", "Concat"):
                return False
            if node.op_type == "Concat" and node not in visited:
                visited.add(node)
                values += node.inputs
        return True

    def _is_sound(self, node: ir.Node, *op_types: str) -> bool:
        return is_op(node, *op_types) and self._is_readable(node)

    def _is_readable(self, node: ir.Node) -> bool:
        """Whether it fits its operator and its attributes are numbers; a function's can be what each call says."""
        return node not in self.misfits and not has_reference(node)

    def source(self, value: ir.Value | None, through: Iterable[str]) -> ir.Node | None:
        """The node behind a value, skipping the first inputs of the operators named."""
        while value is not None and (node := value.producer()) is not None:
            if not is_op(node, *through) or not node.inputs:
                return node
            value = node.inputs[0]
        return None

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, in graph order, each once."""
        return sorted({node for node, _ in value.uses()}, key=self.position)

    def reached(self, value: ir.Value, through: Iterable[str]) -> Iterator[ir.Node]:
        """The nodes that read a value, also behind the operators named; each once."""
        seen: set[ir.Node] = set()
        values = [value]
        while values:
            for node in self.readers(values.pop()):
                if node in seen:
                    continue
                seen.add(node)
                if is_op(node, *through):
                    values += node.outputs
                else:
                    yield node


def name_of(node: ir.Node) -> str:
    """The name of a node; its output's where it has none."""
    return node.name or (
        str(node.outputs[0].name) if node.outputs else f"a nameless {node.op_type}"
    )


def _attributes(node: ir.Node) -> Iterable[ir.Attr]:
    return node.attributes.values()
