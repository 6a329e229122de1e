"""The kernels expected of small graphs: which nodes are in one kernel, what it reads and writes."""

import onnx_ir as ir
import pytest

from qdq.graph.fusion import Fusion
from qdq.graph.shapes import complete_shapes

HEADER = '<ir_version: 10, opset_import: ["": 19]>'
CONSTANTS = (
    "float s = {0.5}, float t = {0.25}, int8 z = {0}, int8[8,8,1,1] w = {"
    + ",".join(["1"] * 64)
    + "}"
)


def load(body, inputs="float[1,8,4,4] x", outputs="float[1,8,4,4] y", constants=CONSTANTS):
    model = ir.from_onnx_text(f"{HEADER}\ng ({inputs}) => ({outputs})\n<{constants}>\n{{{body}}}")
    for node in model.graph:
        node.name = node.outputs[0].name
    complete_shapes(model)
    return model


def pair(output, value, scale="s"):
    return f"""
    {output}_q = QuantizeLinear({value}, {scale}, z)
    {output} = DequantizeLinear({output}_q, {scale}, z)"""


def conv(output, value):
    return f"""
    {output}_w = DequantizeLinear(w, s, z)
    {output} = Conv({value}, {output}_w)"""


def list_kernels(text, *, with_pairs=True, is_half=True):
    """Kind and nodes of each kernel, in order of the graph."""
    fusion = Fusion(text, with_pairs=with_pairs, is_half=is_half)
    return [(kernel.kind, [node.name for node in kernel.nodes]) for kernel in fusion.kernels]


RESIDUAL = load(
    pair("xd", "x")
    + conv("c1", "xd")
    + "r1 = Relu(c1)"
    + pair("r1d", "r1")
    + conv("c2", "r1d")
    + "a = Add(c2, xd) y = Relu(a)"
)


def test_epilogue_residual_add_and_q_are_fused():
    assert list_kernels(RESIDUAL) == [
        ("convert", ["xd_q"]),
        ("product", ["c1", "r1"]),
        ("product", ["c2", "a", "y"]),
    ]
    fusion = Fusion(RESIDUAL, with_pairs=True, is_half=True)
    (written,) = fusion.kernels[1].writes
    assert (written.name, fusion.item_bytes(written)) == ("r1", 1)  # as the codes of its Q


def test_the_float_network_has_the_same_products_and_no_q():
    assert list_kernels(RESIDUAL, with_pairs=False) == [
        ("product", ["c1", "r1"]),
        ("product", ["c2", "a", "y"]),
        ("convert", ["c1"]),  # the memory format of the input
    ]
    kernels = Fusion(RESIDUAL, with_pairs=False, is_half=True).kernels
    assert [kernel.name for kernel in kernels] == ["c1", "c2", "input of c1"]


VALUES = 8 * 4 * 4
WEIGHTS = 64


@pytest.mark.parametrize(
    ("with_pairs", "is_half", "expected"),
    [
        (True, True, [VALUES * (4 + 1), VALUES * 2 + WEIGHTS, VALUES * (1 + 1 + 2) + WEIGHTS]),
        (True, False, [VALUES * (4 + 1), VALUES * 2 + WEIGHTS, VALUES * (1 + 1 + 4) + WEIGHTS]),
        (
            False,
            True,
            [VALUES * 4 + 2 * WEIGHTS, VALUES * 6 + 2 * WEIGHTS, VALUES * (4 + 2)],
        ),
    ],
)
def test_bytes_of_each_type(with_pairs, is_half, expected):
    fusion = Fusion(RESIDUAL, with_pairs=with_pairs, is_half=is_half)
    assert [fusion.count_bytes(kernel) for kernel in fusion.kernels] == expected


def test_a_float_shortcut_leaves_q_alone():
    """The convolution writes one tensor: the one in float that the Add reads, so Q is a kernel of its own."""
    model = load(
        pair("xd", "x")
        + conv("c1", "xd")
        + "r1 = Relu(c1)"
        + pair("r1d", "r1")
        + conv("c2", "r1d")
        + "a = Add(c2, r1) y = Relu(a)"
    )
    kernels = list_kernels(model)
    assert ("product", ["c1", "r1"]) in kernels
    assert ("convert", ["r1d_q"]) in kernels


def test_silu_is_one_epilogue():
    model = load(pair("xd", "x") + conv("c", "xd") + "g = Sigmoid(c) y = Mul(c, g)")
    assert list_kernels(model)[-1] == ("product", ["c", "g", "y"])


