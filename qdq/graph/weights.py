"""Weights stored as int8 with a DequantizeLinear only: a quarter of the file (R-WSTORE b)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# Codes of a float array: (values, scale, axis) -> int8 array of the same shape.
QuantizeFunction = Callable[
    [npt.NDArray[np.float32], npt.NDArray[np.float32], int | None], npt.NDArray[np.int8]
]


class QuantizeWeights(ir.passes.InPlacePass):
    """Float initializer -> Q -> DQ becomes int8 initializer -> DQ.

    Args:
        quantize: The arithmetic of the quantizer, handed in so that it stands in one place only.
    """

    def __init__(self, quantize: QuantizeFunction) -> None:
        super().__init__()
        self._quantize = quantize

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert every weight; `removed_q` counts them."""
        self.removed_q = 0
        for node in list(model.graph):
            if node.op_type == "QuantizeLinear" and _constant_of(node, 0) is not None:
                self._store(model.graph, node)
                self.removed_q += 1
        return ir.passes.PassResult(model, modified=self.removed_q > 0)

    def _store(self, graph: ir.Graph, node: ir.Node) -> None:
        weight, scale = node.inputs[0], _constant_of(node, 1)
        values = _constant_of(node, 0)
        assert weight is not None and values is not None and scale is not None  # noqa: S101
        axis = node.attributes["axis"].as_int() if scale.ndim else None
        name = str(weight.name)
        if len(weight.uses()) == 1:  # the codes take over the name of the weight
            graph.initializers.pop(name)
        else:
            name = f"{name}.int8"
        codes = self._quantize(values, scale, axis)
        value = ir.Value(
            name=name,
            shape=ir.Shape(codes.shape),
            type=ir.TensorType(ir.DataType.INT8),
            const_value=ir.tensor(codes, name=name),
        )
        graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _constant_of(node: ir.Node, position: int) -> npt.NDArray[Any] | None:
    value = node.inputs[position]
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()
