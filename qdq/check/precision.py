"""What 16 bit needs to know of an ONNX graph, and what they do to it, measured by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qdq.check.parity import OnnxModel
from qdq.metrics import Array

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def measure_peaks(model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, float]:
    """Run a copy of the model in which every float32 value also goes to Abs and ReduceMax.

    Only scalars come out, so that ONNX Runtime frees each value once it is read: it needs little more memory than for
    the outputs alone.

    Args:
        model: A float32 model, unchanged by this.
        inputs: One batch by input name.

    Returns:
        Name of the value -> largest magnitude, infinite where the value is; constants and subgraphs are left out.

    Raises:
        CheckError: ONNX Runtime cannot run the model.
    """
    copy = model.clone()
    graph = copy.graph
    made = [value for node in graph if node.op_type != "Constant" for value in node.outputs]
    values = [value for value in [*graph.inputs, *made] if value.dtype == ir.DataType.FLOAT]
    graph.outputs.clear()
    for value in values:
        magnitude = ir.node("Abs", [value])
        peak = ir.node("ReduceMax", [magnitude.outputs[0]], attributes={"keepdims": 0})
        graph.extend([magnitude, peak])
        result = peak.outputs[0]
        result.name, result.shape, result.type = (
            f"{value.name}.peak",
            ir.Shape([]),
            ir.TensorType(ir.DataType.FLOAT),
        )
        graph.outputs.append(result)
    found = run_graph(copy, inputs)
    return {str(value.name): float(peak) for value, peak in zip(values, found, strict=True)}


def run_rounded(model: ir.Model, inputs: Mapping[str, Array]) -> list[Array]:
    """Outputs of a model, every 16 bit value of the main graph rounded to 16 bit.

    ONNX Runtime on a CPU has few kernels for float16. It computes the rest in float32 and passes that on from one to
    the next, so that nothing is rounded and nothing overflows; Casts in between it takes away. In the copy that runs
    here every such value goes through Unsqueeze and Squeeze, which it has for 16 bit.

    Args:
        model: Unchanged by this.
        inputs: One batch by input name; float32 arrays are brought to the types of the inputs.

    Raises:
        CheckError: ONNX Runtime cannot run the model.
    """
    copy = model.clone()
    axes = ir.Value(name="qdq.axes", const_value=ir.tensor(np.array([0]), name="qdq.axes"))
    copy.graph.register_initializer(axes)
    for node in list(copy.graph):
        for value in node.outputs:
            if value.dtype in _HALVES and node.op_type != "Constant":
                _round(copy.graph, node, value, axes)
    return run_graph(copy, inputs)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, axes: ir.Value) -> None:
    wider = ir.node("Unsqueeze", [value, axes])
    rounded = ir.node("Squeeze", [wider.outputs[0], axes])
    wider.outputs[0].name, result = f"{value.name}.wider", rounded.outputs[0]
    result.name, result.shape, result.type = f"{value.name}.rounded", value.shape, value.type
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    wider.replace_input_with(0, value)
    graph.insert_after(node, [wider, rounded])


def run_graph(model: ir.Model, inputs: Mapping[str, Array]) -> list[Array]:
    """Outputs of a model in ONNX Runtime.

    Args:
        model: The model.
        inputs: One batch by input name; float32 arrays are brought to the types of the inputs.

    Raises:
        CheckError: ONNX Runtime cannot run the model.
    """
    types = {str(value.name): value.dtype for value in model.graph.inputs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        runner = OnnxModel(path)
        return runner(
            *(_typed(inputs[name], types[name]) for name in runner.inputs if name in inputs)
        )


def _typed(array: Array, dtype: ir.DataType | None) -> Array:
    if array.dtype != np.float32 or dtype not in _HALVES:
        return array
    narrow: Array = array.astype(dtype.numpy())
    return narrow
