"""Store weights as codes with only a DequantizeLinear: a quarter of the size (R-WSTORE b)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.graph.edits import add_initializer, find_free_name
from qdq.graph.pairs import code_type_of

_SUFFIXES = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8"}

# Codes of a float array: (values, scale, axis, type) -> array of that type and of the same shape.
QuantizeFunction = Callable[
    [npt.NDArray[np.float32], npt.NDArray[np.float32], int | None, ir.DataType], npt.NDArray[Any]
]


class QuantizeWeights(ir.passes.InPlacePass):
    """Turn float initializer -> Q -> DQ into initializer of codes, int8 or FP8 -> DQ.

    Args:
        quantize: The arithmetic of the quantizer, passed in so that it is defined in one place only.
    """

    def __init__(self, quantize: QuantizeFunction) -> None:
        super().__init__()
        self._quantize = quantize
        self.removed_q = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert every weight; `removed_q` counts them."""
        self.removed_q = 0
        for node in list(model.graph):
            is_quantize = node.op_type == "QuantizeLinear"
            if is_quantize and _initializer_of(node, 0) is not None:
                self._store_codes(model.graph, node)
                self.removed_q += 1

        return ir.passes.PassResult(model, modified=self.removed_q > 0)

    def _store_codes(self, graph: ir.Graph, quantize: ir.Node) -> None:
        """Replace a Q of an initializer by the codes that it computes.

        The codes take over the name of the weight if nothing else reads it.

        Args:
            graph: The graph.
            quantize: The Q.
        """
        weight = quantize.inputs[0]
        values = _initializer_of(quantize, 0)
        scale = _initializer_of(quantize, 1)
        assert weight is not None and values is not None and scale is not None  # noqa: S101

        code_type = code_type_of(quantize)
        assert code_type is not None  # noqa: S101  # export writes zero points
        name = str(weight.name)
        has_single_reader = len(weight.uses()) == 1
        if has_single_reader:  # the codes take over the name of the weight
            graph.initializers.pop(name)
        else:
            name = f"{name}.{_SUFFIXES[code_type]}"
            if name in graph.initializers:  # with codes of another scale
                name = find_free_name(graph, f"{name}_", 1)

        axis = quantize.attributes["axis"].as_int() if scale.ndim else None
        codes = add_initializer(graph, name, self._quantize(values, scale, axis, code_type))
        quantize.outputs[0].replace_all_uses_with(codes)
        graph.remove(quantize, safe=True)


def _initializer_of(node: ir.Node, position: int) -> npt.NDArray[Any] | None:
    """The numbers of an initializer that a node reads.

    Args:
        node: The node.
        position: Position of the input.

    Returns:
        None for what a node computes.
    """
    value = node.inputs[position]
    if value is None or value.producer() is not None:
        return None
    if value.const_value is None:
        return None
    return value.const_value.numpy()
