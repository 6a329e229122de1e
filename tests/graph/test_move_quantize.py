import onnx_ir as ir
import onnxruntime
import pytest
from graph_text import apply, ops, read

from qdq.graph.merge_pairs import MergePairs
from qdq.graph.move_quantize import MoveQuantizeBeforeCopies

COPIES = {
    "DepthToSpace": "c = DepthToSpace <blocksize = 2> (r)",
    "Expand": "c = Expand (r, i4)",
    "Flatten": "c = Flatten (r)",
    "Gather": "c = Gather <axis = 1> (r, i2)",
    "Pad": "c = Pad (r, i8)",
    "Pad edge": 'c = Pad <mode = "edge"> (r, i8)',
    "Pad reflect": 'c = Pad <mode = "reflect"> (r, i8)',
    "Pad zero": "c = Pad (r, i8, zero)",
    "Reshape": "c = Reshape (r, i3)",
    "Slice": "c = Slice (r, i1, i2b, i1)",
    "SpaceToDepth": "c = SpaceToDepth <blocksize = 2> (r)",
    "Squeeze": "c = Squeeze (r, i1)",
    "Tile": "c = Tile (r, i4)",
    "Transpose": "c = Transpose <perm = [2, 3, 0, 1]> (r)",
    "Unsqueeze": "c = Unsqueeze (r, i1)",
}
GRAPH = """
g (float[1,4,4,4] x) => (y)
<float s = {0.1}, int8 o = {%s}, float zero = {%s}, float[1,4,1,1] w = {1, 2, 3, 4},
 int64[1] i1 = {0}, int64[1] i2b = {1}, int64[2] i2 = {2, 1},
 int64[3] i3 = {4, 8, 2}, int64[4] i4 = {2, 1, 1, 1}, int64[8] i8 = {0, 0, 1, 1, 0, 0, 1, 2}>
{
    r = Neg (x)
    %s
    q = QuantizeLinear (c, s, o)
    d = DequantizeLinear (q, s, o)
    y = %s
}
"""


def copy_of(kind, zero_point=0, constant=0.0, opset=19, reader=None):
    reader = reader or ("Conv (d, w)" if "Pad" in kind else "Sin (d)")
    return read(GRAPH % (zero_point, constant, COPIES[kind], reader), opset)


@pytest.mark.parametrize(
    "kind", [kind for kind in COPIES if kind not in ("Pad edge", "Pad reflect")]
)
def test_the_pair_moves_in_front_of(kind):
    model = apply(copy_of(kind), MoveQuantizeBeforeCopies())
    reader = "Conv" if "Pad" in kind else "Sin"
    assert ops(model) == ["Neg", "QuantizeLinear", "DequantizeLinear", kind.split()[0], reader]
    assert model.graph.node(1).outputs[0].shape == [1, 4, 4, 4]


@pytest.mark.parametrize("amounts", ["0, 1, 0, 0, 0, 2, 0, 0", "0, 0, -1, 0, 0, 0, 0, 0"])
def test_padding_of_channels_or_cropping_stays_in_front(amounts):
    text = GRAPH.replace("int64[8] i8 = {0, 0, 1, 1, 0, 0, 1, 2}", f"int64[8] i8 = {{{amounts}}}")
    weight = (
        "float[1,7,1,1] w = {1, 2, 3, 4, 5, 6, 7}"
        if amounts.startswith("0, 1")
        else "float[1,4,1,1] w = {1, 2, 3, 4}"
    )
    text = text.replace("float[1,4,1,1] w = {1, 2, 3, 4}", weight)
    model = read(text % (0, 0.0, COPIES["Pad"], "Conv (d, w)"))
    assert ops(apply(model, MoveQuantizeBeforeCopies()))[1] == "Pad"


@pytest.mark.parametrize(
    ("kind", "reader"),
    [("Pad", "Sin (d)"), ("Pad edge", "Conv (d, w)"), ("Pad reflect", "Conv (d, w)")],
)
def test_padding_that_no_convolution_takes_in_stays_in_front(kind, reader):
    assert ops(apply(copy_of(kind, reader=reader), MoveQuantizeBeforeCopies()))[1] == "Pad"


@pytest.mark.parametrize("kind", COPIES)
def test_not_with_a_zero_point(kind):
    assert ops(apply(copy_of(kind, zero_point=3), MoveQuantizeBeforeCopies()))[1] == kind.split()[0]


