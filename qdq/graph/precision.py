"""What Q/DQ leave in float, written in float16 or bfloat16: TensorRT 11 takes types literally (rule 7)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx import defs

from qdq.errors import ArgumentError, ExportError
from qdq.graph.coverage import WEIGHTED_OPS
from qdq.graph.pairs import constant_of
from qdq.graph.precision_rules import (
    KeptNode,
    Target,
    choose_kept,
    is_float,
    parameter_types,
    takes_either,
)
from qdq.text import list_names

NEWEST_OPSET = 23
LOWEST_OPSET = 19
"""The first in which scales may be float16 or bfloat16."""

_FLOAT = ir.DataType.FLOAT


class ConvertPrecision(ir.passes.InPlacePass):
    """Write the float32 values of the main graph in 16 bit, except where `graph.precision_rules` keeps them.

    Every value has one type, and where a reader wants the other there is one Cast for all such readers: so there are no
    chains, and a region of kept nodes has one Cast in and one out. Int8 codes stay as they are. A QuantizeLinear takes
    the type of its input: behind a float32 value its scale stays float32, and the scale of its DequantizeLinear is a
    16 bit copy, which is a way into the 16 bit region without a Cast.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        peaks: Largest magnitude of values by name, for FLOAT16 (`check.precision.measure_peaks`).
        keep_io_types: Leave inputs and outputs of the graph in float32.

    Raises:
        ArgumentError: Another dtype.
        ExportError: The opset is too old; the model is unchanged then.
    """

    def __init__(
        self,
        dtype: ir.DataType,
        *,
        peaks: Mapping[str, float] | None = None,
        keep_io_types: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise ArgumentError(
                f"dtype is {dtype.name}; it must be FLOAT16 or BFLOAT16.", "use FLOAT16."
            )
        self.kept: tuple[KeptNode, ...] = ()
        self.casts = 0
        self._dtype, self._peaks, self._keep_io_types = dtype, peaks or {}, keep_io_types

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Decide, then retype, then connect; `kept` and `casts` tell what came out."""
        target = Target(
            self._dtype, model.opset_imports.get("", 0), self._peaks, self._keep_io_types
        )
        _require_opset(model.graph, target)
        kept = choose_kept(model.graph, target)
        rewriter = _Rewriter(model.graph, target, frozenset(kept))
        rewriter.retype()
        rewriter.connect()
        _fold_casts(model.graph)
        self.kept = (
            *rewriter.kept_io,
            *(KeptNode(node.name or "", node.op_type, reason) for node, reason in kept.items()),
        )
        self.casts = sum(node.op_type == "Cast" for node in model.graph)
        return ir.passes.PassResult(model, modified=True)


def _require_opset(graph: ir.Graph, target: Target) -> None:
    """Refuse an opset that has no 16 bit scales, or no such type for a convolution or matrix product."""
    if target.opset < LOWEST_OPSET:
        raise ExportError(
            f"opset {target.opset} has no {target.name} scales; the lowest that has is {LOWEST_OPSET}.",
            f"export with opset {LOWEST_OPSET} or above, or in fp32.",
        )
    nodes = [node for node in graph if node.op_type in WEIGHTED_OPS and node.domain == ""]

    def lacking(opset: int) -> list[ir.Node]:
        return [
            node
            for node in nodes
            if not target.allows(set(defs.get_schema(node.op_type, opset).outputs[0].types))
        ]

    if found := lacking(target.opset):
        lowest = next(
            opset for opset in range(target.opset + 1, NEWEST_OPSET + 1) if not lacking(opset)
        )
        names = list_names([node.name or node.op_type for node in found], 5)
        raise ExportError(
            f"{'/'.join(sorted({node.op_type for node in found}))} of opset {target.opset} has no {target.name}: "
            f"{names}; the lowest opset that has is {lowest}.",
            f"export with opset {lowest} or above, or in fp16.",
        )


