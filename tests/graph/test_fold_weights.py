"""FoldWeights: which values become constants, and that the results of the graph stay."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import compute, ops, read

from qdq.graph import fold_weights
from qdq.graph.fold_weights import FoldWeights
from qdq.graph.passes import run_passes

GRAPH = """
g (float[1,2,4,4] x) => (y)
<float[3,2,1,1] w = {{1, 2, 3, 4, 5, 6}}, float[1] m = {{3.5}}, float s = {{0.1}}, int8 o = {{0}},
 int64[4] sizes = {{3, 2, 1, 1}}, float[3] t = {{0.1, 0.2, 0.3}}, int8[3] p = {{0, 0, 0}}>
{{ {} }}
"""
CENTRED = "c = Sub (w, m) n = Mul (c, c)"
PAIR = "q = QuantizeLinear <axis = 0> (n, t, p) d = DequantizeLinear <axis = 0> (q, t, p)"


@pytest.mark.parametrize(
    ("body", "expected_ops"),
    [
        (f"{CENTRED} {PAIR} y = Conv (x, d)", ["QuantizeLinear", "DequantizeLinear", "Conv"]),
        (f"{CENTRED} y = Conv (x, n)", ["Conv"]),
        # the weight of this one depends on the input
        (
            "a = ReduceMean <keepdims = 1> (x) n = Mul (w, a) y = Conv (x, n)",
            ["ReduceMean", "Mul", "Conv"],
        ),
        # nobody's weight: it stays computed
        (
            "c = Sub (w, m) r = ReduceMean <keepdims = 0> (c) y = Add (x, r)",
            ["Sub", "ReduceMean", "Add"],
        ),
        ("y = Conv (x, w)", ["Conv"]),
        # only moved: an embedding may be the same parameter
        ("n = Reshape (w, sizes) y = Conv (x, n)", ["Reshape", "Conv"]),
    ],
)
def test_computed_weights(body, expected_ops):
    model = read(GRAPH.format(body), opset=17)
    expected = compute(model)
    run_passes(model, [FoldWeights()])
    assert ops(model) == expected_ops
    np.testing.assert_allclose(compute(model)["y"], expected["y"], rtol=1e-6)
    assert not FoldWeights()(model).modified
    ir.to_proto(model)


BIAS = """
g (float[2,4] x) => (y)
<float[3,2] table = {{1, 2, 3, 4, 5, 6}}, int64[2] rows = {{2, 0}}, float[4,2] w = {{1, 2, 3, 4, 5, 6, 7, 8}},
 int64[1] first = {{0}}>
{{ {} }}
"""


@pytest.mark.parametrize(
    ("body", "expected_ops"),
    [
        (
            "b = Gather (table, rows) m = MatMul (x, w) a = Add (m, b) y = Softmax (a)",
            ["MatMul", "Add", "Softmax"],
        ),
        # a bias and a mask, with a reshape between
        (
            "b = Gather (table, rows) m = MatMul (x, w) a = Add (b, m) u = Unsqueeze (a, first) n = Neg (b) "
            "c = Add (u, n) y = Softmax (c)",
            ["MatMul", "Add", "Unsqueeze", "Add", "Softmax"],
        ),
        # the bias depends on an input
        (
            "b = Gather (table, rows) m = MatMul (x, w) n = Mul (m, b) a = Add (m, n) y = Softmax (a)",
            ["Gather", "MatMul", "Mul", "Add", "Softmax"],
        ),
        # no softmax
        (
            "b = Gather (table, rows) m = MatMul (x, w) y = Add (m, b)",
            ["Gather", "MatMul", "Add"],
        ),
    ],
)
def test_biases_of_attention(body, expected_ops):
    model = read(BIAS.format(body), opset=17)
    expected = compute(model)
    run_passes(model, [FoldWeights()])
    assert ops(model) == expected_ops
    np.testing.assert_array_equal(compute(model)["y"], expected["y"])


def test_a_large_bias_stays_computed(monkeypatch):
    """A bias of every pair of tokens is a small table, and may be gigabytes as a constant."""
    body = "b = Gather (table, rows) m = MatMul (x, w) a = Add (m, b) y = Softmax (a)"
    monkeypatch.setattr(fold_weights, "_MOST_ELEMENTS", 3)
    model = read(BIAS.format(body), opset=17)
    run_passes(model, [FoldWeights()])
    assert ops(model) == ["Gather", "MatMul", "Add", "Softmax"]
