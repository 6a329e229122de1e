"""Each rule finds its own broken graph, and nothing else in it; a sound graph gives no finding."""

import subprocess
import sys

import onnx_ir as ir
import pytest

from qdq.check.rules import find_violations

SOUND = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N,2,4,4] x) => (float[N,2,4,4] y)
<float xs = {0.5}, int8 xz = {0}, int8[2,2,1,1] w = {1,2,3,4}, float[2] ws = {0.5,0.25}, int8[2] wz = {0,0}>
{
    [quantize] xq = QuantizeLinear(x, xs, xz)
    [dequantize] xd = DequantizeLinear(xq, xs, xz)
    [weight] wd = DequantizeLinear<axis=0>(w, ws, wz)
    [product] y = Conv(xd, wd)
}
"""


def find(*replacements, text=SOUND):
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return [(finding.rule, finding.node) for finding in find_violations(ir.from_onnx_text(text))]


def test_sound_graph():
    assert find() == []


@pytest.mark.parametrize("scale", ["0.0", "-0.5", "nan", "inf"])
def test_101_scale_that_is_no_scale(scale):
    model = ir.from_onnx_text(SOUND)
    bad = ir.tensor([0.5, float(scale)], dtype=ir.DataType.FLOAT)
    model.graph.initializers["ws"].const_value = bad
    assert [(f.rule, f.node) for f in find_violations(model)] == [("QDQ101", "weight")]


def test_102_zero_point_missing():
    assert find(("DequantizeLinear<axis=0>(w, ws, wz)", "DequantizeLinear<axis=0>(w, ws)")) == [("QDQ102", "weight")]


def test_102_zero_point_not_zero():
    assert find(("wz = {0,0}", "wz = {0,1}")) == [("QDQ102", "weight")]


def test_102_zero_point_unsigned():
    found = find(("int8 xz", "uint8 xz"))
    assert found == [("QDQ102", "quantize"), ("QDQ102", "dequantize")]


def test_103_scale_of_shape_1():
    # With the axis written down, so that nothing else is wrong.
    found = find(
        ("float xs", "float[1] xs"),
        ("QuantizeLinear(x, xs, xz)\n", "QuantizeLinear<axis=1>(x, xs, xz)\n"),
        ("DequantizeLinear(xq", "DequantizeLinear<axis=1>(xq"),
    )
    assert found == [("QDQ103", "quantize"), ("QDQ103", "dequantize")]


def test_104_activation_with_a_scale_a_channel():
    found = find(
        ("float xs = {0.5}, int8 xz = {0}", "float[2] xs = {0.5,0.5}, int8[2] xz = {0,0}"),
        ("QuantizeLinear(x, xs, xz)\n", "QuantizeLinear<axis=1>(x, xs, xz)\n"),
        ("DequantizeLinear(xq", "DequantizeLinear<axis=1>(xq"),
    )
    assert found == [("QDQ104", "quantize")]


@pytest.mark.parametrize("weight", ["initializer", "constant node"])
def test_104_is_not_for_float_weights(weight):
    found = find(
        ("int8[2,2,1,1] w = {1,2,3,4}, ", "float[2,2,1,1] w = {1,2,3,4}, " if weight == "initializer" else ""),
        (
            "[weight]",
            ("" if weight == "initializer" else "w = Constant<value = float[2,2,1,1] {1,2,3,4}>()\n    ")
            + "[codes] wq = QuantizeLinear<axis=0>(w, ws, wz)\n    [weight]",
        ),
        ("DequantizeLinear<axis=0>(w,", "DequantizeLinear<axis=0>(wq,"),
    )
    assert found == []


def test_105_axis_not_written_down():
    assert find(("DequantizeLinear<axis=0>", "DequantizeLinear")) == [("QDQ105", "weight")]


@pytest.mark.parametrize(
    ("product", "axis", "clean"),
    [
        ("Conv(xd, wd)", 0, True),
        ("Conv(xd, wd)", -4, True),
        ("Conv(xd, wd)", 1, False),
        ("ConvTranspose(xd, wd)", 1, True),
        ("ConvTranspose(xd, wd)", 0, False),
    ],
)
def test_105_axis_of_convolution_weights(product, axis, clean):
    found = find(("<axis=0>", f"<axis={axis}>"), ("Conv(xd, wd)", product))
    assert found == ([] if clean else [("QDQ105", "product")])


@pytest.mark.parametrize(
    ("product", "axis", "clean"),
    [
        ("MatMul(xd, wd)", 1, True),
        ("MatMul(xd, wd)", 0, False),
        ("Gemm(xd, wd)", 1, True),
        ("Gemm(xd, wd)", 0, False),
        ("Gemm<transB=1>(xd, wd)", 0, True),
        ("Gemm<transB=1>(xd, wd)", 1, False),
    ],
)
def test_105_axis_of_matrices(product, axis, clean):
    text = SOUND.replace("[N,2,4,4]", "[N,2]").replace("[2,2,1,1]", "[2,2]")
    found = find(("<axis=0>", f"<axis={axis}>"), ("Conv(xd, wd)", product), text=text)
    assert found == ([] if clean else [("QDQ105", "product")])


def test_105_says_nothing_behind_a_transpose():
    text = SOUND.replace("[N,2,4,4]", "[N,2]").replace("[2,2,1,1]", "[2,2]")
    found = find(("[product] y = Conv(xd, wd)", "wt = Transpose(wd)\n    [product] y = MatMul(xd, wt)"), text=text)
    assert found == []


def test_109_scale_computed_in_the_graph():
    found = find(("{\n", "{\n    s = ReduceMax<keepdims=0>(x)\n"), ("QuantizeLinear(x, xs", "QuantizeLinear(x, s"))
    assert found == [("QDQ109", "quantize")]


def test_109_is_not_for_constant_nodes():
    assert find(("float xs = {0.5}, ", ""), ("{\n", "{\n    xs = Constant<value_float = 0.5>()\n")) == []


def test_110_only_the_input():
    text = SOUND.replace("int8[2,2,1,1]", "float[2,2,1,1]").replace("Conv(xd, wd)", "Conv(xd, w)")
    assert find(("    [weight] wd = DequantizeLinear<axis=0>(w, ws, wz)\n", ""), text=text) == [("QDQ110", "product")]


def test_110_only_the_weight():
    assert find(("Conv(xd, wd)", "Conv(x, wd)")) == [("QDQ110", "product")]


def test_110_looks_through_what_only_moves_values():
    assert find(("[product] y = Conv(xd", "xr = Identity(xd)\n    [product] y = Conv(xr")) == []


def test_no_rule_for_operators_of_others():
    text = SOUND.replace('"": 19]', '"": 19, "mine": 1]')
    assert find(("Conv(xd, wd)", "mine.Conv(x, wd)"), text=text) == []


def test_every_finding_says_what_and_how():
    text = SOUND.replace("{0.5,0.25}", "{0,0.25}").replace("{0,0}", "{0,1}").replace("Conv(xd", "Conv(x")
    findings = find_violations(ir.from_onnx_text(text))
    assert [finding.rule for finding in findings] == ["QDQ101", "QDQ102", "QDQ110"]
    assert all(finding.message and finding.fix.endswith(".") for finding in findings)


def test_needs_no_torch():
    script = "import sys, qdq.check.rules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_scale_behind_identity_is_constant():
    model = ir.from_onnx_text("""
    <ir_version: 9, opset_import: ["" : 19]>
    graph (float[2,4] x) => (float[2,4] y)
    <float s = {0.5}, int8 z = {0}>
    {
        t = Identity (s)
        q = QuantizeLinear <axis = 1> (x, t, z)
        y = DequantizeLinear <axis = 1> (q, t, z)
    }
    """)
    assert find_violations(model) == []
