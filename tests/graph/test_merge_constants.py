from graph_text import apply, read

from qdq.graph.merge_constants import MergeConstants


def names(model, *renamed):
    for old, new in renamed:
        value = model.graph.initializers.pop(old)
        value.name = new
        model.graph.register_initializer(value)
    apply(model, MergeConstants())
    return set(model.graph.initializers)


GRAPH = """
g (float[3] x) => (float[3] y)
<float[3] a = {1, 2, 3}, float[3] b = {1, 2, 3}, float[3] c = {1, 2, 4}, int64[1] i = {0}, int64[1] j = {0}>
{ d = Add (x, a) e = Add (d, b) f = Add (e, c) g1 = Unsqueeze (f, i) y = Squeeze (g1, j) }
"""


def test_equal_constants_become_one():
    assert names(read(GRAPH)) == {"a", "c", "i"}


def test_a_parameter_keeps_its_name():
    assert names(read(GRAPH), ("b", "layer.bias")) == {"layer.bias", "c", "i"}


def test_small_parameters_stay_apart():
    assert names(read(GRAPH), ("a", "one.bias"), ("b", "two.bias")) == {
        "one.bias",
        "two.bias",
        "c",
        "i",
    }


def test_scales_stay_apart():
    model = read("""
    g (float[3] x) => (float[3] y, float[3] z)
    <float s = {0.1}, float t = {0.1}, int8 o = {0}, int8 p = {0}>
    {
        a = QuantizeLinear (x, s, o)
        y = DequantizeLinear (a, s, o)
        b = Neg (x)
        c = QuantizeLinear (b, t, p)
        z = DequantizeLinear (c, t, p)
    }
    """)
    assert names(model) == {"s", "t", "o", "p"}
