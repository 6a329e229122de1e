import numpy as np
import onnx_ir as ir
import pytest
from graph_text import compute, ops, read

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
