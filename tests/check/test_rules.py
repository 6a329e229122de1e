"""Each rule finds its own broken graph, and nothing else in it; a sound graph gives no finding."""

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import (
    ATTENTION,
    AVGPOOL,
    CONCAT,
    DOWNSAMPLE,
    MAXPOOL,
    PRODUCT,
    RESIDUAL,
    SOUND,
    conv,
    find,
    floats,
    graph,
    ints,
    load,
    matmul,
    op,
    pair,
)
from test_format_rules import BROKEN as BROKEN_FORMATS

from qdq import check_onnx
from qdq.check.rules import (
    FILE_RULES,
    RULES,
    choose_rules,
    find_violations,
    get_rule,
    register_rule,
)
from qdq.check.rules.registry import Flaw
from qdq.errors import ArgumentError

FLOAT_PRODUCT = "float16[N,8,16]"
WEIGHT_ONLY = graph(matmul("c", "x"), op("y", "Relu(c)"), x=FLOAT_PRODUCT, y=FLOAT_PRODUCT)
FLOAT_KERNEL = f"float16[16,16,1,1] f = {{{floats(256)}}}"
FLOAT_WEIGHT_PAIR = """
    [fq] fq = QuantizeLinear<axis=1>(f, ws, wz)
    [fd] fd = DequantizeLinear<axis=1>(fq, ws, wz)"""
FLOAT_WEIGHT = f"float16[16,16] f = {{{floats(256)}}}"
NORM = graph(
    op("n", "LayerNormalization(x, b)"),
    pair("nd", "n"),
    matmul("c", "nd"),
    op("y", "Relu(c)"),
    x=FLOAT_PRODUCT,
    y=FLOAT_PRODUCT,
)
GELU = graph(
    pair("xd", "x"),
    matmul("c", "xd"),
    op("e0", "Div(c, s)"),
    op("e1", "Erf(e0)"),
    op("e2", "Add(e1, one)"),
    op("e3", "Mul(c, e2)"),
    op("y", "Mul(e3, s)"),
    x=FLOAT_PRODUCT,
    y=FLOAT_PRODUCT,
)
TWO_READERS = graph(
    op("r", "Relu(x)"),
    pair("ad", "r"),
    pair("bd", "r"),
    conv("a", "ad"),
    conv("c", "bd"),
    op("ar", "Relu(a)"),
    op("cr", "Relu(c)"),
    op("y", "Sub(ar, cr)"),
)
ONE_READER = TWO_READERS.replace("Conv(bd,", "Conv(ad,").replace(pair("bd", "r"), "")
UNCALIBRATED = '<ir_version: 10, opset_import: ["": 19, "mine": 1], metadata_props: ["qdq.uncalibrated": "a,b"]>'
TINY_SCALE = (
    graph(
        pair("xd", "x"),
        conv("c", "xd", "bias"),
        op("y", "Relu(c)"),
        constants=f"float16[16] bias = {{{floats(16, 'BIAS')}}}",
    )
    .replace("s = {0.5}", "s = {6.2e-5}")
    .replace(f"ws = {{{floats(16)}}}", f"ws = {{{floats(16, 6.2e-5)}}}")
)


def weights_of(*shape, channels, text=SOUND):
    """The graph with other weights."""
    return (
        text.replace(
            f"int8[16,16,1,1] w = {{{ints(256)}}}",
            f"int8{list(shape)} w = {{{ints(int(np.prod(shape)))}}}",
        )
        .replace(
            f"float16[16] ws = {{{floats(16)}}}", f"float16[{channels}] ws = {{{floats(channels)}}}"
        )
        .replace(
            f"int8[16] wz = {{{floats(16, 0)}}}", f"int8[{channels}] wz = {{{floats(channels, 0)}}}"
        )
    )


def swap(text, *replacements):
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    return text


