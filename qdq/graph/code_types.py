"""Types of the codes of Q/DQ: their names, and which opset, parser and GPU have them.

Sources: the ONNX standard for opsets; the parser and the compiler of TensorRT-RTX 1.7 for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import onnx_ir as ir

from qdq.formats import FP8_LEAST_SM, FP8_LOWEST_OPSET
from qdq.graph.pairs import QDQ_OPS, code_type_of, input_of, is_op, is_trt_op


@dataclass(frozen=True)
class CodeType:
    """Facts about one type of codes.

    Args:
        name: For texts, such as "int8" or "FP8".
        kernel: TensorRT's name of the type in its lists of kernels, such as "Int8"; the same style for other types.
        opset: First opset in which QuantizeLinear and DequantizeLinear have the type.
        is_read: Whether TensorRT's parser reads such codes. It reads uint8 as int8.
        multiplies: Whether TensorRT has products of two operands of the type. Other types are for stored weights only.
        least_sm: Lowest compute capability that has the type, 89 for 8.9; 0 if every GPU has it.
    """

    name: str
    kernel: str
    opset: int
    is_read: bool = False
    multiplies: bool = False
    least_sm: int = 0


CODE_TYPES: dict[ir.DataType, CodeType] = {
    ir.DataType.INT8: CodeType("int8", "Int8", 10, is_read=True, multiplies=True),
    ir.DataType.UINT8: CodeType("uint8", "UInt8", 10),
    ir.DataType.INT32: CodeType("int32", "Int32", 10),
    ir.DataType.FLOAT8E4M3FN: CodeType(
        "FP8",
        "FP8",
        FP8_LOWEST_OPSET,
        is_read=True,
        multiplies=True,
        least_sm=FP8_LEAST_SM,
    ),
    ir.DataType.FLOAT8E4M3FNUZ: CodeType("FP8 (E4M3FNUZ)", "FP8E4M3FNUZ", 19),
    ir.DataType.FLOAT8E5M2: CodeType("FP8 (E5M2)", "FP8E5M2", 19),
    ir.DataType.FLOAT8E5M2FNUZ: CodeType("FP8 (E5M2FNUZ)", "FP8E5M2FNUZ", 19),
    ir.DataType.INT16: CodeType("int16", "Int16", 21),
    ir.DataType.UINT16: CodeType("uint16", "UInt16", 21),
    ir.DataType.INT4: CodeType("int4", "Int4", 21, is_read=True),
    ir.DataType.UINT4: CodeType("uint4", "UInt4", 21),
    ir.DataType.FLOAT4E2M1: CodeType("FP4", "FP4", 23, is_read=True, multiplies=True, least_sm=100),
    ir.DataType.INT2: CodeType("int2", "Int2", 25),
    ir.DataType.UINT2: CodeType("uint2", "UInt2", 25),
}
"""Every type that ONNX allows for codes."""

LARGEST_FP8_KERNEL = 32
"""Most positions of a kernel, height x width, for which TensorRT-RTX 1.7 runs a convolution in FP8 (R-CONV-8)."""

_INT8 = CODE_TYPES[ir.DataType.INT8]

# TensorRT's own Q and DQ, which ModelOpt writes: FP8 for opsets below 19, blocks in every opset -> type of the codes.
# MXFP8 is FP8 with a power of two as the scale of each block of 32.
_TRT_TYPES = {
    "TRT_FP8QuantizeLinear": "FP8",
    "TRT_FP8DequantizeLinear": "FP8",
    "TRT_MXFP8DynamicQuantize": "MXFP8",
    "TRT_MXFP8DequantizeLinear": "MXFP8",
    "TRT_FP4DynamicQuantize": "FP4",
}
_TRT_DEQUANTIZERS = ("TRT_FP8DequantizeLinear", "TRT_MXFP8DequantizeLinear")
_TRT_LEAST_SM = {"FP8": 89, "MXFP8": 89, "FP4": 100}


def find_code_type(node: ir.Node) -> CodeType:
    """The type of the codes of a Q or DQ.

    Args:
        node: A QuantizeLinear or DequantizeLinear.

    Returns:
        int8 if the file does not show the type, because TensorRT then takes it.
    """
    dtype = code_type_of(node)
    if dtype is None:
        return _INT8
    return CODE_TYPES.get(dtype, CodeType(dtype.name, dtype.name, 1))


def is_trt_quantizer(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether a node is one of TensorRT's own Q and DQ."""
    return is_trt_op(node, *_TRT_TYPES)


def is_trt_dequantizer(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether a node is one of TensorRT's own DQ."""
    return is_trt_op(node, *_TRT_DEQUANTIZERS)


def name_kernel_type(node: ir.Node) -> str:
    """TensorRT's name of the type of the codes that a Q writes or a DQ reads.

    Args:
        node: A QuantizeLinear or DequantizeLinear, or one of TensorRT's own.

    Returns:
        Such as "Int8", "FP8" or "Int4". "MXFP8" for FP8 whose scales are powers of two. "Int8" for uint8, which
        TensorRT reads as int8 (R-SYM).
    """
    if is_trt_quantizer(node):
        return _TRT_TYPES[node.op_type]

    scale = input_of(node, 1)
    if scale is not None and scale.dtype == ir.DataType.FLOAT8E8M0:
        return "MX" + find_code_type(node).kernel
    kernel_type = find_code_type(node).kernel
    return "Int8" if kernel_type == "UInt8" else kernel_type


def list_lacking(nodes: Iterable[ir.Node], sm: int) -> Iterator[tuple[ir.Node, str, int]]:
    """The Q and DQ of a type that a GPU does not have.

    Args:
        nodes: Nodes of a graph.
        sm: Compute capability of the GPU, 89 for 8.9.

    Yields:
        The node, the name of the type, and the lowest compute capability that has it.
    """
    for node in nodes:
        name, least_sm = _least_sm_of(node)
        if least_sm and sm < least_sm:
            yield node, name, least_sm


def _least_sm_of(node: ir.Node) -> tuple[str, int]:
    """The type of the codes of a node, and the lowest compute capability that has it; 0 if every GPU does."""
    if is_op(node, *QDQ_OPS) and len(node.inputs) >= 2:
        code_type = find_code_type(node)
        return code_type.name, code_type.least_sm
    if is_trt_quantizer(node):
        name = _TRT_TYPES[node.op_type]
        return name, _TRT_LEAST_SM[name]
    return "", 0