class _Rewriter:
    """One run over one graph."""

    def __init__(self, graph: ir.Graph, target: Target, kept: frozenset[ir.Node]) -> None:
        self._graph, self._target, self._kept = graph, target, kept
        self.kept_io: list[KeptNode] = []
        # Inputs and what nodes make. Constants are apart: they get the type of each reader.
        made = [value for node in graph if node.op_type != "Constant" for value in node.outputs]
        self._values = [value for value in [*graph.inputs, *made] if is_float(value)]
        self._float = frozenset(self._values)
        self._indifferent = frozenset(
            node for node in graph if takes_either(node)
        )  # while all is float32
        self._converted: dict[ir.Value, ir.Value] = {}

    def retype(self) -> None:
        """Give every float value its type."""
        low = self._target.dtype
        for value in self._values:
            producer = value.producer()
            if producer is None:
                if not self._target.keep_io_types and self._fits(value, "input"):
                    value.type = ir.TensorType(low)
            elif producer not in self._kept:
                value.type = ir.TensorType(low)
        for node in self._graph:
            if node not in self._kept and any(value in self._float for value in node.outputs):
                _retype_attributes(node, low)

    def connect(self) -> None:
        """Put Casts and converted constants where a reader wants another type than there is."""
        nodes = [node for node in self._graph if node not in self._kept]
        for output in list(self._graph.outputs):
            self._connect_output(output)
        for node in nodes:
            for position, wanted in enumerate(self._wanted(node)):
                self._connect_input(node, position, wanted)
        for value in self._values:  # readers that stay: kept nodes, and nodes in their subgraphs
            if value.dtype == _FLOAT:
                continue
            for user, position in list(value.uses()):
                if user in self._kept or user.graph is not self._graph:
                    self._connect_input(user, position, _FLOAT)
        for old, new in self._converted.items():
            if constant_of(old) is not None and not old.uses() and not old.is_graph_output():
                _remove_constant(self._graph, old)
                new.name = old.name

    def _wanted(self, node: ir.Node) -> list[ir.DataType | None]:
        """The type that a node in 16 bit wants at each input; None for what is not float."""
        if node.op_type == "QuantizeLinear":  # the scale has the type of the data
            data = node.inputs[0]
            return [None, None if data is None else data.dtype]
        if node in self._indifferent:
            return []
        parameters = parameter_types(node, self._target.opset)
        return [
            (self._target.dtype if self._target.allows(types) else _FLOAT)
            if _is_ours(value, self._float)
            else None
            for value, types, is_input in parameters
            if is_input
        ]

    def _connect_input(self, node: ir.Node, position: int, wanted: ir.DataType | None) -> None:
        value = node.inputs[position]
        if value is not None and wanted is not None and value.dtype != wanted:
            constant = constant_of(value)
            node.replace_input_with(
                position, self._cast(value) if constant is None else self._convert(value, constant)
            )

    def _connect_output(self, output: ir.Value) -> None:
        """The output keeps its name; the value behind it gets another."""
        if output not in self._float or output.producer() is None:
            return
        stays = self._target.keep_io_types or not self._fits(output, "output")
        wanted = _FLOAT if stays else self._target.dtype
        if output.dtype == wanted:
            return
        name = str(output.name)
        result = self._cast(output)
        output.name, result.name = f"{name}.{_suffix(output.dtype)}", name
        self._graph.outputs[self._graph.outputs.index(output)] = result

    def _fits(self, value: ir.Value, kind: str) -> bool:
        reason = self._target.overflows(value)
        if reason:
            self.kept_io.append(KeptNode(str(value.name), kind, reason))
        return reason is None

    def _cast(self, value: ir.Value) -> ir.Value:
        """The value in its other type, through a Cast right behind what makes it."""
        if value in self._converted:
            return self._converted[value]
        wanted = self._target.dtype if value.dtype == _FLOAT else _FLOAT
        producer = value.producer()
        cast = ir.node(
            "Cast",
            [value],
            attributes={"to": wanted.value},
            name=f"{value.name if producer is None else producer.name}/Cast",
        )
        result = cast.outputs[0]
        result.name, result.shape, result.type = (
            f"{value.name}.{_suffix(wanted)}",
            value.shape,
            ir.TensorType(wanted),
        )
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            cast.metadata_props.update(producer.metadata_props)
            self._graph.insert_after(producer, cast)
        self._converted[value] = result
        return result

    def _convert(self, value: ir.Value, constant: np.ndarray) -> ir.Value:
        """A 16 bit copy of a constant."""
        if value not in self._converted:
            name = f"{value.name}.{_suffix(self._target.dtype)}"
            with np.errstate(
                over="ignore"
            ):  # -inf of a mask; finite numbers that overflow were kept
                tensor = ir.tensor(constant.astype(self._target.dtype.numpy()), name=name)
            result = ir.Value(
                name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(result)
            self._converted[value] = result
        return self._converted[value]


def _is_ours(value: ir.Value | None, floats: frozenset[ir.Value]) -> bool:
    """Whether a value was float32 before, by now perhaps in 16 bit."""
    return value is not None and (value in floats or is_float(value))


def _suffix(dtype: ir.DataType | None) -> str:
    return "" if dtype is None else {_FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}.get(dtype, "bf16")


def _retype_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    """Types that an operator has in its attributes."""
    if node.op_type == "Cast":
        node.attributes.add(ir.AttrInt64("to", dtype.value))
    elif node.op_type == "ConstantOfShape":
        given = node.attributes.get("value")
        number = given.as_tensor().numpy() if given else np.zeros(1, np.float32)
        node.attributes.add(ir.AttrTensor("value", ir.tensor(number.astype(dtype.numpy()))))
    elif node.op_type == "Attention" and "softmax_precision" not in node.attributes:
        node.attributes.add(ir.AttrInt64("softmax_precision", _FLOAT.value))


def _remove_constant(graph: ir.Graph, value: ir.Value) -> None:
    producer = value.producer()
    if producer is None:
        graph.initializers.pop(str(value.name))
    else:
        graph.remove(producer, safe=True)


def _fold_casts(graph: ir.Graph) -> None:
    """Take away the Casts of the model that by now change nothing."""
    for node in list(graph):
        if node.op_type != "Cast" or node.inputs[0] is None or node.outputs[0].is_graph_output():
            continue
        if node.inputs[0].dtype == node.outputs[0].dtype:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)
