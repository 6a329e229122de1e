"""Each repair on a small graph: ONNX Runtime computes the same numbers, to the bit."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import apply, read

from qdq.graph.repair import MakeCodesSigned, MakeScalesScalar, WriteAxes, WriteZeroPoints

ACTIVATION = """
g (float[2,4] x) => (y)
<%s>
{
    q = QuantizeLinear (x, s, o)
    d = DequantizeLinear (q, s, o)
    y = Neg (d)
}
"""
WEIGHT = """
g (float[2,3] x) => (y)
<%s>
{
    d = DequantizeLinear %s
    y = MatMul (x, d)
}
"""


def node_of(model, op_type):
    return next(node for node in model.graph if node.op_type == op_type)


def constant_at(model, op_type, position):
    return node_of(model, op_type).inputs[position].const_value.numpy()


def test_scales_of_one_element_become_scalars():
    repair = MakeScalesScalar()
    model = apply(read(ACTIVATION % "float[1] s = {0.1}, int8[1] o = {0}"), repair)
    assert constant_at(model, "QuantizeLinear", 1).shape == ()
    assert constant_at(model, "DequantizeLinear", 2).shape == ()


def test_the_scale_of_a_single_output_channel_stays():
    constants = "int8[3,1] w = {1, 2, 3}, float[1] s = {0.1}, int8[1] o = {0}"
    model = read(WEIGHT % (constants, "<axis = 1> (w, s, o)"))
    assert not MakeScalesScalar()(model).modified


def test_the_only_axis_that_fits_is_written():
    constants = (
        "int8[3,4] w = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3] s = {0.1,0.2,0.3}, int8[3] o = {0,0,0}"
    )
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 19]>' + WEIGHT % (constants, "(w, s, o)")
    )
    repair = WriteAxes()
    repair(model)
    assert len(repair.changed) == 1
    assert node_of(model, "DequantizeLinear").attributes.get_int("axis") == 0


def test_an_axis_that_could_be_two_is_not_written():
    constants = "int8[3,3] w = {1,2,3,4,5,6,7,8,9}, float[3] s = {0.1,0.2,0.3}, int8[3] o = {0,0,0}"
    model = read(WEIGHT % (constants, "(w, s, o)"))
    assert not WriteAxes()(model).modified


def test_codes_around_128_become_signed():
    model = apply(read(ACTIVATION % "float s = {0.1}, uint8 o = {128}"), MakeCodesSigned())
    assert node_of(model, "QuantizeLinear").outputs[0].dtype == ir.DataType.INT8
    assert constant_at(model, "QuantizeLinear", 2) == np.int8(0)
    assert constant_at(model, "DequantizeLinear", 2) == np.int8(0)


def test_constant_codes_around_128_become_signed():
    constants = "uint8[3,2] w = {0, 1, 127, 128, 129, 255}, float s = {0.1}, uint8 o = {128}"
    model = apply(read(WEIGHT % (constants, "(w, s, o)")), MakeCodesSigned())
    codes = constant_at(model, "DequantizeLinear", 0)
    assert codes.dtype == np.int8
    assert codes.ravel().tolist() == [-128, -127, -1, 0, 1, 127]


@pytest.mark.parametrize("zero_point", [0, 127, 255])
def test_codes_around_another_zero_point_stay(zero_point):
    model = read(ACTIVATION % f"float s = {{0.1}}, uint8 o = {{{zero_point}}}")
    assert not MakeCodesSigned()(model).modified


def test_a_zero_point_that_is_left_out_is_written():
    constants = "int8[3,2] w = {1, 2, 3, 4, 5, 6}, float[2] s = {0.1, 0.2}"
    model = apply(read(WEIGHT % (constants, "<axis = 1> (w, s)")), WriteZeroPoints())
    zero_point = constant_at(model, "DequantizeLinear", 2)
    assert zero_point.dtype == np.int8
    assert zero_point.tolist() == [0, 0]
