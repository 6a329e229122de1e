"""Files of other tools in FP8, int16, int4, FP4 and blocks: read and described by the words of their own type."""

import format_files as files
import pytest
from onnx import TensorProto

from qdq import check_onnx

# case -> file, promised type, expected type, ids of the findings
CASES = {
    "FP8": (files.fp8_matmul, "FP8", "FP8", ["QDQ138"]),
    "FP8 per channel": (lambda path: files.fp8_matmul(path, axis=1), "FP8", "FP8", ["QDQ138"]),
    "FP8 convolution": (files.fp8_conv, "FP8", "FP8", ["QDQ138"]),
    "FP8 after a clip": (files.fp8_after_clip, "FP8", "FP8", ["QDQ121", "QDQ138"]),
    "FP8 of TensorRT": (files.trt_fp8, "FP8", "FP8", ["QDQ201", *["QDQ206"] * 4]),
    "FP8 weights": (
        lambda path: files.weight_only(path, files.E4M3),
        "FP8 weights",
        "FP8 weights",
        ["QDQ110"],
    ),
    "int4": (
        lambda path: files.weight_only(path, TensorProto.INT4),
        "Int4 weights",
        "Int4 weights",
        ["QDQ110"],
    ),
    "int4 with zero points": (
        lambda path: files.weight_only(path, TensorProto.INT4, zero=0),
        "Int4 weights",
        "Int4 weights",
        ["QDQ110"],
    ),
    "uint4": (
        lambda path: files.weight_only(path, TensorProto.UINT4, zero=8),
        "UInt4 weights",
        "Half",
        ["QDQ110", "QDQ129"],
    ),
    "int16": (
        lambda path: files.fp8_matmul(path, dtype=TensorProto.INT16),
        "Int16",
        "Half",
        ["QDQ102"] * 3,
    ),
    "uint16": (
        lambda path: files.fp8_matmul(path, dtype=TensorProto.UINT16),
        "UInt16",
        "Half",
        ["QDQ129"] * 3,
    ),
    "MXFP8": (files.mxfp8, "MXFP8", "MXFP8", ["QDQ201", *["QDQ206"] * 3]),
    "MXFP8 of ONNX": (
        files.power_of_two_scales,
        "MXFP8 weights",
        "MXFP8 weights",
        ["QDQ101", "QDQ110", "QDQ201"],
    ),
    "NVFP4": (files.nvfp4, "FP4", "FP4", ["QDQ201", "QDQ206"]),
    "NVFP4 weights": (
        lambda path: files.nvfp4(path, activations=False),
        "FP4 weights",
        "FP4 weights",
        ["QDQ110", "QDQ201"],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    make, promised, expected, rules = CASES[request.param]
    path = make(tmp_path_factory.mktemp("format") / "m.onnx")
    return check_onnx(path, ignore=["QDQ120"]), promised, expected, rules


def test_coverage_and_findings(case):
    report, promised, expected, rules = case
    (layer,) = report.coverage.layers
    assert (layer.promised, layer.expected, layer.int8) == (promised, expected, False)
    assert sorted(finding.rule for finding in report.findings) == rules


def test_a_file_of_others_is_clean_unless_tensorrt_does_not_read_it(case):
    report, _, _, rules = case
    refused = {"QDQ101", "QDQ102", "QDQ129"}
    assert {finding.rule for finding in report.problems} == refused.intersection(rules)


def test_no_word_of_int8(case):
    """The only int8 is the advice to use it instead of a type that TensorRT does not read."""
    report, *_ = case
    texts = [report.coverage.format_table()]
    for finding in report.findings:
        if finding.rule != "QDQ201":  # ONNX Runtime's own words
            texts.append(finding.message)
        if finding.rule != "QDQ102":
            texts.append(finding.fix)
    assert "int8" not in "\n".join(texts).lower().replace("uint8", "")
