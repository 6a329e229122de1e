import pytest
from graph_text import apply, ops, read

from qdq.graph.fold_casts import FoldCasts

FLOAT, HALF, INT64 = 1, 10, 7


def test_a_cast_to_its_own_type_goes():
    model = read("g (float[3] x) => (float[3] y) { a = Cast <to = 1> (x) y = Neg (a) }")
    assert ops(apply(model, FoldCasts())) == ["Neg"]


@pytest.mark.parametrize(
    ("start", "types", "remaining_types"),
    [
        ("float16", [FLOAT, HALF], []),  # half fits into float
        ("float16", [FLOAT, 11, HALF], []),
        ("float16", [FLOAT, 11], [11]),
        ("float", [HALF, FLOAT], [HALF, FLOAT]),  # rounds
        ("float", [11, HALF], [HALF]),
        ("int8", [FLOAT, INT64], [INT64]),
    ],
)
def test_chains(start, types, remaining_types):
    steps = " ".join(f"v{n + 1} = Cast <to = {kind}> (v{n})" for n, kind in enumerate(types))
    model = read(
        f"g ({start}[50] x) => (y) {{ v0 = Identity (x) {steps} y = Abs (v{len(types)}) }}"
    )
    apply(model, FoldCasts())
    assert [
        n.attributes.get_int("to") for n in model.graph if n.op_type == "Cast"
    ] == remaining_types


def test_other_readers_of_a_chain_keep_the_first_cast():
    model = read(
        "g (float16[9] x) => (y, z){ a = Neg (x) b = Cast <to = 1> (a) c = Cast <to = 10> (b) y = Neg (b) z = Abs (c) }"
    )
    assert ops(apply(model, FoldCasts())) == ["Neg", "Cast", "Neg", "Abs"]


def test_outputs_of_the_graph_stay():
    model = read("g (float16[9] x) => (y) { b = Cast <to = 1> (x) y = Cast <to = 10> (b) }")
    assert ops(apply(model, FoldCasts())) == ["Cast"]
    assert model.graph.outputs[0].name == "y"


HALF_PAIR = """
g (float16[2,64] x) => (y)
<float s = {%s}, int8 o = {0}>
{
    a = Neg (x)
    b = Cast <to = 1> (a)
    q = QuantizeLinear (b, s, o)
    d = DequantizeLinear (q, s, o)
    e = Cast <to = 10> (d)
    y = Neg (e)
}
"""


def test_a_pair_in_half_takes_a_scale_that_half_holds():
    model = apply(read(HALF_PAIR % 0.03125), FoldCasts())
    assert ops(model) == ["Neg", "QuantizeLinear", "DequantizeLinear", "Neg"]
    assert set(model.graph.initializers) == {"s.float16", "o"}


@pytest.mark.parametrize("scale", ["0.1", "1e-7", "1e6"])
def test_a_scale_that_half_does_not_hold_stays(scale):
    assert ops(apply(read(HALF_PAIR % scale), FoldCasts())).count("Cast") == 2


def test_below_opset_19_scales_are_float():
    assert ops(apply(read(HALF_PAIR % 0.03125, opset=18), FoldCasts())).count("Cast") == 2


def test_a_float_reader_keeps_the_dequantize_in_float():
    text = HALF_PAIR.replace("(y)", "(y, z)").replace("y = Neg (e)", "y = Neg (e) z = Neg (d)")
    assert ops(apply(read(text % 0.03125), FoldCasts())).count("Cast") == 1


def test_per_channel_scales():
    model = read("""
    g (float16[2,2] x) => (y)
    <float[2] s = {0.5, 0.25}, int8[2] o = {0, 0}, int8[2,2] w = {1, 2, 3, 4}>
    {
        d = DequantizeLinear <axis = 1> (w, s, o)
        e = Cast <to = 10> (d)
        y = MatMul (x, e)
    }
    """)
    assert ops(apply(model, FoldCasts())) == ["DequantizeLinear", "MatMul"]