BROKEN = {
    "QDQ101 zero": (swap(SOUND, ("s = {0.5}", "s = {0.0}")), ["xd_q", "xd"]),
    "QDQ101 negative": (swap(SOUND, ("s = {0.5}", "s = {-0.5}")), ["xd_q", "xd"]),
    "QDQ101 subnormal": (swap(SOUND, ("s = {0.5}", "s = {0.00001}")), ["xd_q", "xd"]),
    "QDQ102 missing on Q": (
        swap(SOUND, ("QuantizeLinear(x, s, z)", "QuantizeLinear(x, s)")),
        ["xd_q"],
    ),
    "QDQ102 not zero": (swap(SOUND, ("int8 z = {0}", "int8 z = {1}")), ["xd_q", "xd"]),
    "QDQ102 missing on DQ": (swap(SOUND, ("(w, ws, wz)", "(w, ws)")), ["c_w"]),
    "QDQ103": (
        swap(
            SOUND,
            ("float16 s = {0.5}", "float16[1] s = {0.5}"),
            ("int8 z = {0}", "int8[1] z = {0}"),
        ),
        ["xd_q", "xd"],
    ),
    "QDQ104": (
        swap(
            SOUND,
            ("(x, s, z)", "(x, ws, wz)"),
            ("QuantizeLinear(x", "QuantizeLinear<axis=1>(x"),
            ("DequantizeLinear(xd_q, s, z)", "DequantizeLinear<axis=1>(xd_q, ws, wz)"),
        ),
        ["xd_q"],
    ),
    "QDQ105 not written": (swap(SOUND, ("<axis=0>", "")), ["c_w"]),
    "QDQ105 other axis": (swap(SOUND, ("<axis=0>", "<axis=1>")), ["c"]),
    "QDQ105 other axis of a matrix": (swap(PRODUCT, ("<axis=1>", "<axis=0>")), ["c"]),
    "QDQ105 other length": (
        swap(
            SOUND,
            (f"ws = {{{floats(16)}}}", f"ws = {{{floats(8)}}}"),
            ("float16[16] ws", "float16[8] ws"),
            (f"wz = {{{floats(16, 0)}}}", f"wz = {{{floats(8, 0)}}}"),
            ("int8[16] wz", "int8[8] wz"),
        ),
        ["c_w"],
    ),
    "QDQ106 scale": (
        swap(SOUND, ("DequantizeLinear(xd_q, s,", "DequantizeLinear(xd_q, t,")),
        ["xd"],
    ),
    "QDQ106 Q alone": (
        swap(
            SOUND,
            (pair("xd", "x"), pair("xd", "x") + op("i", "Cast<to=10>(xd_q)") + op("j", "Neg(i)")),
        ),
        ["xd_q"],
    ),
    "QDQ106 DQ alone": (
        swap(
            SOUND,
            ("[xd_q] xd_q = QuantizeLinear(x, s, z)", "[i] i = Sign(x8)\n[xd_q] xd_q = Abs(i)"),
            ("float16[N,16,4,4] x)", "float16[N,16,4,4] x, int8[N,16,4,4] x8)"),
        ),
        ["xd"],
    ),
    "QDQ107 weight": (
        swap(SOUND, ("float16[16] ws", "float[16] ws")),
        ["c"],
    ),
    "QDQ107 bias": (
        swap(SOUND, ("Conv(xd, c_w)", "Conv(xd, c_w, b)"), ("float16[16] b", "float[16] b")),
        ["c"],
    ),
    "QDQ107 opset": (
        swap(SOUND, ('"": 19', '"": 17')),
        ["xd_q", "xd", "c_w"],
    ),
    "QDQ108 bias": (
        graph(
            pair("xd", "x"),
            op("bd", "DequantizeLinear<axis=0>(b32, ws, b0)"),
            conv("c", "xd", "bd"),
            op("y", "Relu(c)"),
            constants=f"int32[16] b32 = {{{ints(16)}}}, int32[16] b0 = {{{floats(16, 0)}}}",
        ),
        ["bd"],
    ),
    "QDQ108 operator": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("i", "ConvInteger(x8, w)"),
            op("f", "Cast<to=10>(i)"),
            op("y", "Sub(r, f)"),
            more=", int8[N,16,4,4] x8",
        ),
        ["i"],
    ),
    "QDQ131 operator": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("d", "Det(r)"),
            op("y", "Add(r, d)"),
        ),
        ["d"],
    ),
    "QDQ131 plugin": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("y", "DeformConv(r, f, zeros)"),
            constants=f"{FLOAT_KERNEL}, float16[1,2,4,4] zeros = {{{floats(32, 0)}}}",
            x="float16[1,16,4,4]",
            y="float16[1,16,4,4]",
        ),
        ["y"],
    ),
    "QDQ131 option": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("y", "MaxPool<kernel_shape=[2,2], dilations=[2,2]>(r)"),
            y="float16[N,16,2,2]",
        ),
        ["y"],
    ),
    "QDQ132 constant": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("i", "Cast<to=10>(u)"),
            op("y", "Mul(r, i)"),
            constants="uint32[1] u = {3}",
        ),
        ["u"],
    ),
    "QDQ132 cast": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("i", "Cast<to=13>(r)"),
            op("f", "Cast<to=10>(i)"),
            op("y", "Mul(r, f)"),
        ),
        ["i"],
    ),
    "QDQ132 input": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            op("r", "Relu(c)"),
            op("f", "Cast<to=10>(i)"),
            op("y", "Mul(r, f)"),
            more=", uint64[1] i",
        ),
        ["i"],
    ),
    "QDQ109": (
        swap(
            SOUND,
            ("{\n    [xd_q]", "{\n    [p] p = ReduceMax<keepdims=0>(x)\n    [xd_q]"),
            ("(x, s, z)", "(x, p, z)"),
            ("(xd_q, s, z)", "(xd_q, p, z)"),
        ),
        ["xd_q", "xd"],
    ),
    "QDQ110 only the weight": (swap(SOUND, ("Conv(xd", "Conv(x")), ["c"]),
    "QDQ110 only the input": (
        graph(pair("xd", "x"), op("c", "Conv(xd, f)"), op("y", "Relu(c)"), constants=FLOAT_KERNEL),
        ["c"],
    ),
    "QDQ110 weight-only": (WEIGHT_ONLY, ["c"]),
    "QDQ111 activation": (
        graph(
            pair("xd", "x"),
            conv("c", "xd"),
            pair("cd", "c"),
            op("r", "Relu(cd)"),
            pair("rd", "r"),
            conv("e", "rd"),
            op("y", "Relu(e)"),
        ),
        ["r"],
    ),
    "QDQ111 bias": (
        graph(
            pair("xd", "x"),
            matmul("c", "xd"),
            pair("cd", "c"),
            op("u", "Add(cd, b)"),
            op("y", "Sub(u, cd)"),
            x=FLOAT_PRODUCT,
            y=FLOAT_PRODUCT,
        ),
        ["u"],
    ),
    "QDQ112 no pair": (swap(RESIDUAL, ("Add(c, rd)", "Add(c, r)")), ["a"]),
    "QDQ112 behind a max pooling": (
        swap(
            RESIDUAL,
            (
                op("a", "Add(c, rd)"),
                op("p", "MaxPool<kernel_shape=[1,1]>(rd)") + op("a", "Add(c, p)"),
            ),
        ),
        ["a"],
    ),
    "QDQ112 both": (
        swap(RESIDUAL, (op("a", "Add(c, rd)"), pair("cd", "c") + op("a", "Add(cd, rd)"))),
        ["a"],
    ),
    "QDQ112 wrong side": (
        swap(
            DOWNSAMPLE,
            (pair("dsd", "ds", "t"), pair("c2d", "c2", "t")),
            ("Add(c2, dsd)", "Add(c2d, ds)"),
        ),
        ["a"],
    ),
    "QDQ113": (swap(TWO_READERS, (pair("bd", "r"), pair("bd", "r", "t"))), ["ad_q"]),
    "QDQ113 shared weight": (
        swap(
            ONE_READER,
            (
                "[c_w] c_w = DequantizeLinear<axis=0>(w, ws, wz)",
                "[c_w] c_w = DequantizeLinear<axis=0>(w, b2, wz)",
            ),
            ("float16 one", f"float16[16] b2 = {{{floats(16, 0.5)}}}, float16 one"),
        ),
        ["a_w"],
    ),
    "QDQ114": (swap(CONCAT, (pair("cd", "cr"), pair("cd", "cr", "t"))), ["k"]),
    "QDQ115": (swap(MAXPOOL, (pair("pd", "p"), pair("pd", "p", "t"))), ["p"]),
    "QDQ115 beside": (
        swap(
            MAXPOOL,
            ("MaxPool<kernel_shape=[2,2]>(rd)", "MaxPool<kernel_shape=[2,2]>(r)"),
            (pair("pd", "p"), pair("pd", "p", "t")),
            (op("y", "Relu(c)"), conv("e", "rd") + op("f", "Relu(e)") + op("y", "Relu(c)")),
        ),
        ["p"],
    ),
    "QDQ116 pool": (
        swap(AVGPOOL, (pair("pd", "p") + conv("c", "pd"), op("c", "Neg(p)"))),
        ["p"],
    ),
    "QDQ116 mul": (
        graph(
            op("r", "Relu(x)"),
            pair("rd", "r"),
            op("h", "Neg(x)"),
            pair("hd", "h"),
            op("u", "Mul(rd, hd)"),
            op("y", "Neg(u)"),
        ),
        ["u"],
    ),
    "QDQ117 few channels": (
        weights_of(8, 16, 1, 3, channels=8),
        ["c"],
    ),
    "QDQ117 grouped": (
        swap(weights_of(16, 4, 1, 1, channels=16), ("Conv(xd", "Conv<group=4>(xd")),
        ["c"],
    ),
    "QDQ117 small depthwise": (
        swap(weights_of(16, 1, 1, 1, channels=16), ("Conv(xd", "Conv<group=16>(xd")),
        ["c"],
    ),
    "QDQ117 3-D": (
        swap(weights_of(16, 16, 1, 1, 1, channels=16), ("[N,16,4,4]", "[N,16,4,4,4]")),
        ["c"],
    ),
    "QDQ117 transposed": (
        swap(SOUND, ("Conv(xd", "ConvTranspose(xd"), ("<axis=0>", "<axis=1>")),
        ["c"],
    ),
    "QDQ117 narrow product": (
        swap(
            PRODUCT,
            (f"int8[16,16] m = {{{ints(256)}}}", f"int8[8,16] m = {{{ints(128)}}}"),
            ("N,8,16] x", "N,8,8] x"),
        ),
        ["c"],
    ),
    "QDQ117 one row": (swap(PRODUCT, ("N,8,16", "1,1,16")), ["c"]),
    "QDQ118 value": (
        swap(
            ATTENTION,
            (
                op("o", "MatMul(p, v)"),
                pair("pd", "p") + pair("vd", "v") + op("o", "MatMul(pd, vd)"),
            ),
        ),
        ["p"],
    ),
    "QDQ118 query and key": (
        swap(
            ATTENTION,
            (
                op("kt", "Transpose<perm=[0,2,1]>(k)"),
                pair("kd", "k") + pair("qd", "q") + op("kt", "Transpose<perm=[0,2,1]>(kd)"),
            ),
            ("MatMul(q, kt)", "MatMul(qd, kt)"),
        ),
        ["p"],
    ),
    "QDQ118 LayerNorm": (
        swap(
            NORM,
            (
                op("n", "LayerNormalization(x, b)"),
                pair("xd", "x") + op("n", "LayerNormalization(xd, b)"),
            ),
        ),
        ["n"],
    ),
    "QDQ118 GELU": (
        swap(
            GELU,
            (op("e0", "Div(c, s)"), pair("cd", "c") + op("e0", "Div(cd, s)")),
            ("Mul(c, e2)", "Mul(cd, e2)"),
        ),
        ["e1"],
    ),
    "QDQ119 copy": (
        graph(
            pair("xd", "x"),
            op("p", "Transpose<perm=[0,1,3,2]>(xd)"),
            pair("pd", "p"),
            conv("c", "pd"),
            op("y", "Relu(c)"),
        ),
        ["xd"],
    ),
    "QDQ119 constant operand": (
        graph(
            pair("xd", "x"),
            op("u", "Mul(xd, t)"),
            pair("ud", "u"),
            conv("c", "ud"),
            op("y", "Relu(c)"),
        ),
        ["xd"],
    ),
    "QDQ119 constant": (
        graph(
            op("k", "DequantizeLinear(k8, s, z)"),
            op("u", "Mul(x, k)"),
            pair("ud", "u"),
            conv("c", "ud"),
            op("y", "Relu(c)"),
            constants="int8 k8 = {3}",
        ),
        ["k"],
    ),
    "QDQ119 bias": (
        graph(
            pair("xd", "x"),
            op("bd", "DequantizeLinear<axis=0>(b8, ws, wz)"),
            conv("c", "xd", "bd"),
            op("y", "Relu(c)"),
            constants=f"int8[16] b8 = {{{ints(16)}}}",
        ),
        ["bd"],
    ),
    "QDQ120 duplicate": (TWO_READERS, ["bd_q"]),
    "QDQ120 in a row": (
        swap(SOUND, (pair("xd", "x"), pair("xx", "x") + pair("xd", "xx"))),
        ["xd_q"],
    ),
    "QDQ120 in a row, rescaled": (
        swap(SOUND, (pair("xd", "x"), pair("xx", "x", "t") + pair("xd", "xx"))),
        ["xd_q"],
    ),
    "QDQ120 cast": (
        graph(
            op("xf", "Cast<to=1>(x)"),
            "\n[xq] xq = QuantizeLinear(xf, sf, z)\n[xd] xd = DequantizeLinear(xq, sf, z)",
            op("xh", "Cast<to=10>(xd)"),
            conv("c", "xh"),
            op("y", "Relu(c)"),
            constants="float sf = {0.5}",
        ),
        ["xh", "xf"],
    ),
    "QDQ121": (swap(SOUND, ("float16", "float")), ["g"]),
    "QDQ122": (
        swap(
            SOUND,
            (op("y", "Relu(c)"), op("n", "BatchNormalization(c, b, b, b, b)") + op("y", "Relu(n)")),
        ),
        ["n"],
    ),
    "QDQ123": (UNCALIBRATED + SOUND.partition(">\n")[2].join(["\n", ""]), ["g"]),
    "QDQ124 layer": (swap(SOUND, (op("y", "Relu(c)"), ""), ("[c] c = ", "[c] y = ")), ["c"]),
    "QDQ124 output": (
        swap(SOUND, (op("y", "Relu(c)"), op("r", "Relu(c)") + pair("y", "r"))),
        ["y"],
    ),
    "QDQ129": (swap(SOUND, ("int8 z = {0}", "uint8 z = {128}")), ["xd_q", "xd"]),
    "QDQ130": (
        graph(
            FLOAT_WEIGHT_PAIR,
            op("c", "MatMul(x, fd)"),
            op("y", "Relu(c)"),
            x=FLOAT_PRODUCT,
            y=FLOAT_PRODUCT,
            constants=FLOAT_WEIGHT,
        ),
        ["c"],
    ),
    "QDQ140": (TINY_SCALE.replace("BIAS", "1000.0"), ["c"]),
}
SOUND_TWINS = {
    "bias that fits a tiny scale": TINY_SCALE.replace("BIAS", "1.0"),
    "conv": SOUND,
    "product": PRODUCT,
    "BatchNorm that cannot be folded": swap(
        SOUND,
        (
            op("y", "Relu(c)"),
            op("n", "BatchNormalization(c, b, b, b, b)")
            + op("sum", "Add(n, c)")
            + op("y", "Relu(sum)"),
        ),
    ),
    "downsample, and a gain behind the convolution": swap(
        DOWNSAMPLE, (op("a", "Add(c2, dsd)"), op("gain", "Mul(c2, s)") + op("a", "Add(gain, dsd)"))
    ),
    "residual": RESIDUAL,
    "downsample": DOWNSAMPLE,
    "concat": CONCAT,
    "max pool": MAXPOOL,
    "average pool": AVGPOOL,
    "attention": ATTENTION,
    "LayerNorm": NORM,
    "GELU": GELU,
    "one reader": ONE_READER,
    "conv and LayerNorm": graph(
        pair("xd", "x"),
        conv("c", "xd"),
        pair("cd", "c"),
        op("r", "Reshape(cd, to)"),
        op("n", "LayerNormalization(r, b)"),
        op("y", "Neg(n)"),
        y="float16[N,16,16]",
        constants="int64[3] to = {0,16,16}",
    ),
    "fp16 copy of an fp32 scale": graph(
        "\n[xq] xq = QuantizeLinear(x, sf, z)\n[xd] xd = DequantizeLinear(xq, sh, z)",
        conv("c", "xd"),
        op("y", "Relu(c)"),
        x="float[N,16,4,4]",
        constants="float sf = {0.3}, float16 sh = {0.3}",
    ),
    "sum behind activations, both quantized": graph(
        op("r", "Relu(x)"),
        pair("rd", "r"),
        conv("c", "rd"),
        op("cr", "Relu(c)"),
        pair("cd", "cr"),
        op("u", "Add(rd, cd)"),
        pair("ud", "u"),
        conv("c2", "ud"),
        op("y", "Relu(c2)"),
    ),
    "sum behind activations, float": graph(
        op("r", "Relu(x)"),
        pair("rd", "r"),
        conv("c", "rd"),
        op("cr", "Relu(c)"),
        op("y", "Add(r, cr)"),
    ),
    "block that begins with a convolution": graph(
        op("r", "Relu(x)"),
        pair("rd", "r"),
        conv("c", "rd"),
        op("h", "Sigmoid(c)"),
        op("u", "Mul(h, t)"),
        op("a", "Add(u, c)"),
        op("y", "Relu(a)"),
    ),
    "both branches from one convolution, one through another": graph(
        op("r", "Relu(x)"),
        pair("rd", "r"),
        conv("c", "rd"),
        pair("cd", "c"),
        conv("e", "cd"),
        op("a", "Add(e, c)"),
        op("y", "Relu(a)"),
    ),
    "broadcast": graph(
        op("r", "Relu(x)"),
        pair("rd", "r"),
        conv("c", "rd"),
        op("h", "GlobalAveragePool(r)"),
        op("a", "Add(c, h)"),
        op("y", "Relu(a)"),
    ),
    "copy behind the pair": graph(
        pair("xd", "x"),
        op("p", "Transpose<perm=[0,1,3,2]>(xd)"),
        conv("c", "p"),
        op("y", "Relu(c)"),
    ),
    "transposed weight": PRODUCT.replace("<axis=1>", "<axis=0>").replace(
        "[c] c = MatMul(xd, c_w)", "wt = Transpose<perm=[1,0]>(c_w)\n[c] c = MatMul(xd, wt)"
    ),
    "float weight with Q and DQ": graph(
        pair("xd", "x"),
        FLOAT_WEIGHT_PAIR,
        op("c", "MatMul(xd, fd)"),
        op("y", "Relu(c)"),
        x=FLOAT_PRODUCT,
        y=FLOAT_PRODUCT,
        constants=FLOAT_WEIGHT,
    ),
    "int8 input": SOUND.replace("float16[N,16,4,4] x)", "int8[N,16,4,4] x)")
    .replace("[xd_q] xd_q = QuantizeLinear(x, s, z)", "")
    .replace("DequantizeLinear(xd_q", "DequantizeLinear(x"),
    "plugin of others": SOUND.replace("[c] c = Conv(", "[c] c = mine.Conv("),
    "float graph": graph(op("c", "Conv(x, f)"), op("y", "Relu(c)"), constants=FLOAT_KERNEL),
    "depthwise": weights_of(16, 1, 3, 3, channels=16).replace(
        "Conv(xd", "Conv<group=16,pads=[1,1,1,1]>(xd"
    ),
    "scale behind Identity": SOUND.replace("[xd_q]", "si = Identity(s)\n[xd_q]").replace(
        "(x, s,", "(x, si,"
    ),
    "scale of a Constant node": SOUND.replace(
        "[xd_q]", "sc = Constant<value = float16 {0.5}>()\n[xd_q]"
    ).replace("(x, s,", "(x, sc,"),
    "one output channel": weights_of(
        1, 16, 1, 1, channels=1, text=SOUND.replace("[N,16,4,4] y", "[N,1,4,4] y")
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_finds_its_own_and_nothing_else(case):
    text, nodes = BROKEN[case]
    # Below opset 19 shape inference takes every DQ for fp32.
    found = [(f.rule, f.node) for f in find_violations(load(text, infer=case != "QDQ107 opset"))]
    assert found == [(case.split()[0], node) for node in nodes]


@pytest.mark.parametrize("case", SOUND_TWINS)
def test_sound_graphs(case):
    assert find(SOUND_TWINS[case]) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("float16 s = {0.5}", "int32 s = {1}", "QDQ101"),
        ("float16 s = {0.5}", 'string s = {"one"}', "QDQ101"),
        ("int8 z = {0}", "int8[3] z = {0,0,0}", "QDQ102"),
        ("int8 z = {0}", 'string z = {"one"}', "QDQ102"),
    ],
)
def test_scales_and_zero_points_of_another_type_or_length(tmp_path, old, new, rule, caplog, capfd):
    """Named at their nodes, and nothing else is printed."""
    assert old in SOUND
    ir.save(load(SOUND.replace(old, new), infer=False), tmp_path / "m.onnx")
    report = check_onnx(tmp_path / "m.onnx")
    assert {"xd_q", "xd"} <= {finding.node for finding in report.findings if finding.rule == rule}
    assert not [finding for finding in report.findings if "cannot be applied" in finding.message]
    assert report.problems
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_106_numbers_of_scales_that_cannot_be_broadcast():
    text = swap(
        SOUND,
        ("DequantizeLinear(xd_q, s, z)", "DequantizeLinear(xd_q, three, z)"),
        ("QuantizeLinear(x, s, z)", "QuantizeLinear(x, two, z)"),
        (
            "float16 one",
            "float16[3] three = {0.5,0.5,0.5}, float16[2] two = {0.5,0.5}, float16 one",
        ),
    )
    findings = find_violations(load(text), choose_rules(["QDQ106"]))
    assert [(finding.node, finding.message) for finding in findings] == [
        ("xd", "its scale differs from that of xd_q")
    ]


