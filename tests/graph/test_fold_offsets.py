import numpy as np
import onnx_ir as ir
import pytest
from graph_text import compute, ops, read

from qdq.graph.fold_offsets import FoldOffsets
from qdq.graph.passes import run_passes

GRAPH = """
g (float[2,3,4,4] x) => (%s)
<float[3,3,1,1] w = {1, -2, 0.5, 0.25, 1, 1, 3, -1, 2}, float[3] b = {1, 2, 3}, float low = {0}, float high = {6},
 float c = {2.5}, float other = {2}, float[1,1,1,1] ranked = {2.5}, float[3,1,1] channels = {1, 2, 3},
 int64[1] last = {-1},
 int64[4] four = {2, 3, 4, 4}, int64[96] order = {%s}>
{
    p = Conv <kernel_shape = [1, 1]> (x, w%s)
    q = Clip (p, %s)
    %s
}
"""
TWO = "d = Sub (q, c) e = Sub (q, c) y = Neg (d) z = Abs (e)"
OUTPUTS = "float[2,3,4,4] y, float[2,3,4,4] z"


def build(rest=TWO, *, bias=", b", bounds="low, high", outputs=OUTPUTS):
    order = ", ".join(map(str, range(95, -1, -1)))
    return read(GRAPH % (outputs, order, bias, bounds, rest))


def test_the_offset_goes_into_bias_and_bounds():
    model = build()
    expected = compute(model)
    run_passes(model, [FoldOffsets()])
    assert ops(model) == ["Conv", "Clip", "Neg", "Abs"]
    assert "c" not in model.graph.initializers and "b" not in model.graph.initializers
    outputs = compute(model)
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, rtol=1e-6, atol=1e-6)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not FoldOffsets()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


def test_a_bias_that_another_node_reads_stays():
    model = build("d = Sub (q, c) y = Neg (d) z = Add (y, y) ", outputs=OUTPUTS)
    shared = build(
        "d = Sub (q, c) y = Neg (d) r = Conv <kernel_shape = [1, 1]> (x, w, b) z = Abs (r)"
    )
    expected = compute(shared)
    run_passes(shared, [FoldOffsets()])
    assert "Sub" not in ops(shared) and "b" in shared.graph.initializers
    for name, values in compute(shared).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6)
    run_passes(model, [FoldOffsets()])
    assert "Sub" not in ops(model)


ANY_SIZE = "float[a,b,c,d] y, float[e,f,g,h] z"
POOLED = [
    "p2 = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 1, 1], strides = [2, 2]> (q)",
    "p2 = AveragePool <kernel_shape = [2, 2]> (q)",
    "p2 = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 1, 1]> (q)",
    "p2 = AveragePool <kernel_shape = [2, 2], count_include_pad = 1> (q)",
    "p2 = GlobalAveragePool (q)",
    "p2 = GlobalMaxPool (q)",
    "p2 = ReduceMean <keepdims = 1> (q, last)",
    "f = Flatten (q) p2 = Reshape (f, four)",
    "n = Shape (q) r = Reshape (q, last) m = Reshape (order, n) p2 = Gather <axis = 0> (r, m)",
    "u = Unsqueeze (q, last) p2 = Squeeze (u, last)",
    "i = Identity (q) n = Shape (q) p2 = Reshape (i, n)",
]
PADDED = "p2 = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1> (q)"
SUMMED = "p2 = ReduceSum <keepdims = 1> (q, last)"


@pytest.mark.parametrize("pooling", POOLED)
def test_an_offset_behind_pooling_goes_into_bias_and_bounds(pooling):
    model = build(
        f"{pooling} d = Sub (p2, c) y = Neg (d) e = Sub (q, c) z = Abs (e)", outputs=ANY_SIZE
    )
    expected = compute(model)
    run_passes(model, [FoldOffsets()])
    assert "Sub" not in ops(model)
    for name, values in compute(model).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rest",
    [
        f"{PADDED} d = Sub (p2, c) y = Neg (d) e = Sub (q, c) z = Abs (e)",
        f"{SUMMED} d = Sub (p2, c) y = Neg (d) e = Sub (q, c) z = Abs (e)",
        "p2 = GlobalAveragePool (q) d = Sub (p2, c) y = Neg (d) z = Abs (p2)",
        "p2 = GlobalAveragePool (q) d = Sub (p2, other) y = Neg (d) e = Sub (q, c) z = Abs (e)",
        "z = GlobalAveragePool (q) d = Sub (z, c) y = Neg (d)",
    ],
)
def test_an_offset_stays_if_something_between_or_beside_reads_the_values(rest):
    model = build(rest, outputs=ANY_SIZE)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not FoldOffsets()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "options",
    [
        {"rest": "d = Sub (q, c) e = Sub (q, other) y = Neg (d) z = Abs (e)"},
        {"rest": "d = Sub (q, channels) e = Sub (q, channels) y = Neg (d) z = Abs (e)"},
        {"rest": "d = Sub (q, c) y = Neg (d) z = Abs (q)"},
        {"rest": "d = Sub (q, c) y = Neg (d) z = Abs (p)"},
        {"rest": "d = Sub (c, q) y = Neg (d) z = Abs (d)"},
        {"rest": "z = Sub (q, c) y = Neg (z)"},
        {"bias": ""},
        {"bounds": "low"},
        {"bounds": ", high"},
        {"rest": "d = Sub (q, ranked) e = Sub (q, ranked) y = Neg (d) z = Abs (e)"},
    ],
)
def test_what_cannot_be_folded_stays(options):
    model = build(**options)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not FoldOffsets()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


GEMM = """
g (float[4,3] x) => (float[4,3] y)
<float[3,3] w = {1, -2, 0.5, 0.25, 1, 1, 3, -1, 2}, float[3] b = {1, 2, 3}, float low = {0}, float high = {6},
 float c = {2.5}>
{
    p = Gemm <transB = 1, alpha = 0.5 %s> (x, w, b)
    q = Clip (p, low, high)
    d = Sub (q, c)
    y = Neg (d)
}
"""


@pytest.mark.parametrize(
    ("beta", "is_folded"), [("", True), (", beta = 1.0", True), (", beta = 0.5", False)]
)
def test_a_bias_of_a_gemm_that_is_scaled_stays(beta, is_folded):
    model = read(GEMM % beta)
    expected = compute(model)["y"]
    run_passes(model, [FoldOffsets()])
    assert ("Sub" not in ops(model)) == is_folded
    np.testing.assert_allclose(compute(model)["y"], expected, rtol=1e-6, atol=1e-6)
