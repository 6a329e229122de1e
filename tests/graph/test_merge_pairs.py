import numpy as np
import onnx_ir as ir
import pytest
from graph_text import apply, ops, read

from qdq.graph.coverage import count_qdq
from qdq.graph.merge_pairs import MergePairs

FAN = """
g (float[2,4] x) => (float[2,4] y, float[2,4] z)
<float s = {0.1}, float t = {%s}, int8 o = {0}>
{
    a = QuantizeLinear (x, s, o)
    b = DequantizeLinear (a, s, o)
    c = QuantizeLinear (x, t, o)
    d = DequantizeLinear (c, t, o)
    y = Relu (b)
    z = Neg (d)
}
"""


def test_equal_pairs_of_one_tensor_become_one():
    model = apply(read(FAN % 0.1), MergePairs())
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Relu", "Neg"]
    assert "t" not in model.graph.initializers


def test_unequal_pairs_stay():
    assert count_qdq(apply(read(FAN % 0.2), MergePairs())) == (2, 2)


def test_it_says_what_it_removed():
    graph_pass = MergePairs()
    graph_pass(read(FAN % 0.1))
    assert (graph_pass.removed_q, graph_pass.removed_dq) == (1, 1)


DOUBLE = """
g (float[2,4] x) => (float[2,4] y)
<float s = {0.1}, float t = {%s}, int8 o = {0}>
{
    a = QuantizeLinear (x, s, o)
    b = DequantizeLinear (a, s, o)
    c = QuantizeLinear (b, t, o)
    d = DequantizeLinear (c, t, o)
    y = Relu (d)
}
"""


@pytest.mark.parametrize(("scale", "pair_count"), [(0.1, 1), (0.2, 2)])
def test_back_to_back(scale, pair_count):
    assert count_qdq(apply(read(DOUBLE % scale), MergePairs())) == (pair_count, pair_count)


@pytest.mark.parametrize("scale", [1e-44, 3e38])
def test_a_scale_that_leaves_the_range_of_float_stays(scale):
    model = read(DOUBLE % 0.1)
    for name in ("s", "t"):  # onnx 1.22 cannot read such a number in text
        model.graph.initializers[name].const_value = ir.tensor(np.float32(scale))
    assert count_qdq(apply(model, MergePairs())) == (2, 2)


def test_zero_points_and_axes_count():
    model = read("""
    g (float[2,2] x) => (float[2,2] y0, float[2,2] y1, float[2,2] y2, float[2,2] y3)
    <float s = {0.1}, int8 o = {0}, int8 p = {1}, float[2] v = {0.1, 0.2}, int8[2] w = {0, 0}>
    {
        a = QuantizeLinear (x, s, o)
        b = QuantizeLinear (x, s, p)
        c = QuantizeLinear <axis = 0> (x, v, w)
        d = QuantizeLinear <axis = 1> (x, v, w)
        y0 = DequantizeLinear (a, s, o)
        y1 = DequantizeLinear (b, s, p)
        y2 = DequantizeLinear <axis = 0> (c, v, w)
        y3 = DequantizeLinear <axis = 1> (d, v, w)
    }
    """)
    assert count_qdq(apply(model, MergePairs())) == (4, 4)


def test_per_channel_pairs_too():
    model = read("""
    g (float[2,3] x) => (float[2,3] y, float[2,3] z)
    <float[3] s = {0.1, 0.2, 0.3}, int8[3] o = {0, 0, 0}>
    {
        a = QuantizeLinear <axis = 1> (x, s, o)
        b = DequantizeLinear <axis = 1> (a, s, o)
        c = QuantizeLinear <axis = 1> (b, s, o)
        d = DequantizeLinear <axis = 1> (c, s, o)
        e = QuantizeLinear <axis = 1> (x, s, o)
        f = DequantizeLinear <axis = 1> (e, s, o)
        y = Relu (d)
        z = Neg (f)
    }
    """)
    assert count_qdq(apply(model, MergePairs())) == (1, 1)


def test_outputs_of_the_graph_keep_their_names():
    model = read("""
    g (float[2,4] x) => (int8[2,4] a, float[2,4] b, int8[2,4] c, float[2,4] d)
    <float s = {0.1}, int8 o = {0}>
    {
        a = QuantizeLinear (x, s, o)
        b = DequantizeLinear (a, s, o)
        c = QuantizeLinear (b, s, o)
        d = DequantizeLinear (c, s, o)
    }
    """)
    assert count_qdq(apply(model, MergePairs())) == (2, 2)


def test_a_scale_that_is_an_input_is_no_constant():
    model = read("""
    g (float[2,4] x, float s) => (float[2,4] y)
    <int8 o = {0}>
    {
        a = QuantizeLinear (x, s, o)
        b = DequantizeLinear (a, s, o)
        c = QuantizeLinear (x, s, o)
        d = DequantizeLinear (c, s, o)
        y = Add (b, d)
    }
    """)
    MergePairs()(model)
    assert count_qdq(model) == (2, 2)
