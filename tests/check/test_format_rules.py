"""The rules about FP8 and other types of codes: a file that breaks each, and one that does not."""

import format_files as files
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from qdq import check_onnx
from qdq.check.fix import fix_onnx
from qdq.cli.check import check as check_command

HALF, SINGLE = files.HALF, files.SINGLE


def attention(**options):
    return lambda path: files.attention(path, **options)


def matmul(**options):
    return lambda path: files.fp8_matmul(path, **options)


def conv(**options):
    return lambda path: files.fp8_conv(path, **options)


def _late_transpose(path):
    file = files.File()
    file.node("Neg", ["x"], "v")
    for value in ("x", "v"):
        file.pair(value, f"{value}d")
    file.node("Transpose", ["xd"], "kt", perm=[0, 1, 3, 2])
    file.node("MatMul", ["xd", "kt"], "scores")
    file.node("Softmax", ["scores"], "p", axis=-1)
    file.pair("p", "pd", 1 / 448)
    file.node("MatMul", ["pd", "vd"], "o")
    file.node("Neg", ["o"], "y")
    return file.save(path, [1, 2, 64, 32], [1, 2, 64, 32])


def _early_int4(path):
    file = files.File(opset=19)
    file.weight(files.codes_of(64, 64), np.full(64, 0.02), TensorProto.INT4, axis=1)
    file.node("MatMul", ["x", "wd"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def _attention_operator(path):
    file = files.File(opset=23)
    file.pair("x", "xd")
    file.node("Attention", ["xd", "xd", "xd"], "a")
    file.node("Neg", ["a"], "y")
    return file.save(path, [1, 2, 64, 32], [1, 2, 64, 32])


# Rule -> others that its files break: onnx refuses the type, and a product has one quantized operand.
_ALSO = {
    "QDQ133": {"QDQ201", "QDQ202", "QDQ203"},
    "QDQ136": {"QDQ110", "QDQ119"},
}
# Rule and case -> the file, the nodes that are named, words of the message
BROKEN = {
    "QDQ102 FP8": (matmul(zero=1.0), ["xd_q", "xd"], "the zero point is not zero"),
    "QDQ103 FP8": (conv(scale=[0.01]), ["xd_q", "xd"], "shape [1]"),
    "QDQ117 FP8": (conv(op_type="ConvTranspose"), ["m"], "gains nothing from FP8"),
    "QDQ117 large kernel": (conv(kernel=(7, 7)), ["m"], "kernel [7, 7] (R-CONV-8)"),
    "QDQ133 FP8": (matmul(opset=17, real=SINGLE), ["xd_q", "xd", "wd"], "FP8, which opset 17"),
    "QDQ133 int4": (_early_int4, ["wd"], "int4, which opset 19"),
    "QDQ134 FP8": (matmul(), ["xd_q", "xd", "wd"], "FP8, which SM 86 does not have"),
    "QDQ135": (matmul(saturate=0), ["xd_q"], "saturate is 0"),
    "QDQ136 no pair on the softmax": (
        attention(softmax_scale=None),
        ["p"],
        "no FP8 Q/DQ on softmax",
    ),
    "QDQ136 softmax only": (
        attention(quantized=()),
        ["p"],
        "no FP8 Q/DQ on query and key and value",
    ),
    "QDQ136 float32": (attention(real=SINGLE), ["p"], "it is in float32"),
    "QDQ136 scale": (attention(softmax_scale=1 / 256), ["p"], "0.003906, not 1/448"),
    "QDQ136 late factor": (attention(scaled="late"), ["p"], "Mul is between the DQ of its query"),
    "QDQ136 late transpose": (_late_transpose, ["p"], "Transpose is between the DQ of its key"),
    "QDQ136 operator": (_attention_operator, ["a"], "no place for Q/DQ on its softmax"),
    "QDQ137": (conv(channel_scales=True), ["m"], "16 scales"),
    "QDQ138 Relu": (conv(relu_before=True, real=SINGLE), ["g"], "negative values pass r"),
    "QDQ138": (conv(real=SINGLE), ["g"], "changes the results of its FP8 Q/DQ"),
}
SOUND = {
    "QDQ102 no zero point of codes that show their type": lambda path: files.weight_only(
        path, files.E4M3
    ),
    "QDQ103 product": matmul(scale=[0.01]),
    "QDQ117": conv(kernel=(5, 5)),
    "QDQ133": matmul(opset=19),
    "QDQ135": matmul(saturate=1),
    "QDQ136 half precision": attention(),
    "QDQ136 bfloat16": attention(real=TensorProto.BFLOAT16),
    "QDQ136 float attention": attention(quantized=(), softmax_scale=None),
    "QDQ136 int8 is of QDQ118": attention(dtype=TensorProto.INT8, softmax_scale=1 / 127),
    "QDQ137 one scale": conv(),
    "QDQ137 float32": conv(channel_scales=True, real=SINGLE),
    "QDQ138 int8": attention(dtype=TensorProto.INT8, softmax_scale=1 / 127),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_rule_names_the_node(case, tmp_path):
    make, nodes, words = BROKEN[case]
    rule = case.split()[0]
    sm = 86 if rule == "QDQ134" else None
    report = check_onnx(make(tmp_path / "m.onnx"), sm=sm)
    findings = [finding for finding in report.findings if finding.rule == rule]
    assert [finding.node for finding in findings] == nodes
    for finding in findings:
        assert words in finding.message
        assert "int8" not in finding.message
    others = {finding.rule for finding in report.problems} - {rule}
    assert others <= _ALSO.get(rule, set())


@pytest.mark.parametrize("case", SOUND)
def test_the_rule_is_silent(case, tmp_path):
    rule = case.split()[0]
    report = check_onnx(SOUND[case](tmp_path / "m.onnx"), sm=89)
    assert rule not in {finding.rule for finding in report.findings}
    assert "QDQ134" not in {finding.rule for finding in report.findings}


def test_fp8_attention_and_product_are_clean(tmp_path):
    for make in (files.attention, files.fp8_matmul, files.fp8_conv):
        report = check_onnx(make(tmp_path / "m.onnx"), sm=120)
        assert [finding.rule for finding in report.findings] == ["QDQ138"]
        assert "negative" not in report.findings[0].message


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ((files.E4M3, TensorProto.INT8), "its operands are FP8 and int8"),
        ((TensorProto.INT8, files.E4M3), "its operands are int8 and FP8"),
    ],
)
def test_a_product_of_two_types_is_named(types, words, tmp_path):
    file = files.File()
    file.pair("x", "xd", dtype=types[0])
    file.weight(files.codes_of(64, 64), 0.02, types[1])
    file.node("MatMul", ["xd", "wd"], "m")
    file.node("Relu", ["m"], "y")
    (finding,) = check_onnx(file.save(tmp_path / "m.onnx", [8, 64], [8, 64])).problems
    assert (finding.rule, finding.severity, finding.node) == ("QDQ110", "warning", "m")
    assert words in finding.message


@pytest.mark.parametrize(("dtype", "named"), [(TensorProto.INT8, ["a"]), (files.E4M3, [])])
def test_the_shortcut_of_a_sum_matters_to_int8_only(dtype, named, tmp_path):
    file = files.File()
    file.node("Relu", ["x"], "r")
    file.pair("r", "rd", dtype=dtype)
    file.weight(files.codes_of(16, 16, 1, 1), 0.02, dtype)
    file.node("Conv", ["rd", "wd"], "c")
    file.node("Add", ["c", "r"], "a")
    file.node("Relu", ["a"], "y")
    report = check_onnx(file.save(tmp_path / "m.onnx", [1, 16, 8, 8], [1, 16, 8, 8]))
    assert [finding.node for finding in report.findings if finding.rule == "QDQ112"] == named


def test_int8_attention_is_still_named(tmp_path):
    path = files.attention(tmp_path / "m.onnx", dtype=TensorProto.INT8, softmax_scale=1 / 127)
    (finding,) = check_onnx(path).problems
    assert (finding.rule, finding.node) == ("QDQ118", "p")


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("reader", [None, "Neg"])
def test_138_is_what_onnx_runtime_does(level, reader, tmp_path):
    """The rule names a Relu exactly where a level above BASIC changes the numbers."""
    file = files.File(SINGLE)
    file.node("Relu", ["x"], "r")
    file.pair("r", "y")
    if reader is not None:
        file.node(reader, ["r"], "unused")
        file.node("Add", ["y", "unused"], "z")
        file.nodes[-1].output[0] = "y2"
    path = file.save(tmp_path / "m.onnx", [4], [4])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(["y"], {"x": np.float32([-2, -1, 1, 2])})
    is_removed = bool(outputs.min() < 0)
    (message,) = (
        finding.message for finding in check_onnx(path).findings if finding.rule == "QDQ138"
    )
    assert is_removed == (
        message.endswith("negative values pass r") and level != "ORT_ENABLE_BASIC"
    )


def test_135_is_what_onnx_runtime_does(tmp_path):
    outputs = []
    for saturate in (0, 1):
        file = files.File(SINGLE)
        file.pair("x", "y", saturate=saturate)
        path = file.save(tmp_path / "m.onnx", [2], [2])
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (values,) = session.run(None, {"x": np.float32([1, 1000])})
        outputs.append(values)
    assert np.isnan(outputs[0][1])
    assert outputs[1][1] == np.float32(4.48)


def test_the_option_of_the_command(tmp_path, capsys):
    path = files.fp8_matmul(tmp_path / "m.onnx")
    assert check_command(path, sm=89) == 0
    assert check_command(path, sm=86) == 1
    assert "QDQ134" in capsys.readouterr().out


def test_fix_keeps_fp8(tmp_path):
    """The repairs of int8 do not write int8 zeros into FP8 pairs; a scale of shape [1] becomes 0-D."""
    path = files.fp8_conv(tmp_path / "m.onnx", scale=[0.01])
    assert fix_onnx(path, tmp_path / "fixed.onnx") == {"QDQ103": 2}
    report = check_onnx(tmp_path / "fixed.onnx")
    assert not report.problems
    assert report.coverage.share_of("FP8") == 1
