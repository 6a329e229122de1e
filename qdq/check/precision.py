"""Measure the ranges of an ONNX graph, and its outputs in 16 bit, with ONNX Runtime."""

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
    """Run a copy of the model where every float32 value also goes to Abs and ReduceMax.

    The results are scalars, so ONNX Runtime frees each value once it is read and needs little more memory than usual.

    Args:
        model: A float32 model, unchanged by this.
        inputs: One batch by input name.

    Returns:
        Name of the value -> largest magnitude, infinite where the value is; constants and subgraphs are left out.

    Raises:
        CheckError: ONNX Runtime cannot run the model.
    """
    copy = model.clone()
    values = _list_float_values(copy.graph)
    copy.graph.outputs.clear()
    for value in values:
        _add_peak(copy.graph, value)
    peaks = run_graph(copy, inputs)
    return {str(value.name): float(peak) for value, peak in zip(values, peaks, strict=True)}


def _list_float_values(graph: ir.Graph) -> list[ir.Value]:
    """Inputs of a graph and outputs of its nodes in float32, without constants."""
    values = list(graph.inputs)
    for node in graph:
        if node.op_type != "Constant":
            values += node.outputs
    return list(filter(_is_float, values))


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _add_peak(graph: ir.Graph, value: ir.Value) -> None:
    """Add the largest magnitude of a value as an output, a scalar."""
    magnitude = ir.node("Abs", [value])
    maximum = ir.node("ReduceMax", [magnitude.outputs[0]], attributes={"keepdims": 0})
    graph.extend([magnitude, maximum])
    peak = maximum.outputs[0]
    peak.name = f"{value.name}.peak"
    peak.shape = ir.Shape([])
    peak.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(peak)


def run_rounded(model: ir.Model, inputs: Mapping[str, Array]) -> list[Array]:
    """Outputs of a model, every 16 bit value of the main graph rounded to 16 bit.

    ONNX Runtime on a CPU has few kernels for float16. It computes the other operators in float32, passes float32 values
    between them, and removes the Casts, so nothing is rounded and nothing overflows. In the copy that runs here every
    such value goes through Unsqueeze and Squeeze, which have 16 bit kernels.

    Args:
        model: Unchanged by this.
        inputs: One batch by input name; float32 arrays are converted to the types of the inputs.

    Raises:
        CheckError: ONNX Runtime cannot run the model.
    """
    copy = model.clone()
    axes = ir.Value(name="qdq.axes", const_value=ir.tensor(np.array([0]), name="qdq.axes"))
    copy.graph.register_initializer(axes)
    for node in list(copy.graph):
        if node.op_type == "Constant":
            continue
        for value in node.outputs:
            if value.dtype in _HALVES:
                _round_value(copy.graph, node, value, axes)
    return run_graph(copy, inputs)


def _round_value(graph: ir.Graph, node: ir.Node, value: ir.Value, axes: ir.Value) -> None:
    """Let the readers of a value read it after Unsqueeze and Squeeze.

    Args:
        graph: Changed in place.
        node: The node that computes the value.
        value: A value in 16 bit.
        axes: A constant [0], which both operators read.
    """
    unsqueeze = ir.node("Unsqueeze", [value, axes])
    unsqueeze.outputs[0].name = f"{value.name}.wider"
    squeeze = ir.node("Squeeze", [unsqueeze.outputs[0], axes])
    rounded = squeeze.outputs[0]
    rounded.name = f"{value.name}.rounded"
    rounded.shape = value.shape
    rounded.type = value.type
    value.replace_all_uses_with(rounded, replace_graph_outputs=True)
    unsqueeze.replace_input_with(0, value)
    graph.insert_after(node, [unsqueeze, squeeze])


def run_graph(model: ir.Model, inputs: Mapping[str, Array]) -> list[Array]:
    """Outputs of a model in ONNX Runtime.

    Args:
        model: The model.
        inputs: One batch by input name; float32 arrays are converted to the types of the inputs.

    Raises:
        CheckError: ONNX Runtime cannot run the model.
    """
    types = {str(value.name): value.dtype for value in model.graph.inputs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        runner = OnnxModel(path)
        names = [name for name in runner.inputs if name in inputs]
        return runner(*(_to_half(inputs[name], types[name]) for name in names))


def _to_half(array: Array, dtype: ir.DataType | None) -> Array:
    """A float32 array in the 16 bit type of an input; unchanged for other arrays and other inputs."""
    if array.dtype != np.float32 or dtype not in _HALVES:
        return array
    half: Array = array.astype(dtype.numpy())
    return half