@pytest.mark.parametrize("constant", [1.0, -0.0])
def test_not_before_padding_with_another_constant(constant):
    assert (
        ops(apply(copy_of("Pad zero", constant=constant), MoveQuantizeBeforeCopies()))[1] == "Pad"
    )


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("kind", COPIES)
def test_from_opset_21_onnx_runtime_still_loads_it_with_all_its_fusions(kind, opset):
    model = apply(copy_of(kind, opset=opset), MoveQuantizeBeforeCopies())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>",
        "AveragePool <kernel_shape = [2, 2]>",
    ],
)
def test_pools_stay(pool):
    model = read(GRAPH % (0, 0, f"c = {pool} (r)", "Sin (d)"))
    assert ops(apply(model, MoveQuantizeBeforeCopies()))[1] == pool.split()[0]


def test_a_chain_and_a_split_with_all_its_pairs():
    model = read("""
    g (float[1,4,4] x) => (float[3,6] y, float[3,6] z)
    <float s = {0.1}, int8 o = {0}, int64[6] p = {0, 1, 1, 0, 1, 1}, int64[2] n = {6, 6}>
    {
        r = Neg (x)
        a = Pad (r, p)
        b = Reshape (a, n)
        c, e = Split <axis = 0, num_outputs = 2> (b)
        q = QuantizeLinear (c, s, o)
        d = DequantizeLinear (q, s, o)
        t = QuantizeLinear (e, s, o)
        u = DequantizeLinear (t, s, o)
        y = Sin (d)
        z = Sin (u)
    }
    """)
    apply(model, MoveQuantizeBeforeCopies())
    pair = ["QuantizeLinear", "DequantizeLinear"]
    # The Pad would stay a node.
    assert ops(model) == [
        "Neg",
        "Pad",
        *pair,
        "Reshape",
        "Split",
        "Sin",
        "Sin",
    ]


@pytest.mark.parametrize(
    "readers",
    [
        "q = QuantizeLinear (c, s, o) d = DequantizeLinear (q, s, o) e = Neg (c) y = Add (d, e)",  # a float reader
        "q = QuantizeLinear (c, s, o) d = DequantizeLinear (q, s, o) p = QuantizeLinear (c, t, o) "
        "e = DequantizeLinear (p, t, o) y = Add (d, e)",  # two scales
        "q = QuantizeLinear (c, s, o) d = DequantizeLinear (q, t, o) y = Neg (d)",  # no pair
        "q = QuantizeLinear (c, s, o) y = DequantizeLinear (q, s, o)",  # the output of the graph
        "q = QuantizeLinear <axis = 0> (c, v, w) d = DequantizeLinear <axis = 0> (q, v, w) y = Neg (d)",
    ],
)
def test_other_readers_scales_and_outputs_stay(readers):
    model = read(
        "g (float[2,4] x) => (y) <float s = {0.1}, float t = {0.2}, int8 o = {0}, "
        "float[4] v = {0.1, 0.2, 0.3, 0.4}, int8[4] w = {0, 0, 0, 0}>"
        "{ r = Neg (x) c = Transpose <perm = [1, 0]> (r) " + readers + "}"
    )
    assert ops(apply(model, MoveQuantizeBeforeCopies()))[1] == "Transpose"


@pytest.mark.parametrize(
    ("copy", "moves"), [("Transpose <perm = [0, 1, 3, 2]> (x)", False), ("Pad (x, p)", True)]
)
def test_a_float_reader_in_front_of_the_copy(copy, moves):
    model = read(
        "g (float[1,2,4,4] x) => (y, z)"
        "<float s = {0.1}, int8 o = {0}, int64[8] p = {0, 0, 0, 1, 0, 0, 0, 1}, float[1,2,1,1] w = {1, 2}>"
        "{ z = Neg (x) c = "
        + copy
        + " q = QuantizeLinear (c, s, o) d = DequantizeLinear (q, s, o) y = Conv (d, w) }"
    )
    assert (ops(apply(model, MoveQuantizeBeforeCopies()))[1] == "QuantizeLinear") is moves


def test_a_copy_that_is_an_output_stays():
    model = read(
        "g (float[2,4] x) => (c, y) <float s = {0.1}, int8 o = {0}>"
        "{ c = Transpose (x) q = QuantizeLinear (c, s, o) d = DequantizeLinear (q, s, o) y = Neg (d) }"
    )
    assert ops(apply(model, MoveQuantizeBeforeCopies()))[0] == "Transpose"


def test_a_pair_between_two_of_the_same_scale_is_merged_after_the_move():
    model = read(
        "g (float[2,4] x) => (y) <float s = {0.1}, int8 o = {0}>"
        "{ a = QuantizeLinear (x, s, o) b = DequantizeLinear (a, s, o) c = Transpose (b)"
        " q = QuantizeLinear (c, s, o) d = DequantizeLinear (q, s, o) y = Neg (d) }"
    )
    apply(model, MoveQuantizeBeforeCopies(), MergePairs())
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Transpose", "Neg"]