def test_a_gate_is_not_fused_to_the_small_tensor():
    """Squeeze and excitation: x is in memory before the gate is known."""
    model = load("r = Relu(x) p = GlobalAveragePool(r) g = Sigmoid(p) y = Mul(r, g)")
    assert list_kernels(model) == [
        ("reduction", ["r", "p", "g"]),
        ("pointwise", ["y"]),
    ]


ATTENTION = (
    "k2 = Transpose<perm=[0,1,3,2]>(k) s0 = MatMul(q, k2) s1 = Mul(s0, s) p = Softmax(s1) {} "
    "y = MatMul({}, v)"
)
THREE = "float[1,2,16,8] q, float[1,2,16,8] k, float[1,2,16,8] v"


def attention(between="", scores="p"):
    return load(ATTENTION.format(between, scores), THREE, "float[1,2,16,8] y")


def test_attention_is_one_kernel_in_16_bit_only():
    model = attention()
    assert ("attention", ["s0", "s1", "p", "y"]) in list_kernels(model)
    in_float32 = list_kernels(model, is_half=False)
    assert [kind for kind, _ in in_float32].count("product") == 2
    assert ("reduction", ["p"]) in in_float32


def test_a_pair_inside_splits_attention():
    model = attention(pair("pd", "p"), "pd")
    kinds = [kind for kind, _ in list_kernels(model)]
    assert kinds.count("product") == 1  # the values; the scores are still with the softmax
    assert ("product", ["y"]) in list_kernels(model)


def test_q_after_concat_belongs_to_the_branches():
    branches = pair("xd", "x") + conv("a", "xd") + conv("b", "xd")
    joined = load(
        f"{branches} k = Concat<axis=1>(a, b) {pair('y', 'k')}", outputs="float[1,16,4,4] y"
    )
    assert list_kernels(joined)[1:] == [("product", ["a"]), ("product", ["b"])]
    fusion = Fusion(joined, with_pairs=True, is_half=True)
    assert fusion.item_bytes(fusion.kernels[1].writes[0]) == 1  # written as int8

    shared = load(
        f"{branches} k = Concat<axis=1>(a, b) {pair('kd', 'k')} r = Relu(a)",
        outputs="float[1,16,4,4] kd, float[1,8,4,4] r",
    )
    assert ("convert", ["kd_q"]) in list_kernels(shared)


def test_an_int8_tensor_is_converted_before_a_float_product():
    body = pair("xd", "x") + "c = Conv(xd, f) y = Relu(c)"
    constants = f"{CONSTANTS}, float[8,8,1,1] f = {{{','.join(['1'] * 64)}}}"
    assert list_kernels(load(body, constants=constants))[-1] == ("convert", ["c"])
    assert not any(kind == "convert" for kind, _ in list_kernels(RESIDUAL)[1:])


def test_sizes_that_are_not_known():
    model = load("y = Relu(x)", "float[n,m] x", "float[n,m] y")
    fusion = Fusion(model, with_pairs=True, is_half=True)
    assert [fusion.count_bytes(kernel) for kernel in fusion.kernels] == [None]


def test_q_of_one_scale_after_a_split_and_a_concat_belong_to_the_kernels_before():
    """C2f: as TensorRT-RTX builds it, the first kernel writes int8 only."""
    body = (
        "r = Relu(x) a, b = Split<axis=1, num_outputs=2>(r)"
        + pair("bd", "b")
        + "n = Neg(bd) k = Concat<axis=1>(a, b, n)"
        + pair("y", "k", "{scale}")
    )
    header = HEADER.replace("19", "21")
    for scale, expected in (
        ("s", [("pointwise", ["r"]), ("pointwise", ["n"])]),
        ("t", [("pointwise", ["r"]), ("pointwise", ["bd_q", "n"]), ("convert", ["y_q"])]),
    ):
        text = body.replace("{scale}", scale)
        model = ir.from_onnx_text(
            f"{header}\ng (float[1,8,4,4] x) => (float[1,12,4,4] y)\n<{CONSTANTS}>\n{{{text}}}"
        )
        for node in model.graph:
            node.name = node.outputs[0].name
        complete_shapes(model)
        assert list_kernels(model) == expected


def test_a_pair_that_only_one_operator_reads_stays_in_its_kernel():
    model = load("r = Relu(x)" + pair("rd", "r") + "y = Neg(rd)")
    assert list_kernels(model) == [("pointwise", ["r", "y"])]
