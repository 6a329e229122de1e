"""Small graphs as ONNX text: float16 at opset 19, so that a sound one gives no finding at all, not even an info."""

import re

import numpy as np
import onnx_ir as ir

from qdq.check.rules import find_violations
from qdq.graph.shapes import complete_shapes


def ints(count):
    return ",".join(str(i % 7 + 1) for i in range(count))


def floats(count, value=0.25):
    return ",".join([str(value)] * count)


CONSTANTS = f"""
float16 s = {{0.5}}, float16 t = {{0.25}}, int8 z = {{0}}, float16[16] b = {{{floats(16)}}}, float16 one = {{1.0}},
int8[16,16,1,1] w = {{{ints(256)}}}, int8[16,16] m = {{{ints(256)}}},
float16[16] ws = {{{floats(16)}}}, int8[16] wz = {{{floats(16, 0)}}}
"""


def pair(output, value, scale="s"):
    """Q and DQ; the nodes are OUTPUT_q and OUTPUT."""
    return f"""
    [{output}_q] {output}_q = QuantizeLinear({value}, {scale}, z)
    [{output}] {output} = DequantizeLinear({output}_q, {scale}, z)"""


def conv(output, value, *more):
    """A convolution with int8 weights; the nodes are OUTPUT_w and OUTPUT."""
    operands = ", ".join([value, f"{output}_w", *more])
    return f"""
    [{output}_w] {output}_w = DequantizeLinear<axis=0>(w, ws, wz)
    [{output}] {output} = Conv({operands})"""


def matmul(output, value):
    """A matrix product with int8 weights, likewise."""
    return f"""
    [{output}_w] {output}_w = DequantizeLinear<axis=1>(m, ws, wz)
    [{output}] {output} = MatMul({value}, {output}_w)"""


def op(output, call):
    """One node, named after its output."""
    return f"\n    [{output}] {output} = {call}"


def graph(*lines, x="float16[N,16,4,4]", y="float16[N,16,4,4]", opset=19, constants="", more=""):
    """The text of a model from x to y."""
    constants = CONSTANTS + (f", {constants}" if constants else "")
    return (
        f'<ir_version: 10, opset_import: ["": {opset}, "mine": 1]>\n'
        f"g ({x} x{more}) => ({y} y)\n<{constants}>\n{{{''.join(lines)}\n}}"
    )


def load(text, infer=True):
    """The model; ONNX text knows half precision as bits only."""
    text = re.sub(
        r"(float16(?:\[[\d,]+\])?(?: \w+ =)? \{)([^}]*)", lambda m: m[1] + _bits(m[2]), text
    )
    model = ir.from_onnx_text(text)
    if infer:
        complete_shapes(model)
    return model


def _bits(numbers):
    return ",".join(str(np.float16(number).view(np.uint16)) for number in numbers.split(","))


def find(text, *replacements):
    """Rule and node of every finding."""
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    return [(finding.rule, finding.node) for finding in find_violations(load(text))]


SOUND = graph(pair("xd", "x"), conv("c", "xd"), op("y", "Relu(c)"))
PRODUCT = graph(
    pair("xd", "x"), matmul("c", "xd"), op("y", "Relu(c)"), x="float16[N,8,16]", y="float16[N,8,16]"
)
RESIDUAL = graph(
    op("r", "Relu(x)"), pair("rd", "r"), conv("c", "rd"), op("a", "Add(c, rd)"), op("y", "Relu(a)")
)
DOWNSAMPLE = graph(
    op("r", "Relu(x)"),
    pair("rd", "r"),
    conv("c1", "rd"),
    op("c1r", "Relu(c1)"),
    pair("c1d", "c1r"),
    conv("c2", "c1d"),
    conv("ds", "rd"),
    pair("dsd", "ds", "t"),
    op("a", "Add(c2, dsd)"),
    op("y", "Relu(a)"),
)
CONCAT = graph(
    op("r", "Relu(x)"),
    pair("rd", "r"),
    conv("c", "rd"),
    op("cr", "Relu(c)"),
    pair("cd", "cr"),
    op("k", "Concat<axis=2>(rd, cd)"),
    pair("kd", "k"),
    conv("c2", "kd"),
    op("y", "Relu(c2)"),
)
MAXPOOL = graph(
    op("r", "Relu(x)"),
    pair("rd", "r"),
    op("p", "MaxPool<kernel_shape=[2,2]>(rd)"),
    pair("pd", "p"),
    conv("c", "pd"),
    op("y", "Relu(c)"),
    y="float16[N,16,3,3]",
)
AVGPOOL = graph(
    op("r", "Relu(x)"),
    pair("rd", "r"),
    op("p", "AveragePool<kernel_shape=[2,2]>(rd)"),
    pair("pd", "p"),
    conv("c", "pd"),
    op("y", "Relu(c)"),
    y="float16[N,16,3,3]",
)
ATTENTION = graph(
    pair("xd", "x"),
    matmul("q", "xd"),
    matmul("k", "xd"),
    matmul("v", "xd"),
    op("kt", "Transpose<perm=[0,2,1]>(k)"),
    op("scores", "MatMul(q, kt)"),
    op("scaled", "Mul(scores, s)"),
    op("p", "Softmax(scaled)"),
    op("o", "MatMul(p, v)"),
    pair("od", "o"),
    matmul("out", "od"),
    op("y", "Relu(out)"),
    x="float16[N,8,16]",
    y="float16[N,8,16]",
)