def test_every_rule_has_a_broken_graph():
    compared = {
        "QDQ190",
        "QDQ191",
    }  # need outputs: test_check.py; others a file: test_file.py, test_format_rules.py
    predicted = {"QDQ150"}  # needs a GPU: test_payoff.py
    broken = {case.split()[0] for case in [*BROKEN, *BROKEN_FORMATS]}
    assert broken == set(RULES) - compared - predicted - FILE_RULES


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_101_scale_that_is_no_number(scale):
    model = load(SOUND)
    bad = ir.tensor([0.5, *[float(scale)] * 15], dtype=ir.DataType.FLOAT16)
    model.graph.initializers["ws"].const_value = bad
    assert [(f.rule, f.node) for f in find_violations(model)] == [("QDQ101", "c_w")]


@pytest.mark.parametrize(
    ("product", "axis", "clean"),
    [
        ("Conv(", 0, True),
        ("Conv(", -4, True),
        ("Conv(", 1, False),
        ("ConvTranspose(", 1, True),
        ("ConvTranspose(", 0, False),
    ],
)
def test_105_axis_of_convolution_weights(product, axis, clean):
    found = find(SOUND, ("Conv(", product), ("<axis=0>", f"<axis={axis}>"))
    assert [rule for rule, _ in found if rule != "QDQ117"] == ([] if clean else ["QDQ105"])


