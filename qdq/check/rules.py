"""What every Q/DQ of a graph must fulfil before TensorRT sees it; ids as the lint table (L01 -> QDQ101)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdq.graph.coverage import WEIGHTED_OPS, dequantizer_of

UNCALIBRATED = "qdq.uncalibrated"
"""Metadata key of a file that was exported before calibration: the quantizers whose ranges are those of one example."""


@dataclass(frozen=True)
class Finding:
    """One violation.

    Args:
        rule: Id of the rule, e.g. "QDQ103".
        node: Name of the ONNX node.
        message: What was found.
        fix: What to do.
    """

    rule: str
    node: str
    message: str
    fix: str


def find_violations(model: ir.Model) -> list[Finding]:
    """All violations of the main graph, in graph order."""
    findings: list[Finding] = []
    if names := model.metadata_props.get(UNCALIBRATED):
        findings.append(
            Finding(
                "QDQ120", model.graph.name or "",
                f"{len(names.split(','))} quantizers were exported before calibration, with the ranges of one example",
                "calibrate and export again.",
            )
        )  # fmt: skip
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            findings.extend(_check_pair_member(node))
        elif node.op_type in WEIGHTED_OPS and node.domain == "":
            findings.extend(_check_weighted(node))
    return findings


def _check_pair_member(node: ir.Node) -> Iterator[Finding]:
    name = node.name or ""
    scale = _constant(node.inputs[1])
    if scale is None:
        yield Finding("QDQ109", name, "the scale is computed in the graph (R-DYN)", "export with calibrated amax.")
        return
    values = scale.numpy()
    if not np.all(np.isfinite(values) & (values > 0)):
        yield Finding("QDQ101", name, "a scale is zero, negative, NaN or Inf (R-SCALE)", "calibrate again.")
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = ir.convenience.get_const_tensor(zero_point) if zero_point else None
    if zeros is None or zeros.dtype != ir.DataType.INT8 or np.any(zeros.numpy()):
        found = "missing" if zeros is None else "not zero" if np.any(zeros.numpy()) else f"{zeros.dtype.name}, not INT8"
        yield Finding("QDQ102", name, f"the zero point is {found} (R-SYM)", "write an int8 zero point of zero.")
    if values.shape == (1,):
        yield Finding(
            "QDQ103", name, "a per-tensor scale has shape [1]; TensorRT-RTX then runs in float (R-SHAPE)",
            "write it as a 0-D scalar.",
        )  # fmt: skip
    elif values.ndim and node.op_type == "QuantizeLinear" and not _is_constant(node.inputs[0]):  # a float weight may
        yield Finding("QDQ104", name, f"an activation has {values.size} scales (R-ACT-PC)", "use one per tensor.")
    if "axis" not in node.attributes and values.ndim:
        yield Finding("QDQ105", name, "the axis is not written down (R-AXIS)", "write the axis attribute.")


def _check_weighted(node: ir.Node) -> Iterator[Finding]:
    name = node.name or ""
    activation, weight = (dequantizer_of(value) for value in node.inputs[:2])
    if (activation is None) != (weight is None):
        which = "input" if weight is None else "weight"
        yield Finding(
            "QDQ110", name, f"only the {which} is quantized, so it runs in float with extra kernels (R-CONV-2)",
            "quantize both or none.",
        )  # fmt: skip
    if weight is not None and node.inputs[1] in weight.outputs:  # a Transpose between them would move the axis
        yield from _check_axis(node, weight)


def _check_axis(node: ir.Node, weight: ir.Node) -> Iterator[Finding]:
    scale, codes, axis = weight.inputs[1], weight.inputs[0], weight.attributes.get("axis")
    scales = _constant(scale)
    if scales is None or scales.size == 1 or axis is None or codes is None or codes.shape is None:
        return
    rank = len(codes.shape)
    found, expected = axis.as_int() % rank, _output_axis(node, rank)
    if found != expected:
        yield Finding(
            "QDQ105", node.name or "", f"the weight has scales on axis {found}, not on its output channels (R-AXIS)",
            f"quantize the weight on axis {expected}.",
        )  # fmt: skip


def _output_axis(node: ir.Node, rank: int) -> int:
    """Where the output channels of a weight lie."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}[node.op_type]


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a value, also through the operators that only pass one on (R-DYN); None if it is computed."""
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Identity", "Cast"):
        value = node.inputs[0]
    return None if value is None else ir.convenience.get_const_tensor(value)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None
