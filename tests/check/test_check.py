"""Files that are sound, broken or float; what ONNX Runtime computes against torch and numpy."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from qdq import ArgumentError, CheckError, check_onnx, export_onnx, predict
from qdq.check import OnnxModel
from qdq.check.fix import fix_onnx
from qdq.check.parity import measure_parity
from qdq.files import to_jsonable

FLOAT = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N,3] x, float[3] z) => (float[N,2] y)
<float[3,2] w = {1,2,3,4,5,6}>
{
    s = Add(x, z)
    [product] y = MatMul(s, w)
}
"""

CLIPPED_BIAS = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N,2,4,4] x) => (float[N,3,4,4] y)
<float xs = {0.03}, float ys = {0.05}, int8 z = {0}, int8[3,2,1,1] w = {1,-2,0,0,5,127},
 float[3] ws = {0.01,4e-22,0.01}, int8[3] wz = {0,0,0}, float[3] bias = {0.1,0.7,-0.2}>
{
    [xq] a = QuantizeLinear(x, xs, z)
    [xd] b = DequantizeLinear(a, xs, z)
    [w] c = DequantizeLinear<axis=0>(w, ws, wz)
    [conv] d = Conv(b, c, bias)
    e = Relu(d)
    [yq] f = QuantizeLinear(e, ys, z)
    [yd] y = DequantizeLinear(f, ys, z)
}
"""


@pytest.fixture
def float_file(tmp_path):
    ir.save(ir.from_onnx_text(FLOAT), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


@pytest.fixture
def quantized_file(quantized, images, tmp_path):
    return export_onnx(quantized, images, tmp_path / "model.onnx").path


def test_exported_file_is_clean(quantized, images, quantized_file):
    found = predict(quantized_file, [images])
    report = check_onnx(
        quantized_file, expected=predict(quantized, [images]), found=found, ignore=["QDQ112"]
    )
    assert report.problems == ()
    assert {finding.rule for finding in report.findings} <= {"QDQ121", "QDQ124"}
    assert report.path == quantized_file
    assert report.file_bytes == quantized_file.stat().st_size
    ops = [node.op_type for node in ir.load(quantized_file).graph]
    assert report.quantize_nodes == ops.count("QuantizeLinear") >= 2
    assert report.dequantize_nodes == ops.count("DequantizeLinear") >= 4
    int8 = [layer for layer in report.coverage.layers if layer.int8]
    assert {"stem", "conv"} <= {layer.module for layer in int8}
    assert report.parity.images == 4
    text = report.format_table()
    assert f"{report.quantize_nodes} Q and {report.dequantize_nodes} DQ nodes" in text
    assert f"int8 expected: {len(int8)} of 3 nodes that multiply" in text
    assert "nothing is quantized" not in text
    assert json.loads(json.dumps(to_jsonable(report)))["parity"]["images"] == 4


def test_float_file_is_valid_and_said_to_be_float(float_file):
    report = check_onnx(str(float_file))
    assert report.findings == ()
    assert report.parity is None
    assert "nothing is quantized" in report.format_table()


def test_broken_rule_is_a_finding(tmp_path, quantized_file):
    model = ir.load(quantized_file)
    product = next(node for node in model.graph if node.op_type == "Conv" and "stem" in node.name)
    product.replace_input_with(0, model.graph.inputs[0])
    ir.save(model, tmp_path / "broken.onnx")
    report = check_onnx(tmp_path / "broken.onnx", ignore=["QDQ112"])
    assert [(f.rule, f.node) for f in report.problems] == [("QDQ110", "stem/Conv")]
    assert "QDQ110 warning stem/Conv: only the weight is quantized" in report.format_table()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"this is text, not a model\n", "is not a valid ONNX file"),
        (bytes(range(256)) * 8, "is not a valid ONNX file"),
    ],
)
def test_files_that_are_no_onnx(tmp_path, content, found):
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckError, match=found) as error:
        check_onnx(path)
    assert "\n" not in error.value.message
    with pytest.raises(CheckError):
        OnnxModel(path)


def test_truncated_files(tmp_path, quantized_file):
    whole = quantized_file.read_bytes()
    path = tmp_path / "cut.onnx"
    for share in (0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckError, match="is not a valid ONNX file"):
            check_onnx(path)
        with pytest.raises(CheckError, match="cannot load"):
            OnnxModel(path)


def test_folder_is_no_file(tmp_path):
    with pytest.raises(CheckError, match="is a folder"):
        check_onnx(tmp_path)


def test_model_without_nodes(tmp_path):
    text = '<ir_version: 9, opset_import: ["": 19]> g (float[N] x) => (float[N] x) {}'
    ir.save(ir.from_onnx_text(text), tmp_path / "no.onnx")
    with pytest.raises(CheckError, match="contains no ONNX graph"):
        check_onnx(tmp_path / "no.onnx")


def test_onnx_model_computes_what_is_written(float_file):
    model = OnnxModel(float_file)
    assert model.inputs == {"x": ["N", 3], "z": [3]}
    x, z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.float32([1, 2, 3])
    (found,) = model(x, z)
    np.testing.assert_allclose(found, (x + z) @ np.float32([[1, 2], [3, 4], [5, 6]]), rtol=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [
        (np.zeros((2, 3), np.float32),),
        (np.zeros((2, 4), np.float32), np.zeros(3, np.float32)),
        (np.zeros((2, 3), np.float64), np.zeros(3, np.float32)),
        (np.zeros((2, 3, 1), np.float32), np.zeros(3, np.float32)),
    ],
)
def test_wrong_inputs_name_what_was_given_and_expected(float_file, inputs):
    with pytest.raises(
        CheckError, match=r"its inputs are x \['N', 3\] tensor\(float\), z \[3\]"
    ) as error:
        OnnxModel(float_file)(*inputs)
    assert f"given {list(inputs[0].shape)} {inputs[0].dtype}" in error.value.message
    assert "ONNXRuntimeError" not in error.value.message


class TestParity:
    def test_figures(self):
        expected = np.array([[1.0, 2.0], [4.0, 3.0], [0.0, 1.0]])
        found = np.array([[1.0, 2.0], [4.0, 3.3], [1.2, 1.0]])
        parity = measure_parity(expected, found)
        assert parity.images == 3
        assert parity.max_abs == pytest.approx(1.2)
        assert parity.agreement == pytest.approx(2 / 3)
        assert parity.exact == pytest.approx(1 / 3)
        assert parity.sqnr_db == pytest.approx(10 * np.log10(31 / (0.3**2 + 1.2**2)))

    def test_only_classes_have_a_largest_output(self, float_file):
        columns = np.ones((4, 5, 3))
        assert measure_parity(columns, columns).agreement is None
        report = check_onnx(float_file, expected=columns, found=columns)
        assert "top-1" not in report.format_table()
        classes = np.ones((4, 3))
        report = check_onnx(float_file, expected=classes, found=classes)
        assert "same top-1 100.0%" in report.format_table()

    @pytest.mark.parametrize(
        ("floor", "required"), [(None, 30), (50.0, 30), (33.0, 30), (25.0, 22), (np.inf, 30)]
    )
    def test_what_is_required(self, floor, required):
        assert measure_parity(np.ones((2, 2)), np.ones((2, 2)), floor).required_sqnr_db == required

    @pytest.mark.parametrize(
        ("error", "floor", "rules"),
        [
            (0.01, None, []),
            (0.1, None, ["QDQ190"]),
            (0.1, 22.0, []),
            (0.1, 24.0, ["QDQ190"]),
            (np.nan, None, ["QDQ190"]),
        ],
    )
    def test_190_when_the_file_is_worse_than_ties_allow(self, float_file, error, floor, rules):
        expected = np.ones((4, 2))
        report = check_onnx(
            float_file, expected=expected, found=expected * (1 + error), tie_floor_db=floor
        )
        assert [finding.rule for finding in report.findings] == rules
        assert ("rounding ties" in report.format_table()) == bool(rules or floor)

    @pytest.mark.parametrize(
        ("error", "floor", "rules"),
        [(0.01, None, []), (0.1, None, ["QDQ191"]), (0.1, 22.0, []), (np.nan, 22.0, ["QDQ191"])],
    )
    def test_191_when_the_default_session_is_another_program(self, float_file, error, floor, rules):
        plain = np.ones((4, 2))
        outputs = {"expected": plain, "found": plain, "found_default": plain * (1 + error)}
        report = check_onnx(float_file, **outputs, tie_floor_db=floor)
        assert [(finding.rule, finding.severity) for finding in report.findings] == [
            (rule, "info") for rule in rules
        ]
        assert report.default_parity.images == 4
        assert "default session against the plain one on 4 rows" in report.format_table()
        assert not check_onnx(float_file, **outputs, tie_floor_db=floor, ignore=["QDQ191"]).findings

    def test_a_bias_that_onnxruntime_clips(self, tmp_path):
        """A convolution with a dead channel as a file may have it: only the default session loses the bias."""
        ir.save(ir.from_onnx_text(CLIPPED_BIAS), tmp_path / "m.onnx")
        x = [np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)]
        plain, default = (
            predict(tmp_path / "m.onnx", x, session=session) for session in ("plain", "default")
        )
        report = check_onnx(tmp_path / "m.onnx", expected=plain, found=plain, found_default=default)
        assert {"QDQ140", "QDQ191"} <= {finding.rule for finding in report.findings}
        assert report.default_parity.max_abs > 0.5
        fix_onnx(tmp_path / "m.onnx", tmp_path / "fixed.onnx")
        for session in ("plain", "default"):
            np.testing.assert_allclose(
                predict(tmp_path / "fixed.onnx", x, session=session), plain, atol=0.051
            )

    def test_another_session(self, float_file):
        with pytest.raises(ArgumentError, match="'plain' or 'default'"):
            predict(float_file, [np.zeros((1, 3, 8, 8), np.float32)], session="fast")


def test_parity_does_not_use_optimizers_that_change_the_numbers(tmp_path):
    text = """
    <ir_version: 9, opset_import: ["": 19]>
    g (float[1,1,4,4] x) => (float[1,1,2,2] y) <int64[8] pads = {0,0,1,1,0,0,1,1}, float zero = {0.0}>
    { p = Pad(x, pads, zero) y = MaxPool<kernel_shape = [3,3], strides = [2,2]>(p) }
    """
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    x = -np.ones((1, 1, 4, 4), np.float32)
    assert OnnxModel(tmp_path / "m.onnx")(x)[0].max() == 0  # the zero of the Pad, not -1