@pytest.mark.parametrize(
    ("product", "axis", "clean"),
    [
        ("MatMul(xd, c_w)", 1, True),
        ("MatMul(xd, c_w)", 0, False),
        ("Gemm(xd, c_w)", 1, True),
        ("Gemm(xd, c_w)", 0, False),
        ("Gemm<transB=1>(xd, c_w)", 0, True),
        ("Gemm<transB=1>(xd, c_w)", 1, False),
    ],
)
def test_105_axis_of_matrices(product, axis, clean):
    found = find(
        PRODUCT, ("N,8,16", "N,16"), ("MatMul(xd, c_w)", product), ("<axis=1>", f"<axis={axis}>")
    )
    assert found == ([] if clean else [("QDQ105", "c")])


def test_says_nothing_of_what_it_cannot_know():
    """Scales of a function are its inputs; in a body they may come from outside."""
    model = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["": 19, "mine": 1]>
    g (float[N,4] x, bool c) => (float[N,4] y)
    <float s = {0.5}, int8 z = {0}>
    {
        a = mine.fake(x, s, z)
        y = If(c) <then_branch = yes () => (float[N,4] p) { p = Neg(a) },
                   else_branch = no () => (float[N,4] r) { q = QuantizeLinear(a, s, z)  d = DequantizeLinear(q, s, z)
                                                           r = Neg(d) }>
    }
    <domain: "mine", opset_import: ["": 19]>
    fake (x, s, z) => (y) { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Neg(d) }
    """)
    assert {f.rule for f in find_violations(model)} <= {"QDQ121"}


def test_looks_into_bodies():
    model = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["": 19]>
    g (float[N,4] x, bool c) => (float[N,4] y)
    <float s = {0.0}, int8 z = {0}>
    {
        y = If(c) <then_branch = yes () => (float[N,4] p) { p = Neg(x) },
                   else_branch = no () => (float[N,4] r) { [in] q = QuantizeLinear(x, s, z)
                                                           [out] d = DequantizeLinear(q, s, z)  r = Neg(d) }>
    }
    """)
    assert [(f.rule, f.node) for f in find_violations(model) if f.severity == "error"] == [
        ("QDQ101", "in"),
        ("QDQ101", "out"),
    ]


