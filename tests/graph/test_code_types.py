"""Facts about types of codes, against onnx's own table of types and small graphs."""

import onnx
import onnx_ir as ir
import pytest

from qdq.graph.code_types import (
    CODE_TYPES,
    find_code_type,
    is_trt_dequantizer,
    is_trt_quantizer,
    list_lacking,
    name_kernel_type,
)

TRT = """
<ir_version: 10, opset_import: ["": 21, "trt": 1]>
g (float16[4,32] x, float s) => (y)
{
    a, b = trt.TRT_FP4DynamicQuantize (x, s)
    c = DequantizeLinear (b, s)
    d = DequantizeLinear <axis = -1, block_size = 16> (a, c)
    e = trt.TRT_FP8QuantizeLinear (d, s)
    y = trt.TRT_FP8DequantizeLinear (e, s)
}
"""
PAIR = """
<ir_version: 10, opset_import: ["": 24]>
g (float[4] x) => (y)
<float s = {0.5}, TYPE z = {0}>
{
    q = QuantizeLinear (x, s, z)
    y = DequantizeLinear (q, s, z)
}
"""


def _types_at(opset):
    schema = onnx.defs.get_schema("DequantizeLinear", opset, "")
    constraints = {
        constraint.type_param_str: constraint.allowed_type_strs
        for constraint in schema.type_constraints
    }
    return constraints.get("T1", constraints.get("T"))


@pytest.mark.parametrize("dtype", CODE_TYPES, ids=lambda dtype: dtype.name)
def test_first_opset_is_that_of_onnx(dtype):
    name = f"tensor({dtype.name.lower()})"
    first = next(
        opset for opset in range(10, onnx.defs.onnx_opset_version() + 1) if name in _types_at(opset)
    )
    assert CODE_TYPES[dtype].opset == first


def test_every_type_of_onnx_is_listed():
    """But for the 6 bit types, which onnx-ir reads in its newest versions only."""
    names = {f"tensor({dtype.name.lower()})" for dtype in CODE_TYPES}
    others = {"tensor(float6e2m3)", "tensor(float6e3m2)"}
    assert names == set(_types_at(onnx.defs.onnx_opset_version())) - others


def test_operators_of_tensorrt():
    nodes = list(ir.from_onnx_text(TRT).graph)
    assert [is_trt_quantizer(node) for node in nodes] == [True, False, False, True, True]
    assert [is_trt_dequantizer(node) for node in nodes] == [False, False, False, False, True]
    assert [name_kernel_type(node) for node in nodes] == ["FP4", "FP8", "FP4", "FP8", "FP8"]


@pytest.mark.parametrize(
    ("sm", "lacking"),
    [
        (86, {"FP4": 100, "FP8": 89}),
        (89, {"FP4": 100}),
        (120, {}),
    ],
)
def test_types_that_a_gpu_lacks(sm, lacking):
    graph = ir.from_onnx_text(TRT).graph
    assert {word: least_sm for _, word, least_sm in list_lacking(graph, sm)} == lacking


@pytest.mark.parametrize(
    ("dtype", "word", "kernel_type"),
    [
        ("int8", "int8", "Int8"),
        ("uint8", "uint8", "Int8"),  # TensorRT reads it as int8
        ("int16", "int16", "Int16"),
    ],
)
def test_names(dtype, word, kernel_type):
    graph = ir.from_onnx_text(PAIR.replace("TYPE", dtype)).graph
    for node in graph:
        assert find_code_type(node).name == word
        assert name_kernel_type(node) == kernel_type
    assert not list(list_lacking(graph, 75))


def test_a_type_that_the_file_does_not_show_is_int8():
    quantize, _ = ir.from_onnx_text(
        PAIR.replace("TYPE", "int8").replace("(x, s, z)", "(x, s)")
    ).graph
    assert find_code_type(quantize).name == "int8"
