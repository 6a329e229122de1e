import numpy as np
import onnx_ir as ir
import pytest
from graph_text import apply, read
from onnx.reference import ReferenceEvaluator

from qdq.graph.merge_products import MergeProducts

GRAPH = """
g (float[3] x, float[3] w) => (float[3] y, float[3] z)
<float[3] a = {{1, 2, 3}}, float[3] b = {second}>
{{ p = Mul ({first}, a) q = Mul (x, b) y = Neg (p) z = Abs (q) }}
"""


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [("x", "{1, 2, 3}", 1), ("x", "{1, 2, 4}", 2), ("w", "{1, 2, 3}", 2)],
)
def test_equal_products_become_one(first, second, count):
    model = read(GRAPH.format(first=first, second=second))
    data = {name: np.array([1, -2, 3], np.float32) * sign for name, sign in (("x", 1), ("w", -1))}
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, data)
    apply(model, MergeProducts())
    assert sum(node.op_type == "Mul" for node in model.graph) == count
    actual = ReferenceEvaluator(ir.to_proto(model)).run(None, data)
    np.testing.assert_array_equal(actual, expected)


def test_outputs_of_the_graph_stay():
    model = read("""
    g (float[3] x) => (float[3] y, float[3] z)
    <float[3] a = {1, 2, 3}>
    { y = Mul (x, a) z = Mul (x, a) }
    """)
    apply(model, MergeProducts())
    assert len(list(model.graph)) == 2