@pytest.mark.parametrize("case", BROKEN)
def test_every_finding_says_what_and_how(case):
    for finding in find_violations(load(BROKEN[case][0])):
        assert finding.message and not finding.message.endswith(".")
        assert finding.fix.endswith(".")
        assert finding.severity in ("error", "warning", "info")


def test_every_rule_explains_itself():
    for rule in RULES.values():
        text = rule.explain()
        assert rule.id in text and rule.title in text and rule.why in text and rule.evidence in text
        assert rule.title.endswith(".") and rule.why.endswith(".")


class TestRegistry:
    def test_rule_of_others(self):
        @register_rule("MINE101", "info", "Names.", "Order.", "taste")
        def _no_relu(view):
            for node in view.select("Relu"):
                yield Flaw(node.name, "a Relu", "none.")

        try:
            model = load(SOUND)
            assert [(f.rule, f.node, f.severity) for f in find_violations(model)] == [
                ("MINE101", "y", "info")
            ]
            assert find_violations(model, choose_rules(ignore=["MINE101"])) == []
            with pytest.raises(ArgumentError, match="there is a rule MINE101 already"):
                register_rule("MINE101", "info", "", "", "")
        finally:
            del RULES["MINE101"]

    @pytest.mark.parametrize(
        ("id", "severity", "found"),
        [("mine", "info", "not a rule id"), ("A101", "bad", "severity")],
    )
    def test_refuses(self, id, severity, found):
        with pytest.raises(ArgumentError, match=found):
            register_rule(id, severity, "", "", "")

    def test_unknown_id_names_the_nearest(self):
        with pytest.raises(ArgumentError, match="no rule 'QDQ1112'") as error:
            get_rule("QDQ1112")
        assert error.value.fix == "did you mean QDQ112?"
        assert get_rule(" qdq112 ").id == "QDQ112"

    def test_choice(self):
        assert [rule.id for rule in choose_rules(["QDQ112", "QDQ101"], ["QDQ101"])] == ["QDQ112"]
        assert len(choose_rules()) == len(RULES)


def test_needs_no_torch():
    script = "import sys, qdq.check.rules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
