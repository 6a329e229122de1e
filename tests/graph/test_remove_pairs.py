import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_text import compute, ops, read

from qdq.errors import ExportError
from qdq.graph.passes import run_passes
from qdq.graph.remove_pairs import RemovePairs
from qdq.graph.shapes import complete_shapes

QUANTIZED = """g (float[1,2,4,4] x) => (float[1,3,4,4] y)
<float s = {1e-5}, int8 z = {0}, int8[3,2,1,1] w = {1, -2, 3, -4, 5, -6}, float[3] ws = {0.5, 0.25, 2},
 int8[3] wz = {0, 0, 0}, int32[3] b = {8, -8, 1}, float[3] bs = {0.5, 0.25, 2}>
{
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    wd = DequantizeLinear <axis = 0> (w, ws, wz)
    bd = DequantizeLinear <axis = 0> (b, bs)
    y = Conv (d, wd, bd)
}"""


def test_weights_and_biases_become_floats():
    model = read(QUANTIZED)
    run_passes(model, [RemovePairs()])
    assert ops(model) == ["Conv"]
    (output,) = compute(model).values()
    x = np.float32(3 * np.random.default_rng(0).normal(size=(1, 2, 4, 4)))
    weight = np.float32([[0.5, -1], [0.75, -1], [10, -12]])
    expected = np.einsum("nchw,oc->nohw", x, weight) + np.float32([4, -2, 2]).reshape(1, 3, 1, 1)
    assert output == pytest.approx(expected, abs=1e-5)


def test_an_unsigned_weight_with_offsets():
    text = """g (float[4,2] x) => (float[4,3] y)
    <uint8[2,3] w = {0, 1, 2, 253, 254, 255}, float[3] ws = {0.5, 0.25, 2}, uint8[3] wz = {128, 0, 7}>
    {
        wd = DequantizeLinear <axis = 1> (w, ws, wz)
        y = MatMul (x, wd)
    }"""
    expected = compute(read(text))["y"]
    model = read(text)
    run_passes(model, [RemovePairs()])
    assert ops(model) == ["MatMul"]
    assert np.array_equal(compute(model)["y"], expected)


def test_codes_of_fp8_are_no_integers():
    """ONNX Runtime dequantizes them; 1.5 and 0.875 lose their fraction as integers."""
    codes = np.array([[1.5, -0.875, 448], [2**-9, 0, -3.25]], ml_dtypes.float8_e4m3fn)
    text = "g (float[4,2] x) => (float[4,3] y) <float s = {0.5}> { d = DequantizeLinear (w, s) y = MatMul (x, d) }"
    model = read(text.replace("<", "<float8e4m3fn[2,3] w = {0, 0, 0, 0, 0, 0}, "))
    model.graph.initializers["w"].const_value = ir.tensor(codes, name="w")
    expected = compute(model)["y"]
    run_passes(model, [RemovePairs()])
    assert ops(model) == ["MatMul"]
    assert np.array_equal(compute(model)["y"], expected)


def test_a_pair_that_changes_the_type_leaves_a_cast():
    """An export in fp16 quantizes its float32 input, and the DQ gives float16."""
    model = read(
        """g (float[4,2] x) => (float16[4,2] y)
        <float s = {0.5}, int8 z = {0}, float[2,2] w = {1, 2, 3, 4}> {
            q = QuantizeLinear (x, s, z)
            h = Cast <to = 10> (s)
            d = DequantizeLinear (q, h, z)
            v = Cast <to = 10> (w)
            y = MatMul (d, v)
        }""",
        opset=19,
    )
    complete_shapes(model)
    run_passes(model, [RemovePairs()])
    assert set(ops(model)) == {"Cast", "MatMul"}
    (output,) = compute(model).values()
    x = np.float32(3 * np.random.default_rng(0).normal(size=(4, 2)))
    expected = np.float64(np.float16(x)) @ [[1, 2], [3, 4]]
    assert output.dtype == np.float16
    assert output == pytest.approx(expected, rel=2e-3, abs=2e-2)


def test_two_readers_of_one_pair():
    model = read(
        """g (float[4] x) => (float[4] y, float[4] r) <float s = {0.5}, int8 z = {0}> {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            y = Relu (d)
            r = Neg (d)
        }"""
    )
    run_passes(model, [RemovePairs()])
    assert ops(model) == ["Relu", "Neg"]
    assert not model.graph.initializers
    outputs = compute(model)
    assert np.array_equal(outputs["y"], np.maximum(-outputs["r"], 0))


def test_outputs_keep_their_names():
    """ONNX Runtime's quantizer puts pairs on the outputs of a network, too."""
    model = read(
        """g (float[4] x) => (float[4] y, float[4] r) <float s = {0.5}, int8 z = {0}> {
            t = Neg (x)
            q = QuantizeLinear (t, s, z)
            y = DequantizeLinear (q, s, z)
            r = Neg (y)
        }"""
    )
    run_passes(model, [RemovePairs()])
    assert ops(model) == ["Neg", "Identity", "Neg"]
    outputs = compute(model)
    x = np.float32(3 * np.random.default_rng(0).normal(size=4))
    assert np.array_equal(outputs["y"], -x)
    assert np.array_equal(outputs["r"], x)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {0}>"
        "{ q = QuantizeLinear (x, s, z) t = Identity (q) y = DequantizeLinear (t, s, z) }",
        "g (float[4] x, float s) => (float[4] y) <int8[4] w = {1, 2, 3, 4}>"
        "{ d = DequantizeLinear (w, s) y = Add (x, d) }",
    ],
)
def test_what_cannot_be_removed_is_named(text):
    model = read(text)
    for node in model.graph:
        node.name = f"node_{node.op_type}"
    with pytest.raises(ExportError, match="cannot be removed: node_"):
        RemovePairs()(model)
    onnx.checker.check_model(
        onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 19]> {text}')
    )


def test_some_pairs_and_a_weight_without_zero_point():
    text = QUANTIZED.replace("(w, ws, wz)", "(w, ws)").replace("wd =", "[wd] wd =")
    expected = compute(read(text))["y"]
    model = read(text)
    run_passes(model, [RemovePairs(["wd"])])
    assert sorted(ops(model)) == ["Conv", "DequantizeLinear", "DequantizeLinear", "QuantizeLinear"]
    assert compute(model)["y"] == pytest.approx(expected, abs=1e-6)
