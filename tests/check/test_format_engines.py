"""Promised and built types of files in FP8, int4, FP4 and blocks, by the kernels of TensorRT-RTX."""

import json

import format_files as files
import pytest
from onnx import TensorProto

from qdq.build import build_engine
from qdq.cli.build import build as build_command
from qdq.errors import BuildError

pytestmark = pytest.mark.trt


def _build(make, tmp_path, sm=89):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    return build_engine(make(tmp_path / "m.onnx"), backend="rtx", sm=sm)


def _int4(path):
    return files.weight_only(path, TensorProto.INT4)


def _fp8_weights(path):
    file = files.File()
    file.weight(files.codes_of(64, 64), 0.02)
    file.node("MatMul", ["x", "wd"], "y")
    return file.save(path, [8, 64], [8, 64])


@pytest.mark.parametrize(
    ("make", "sm", "built"),
    [
        (lambda path: files.fp8_matmul(path, axis=1), 89, "FP8"),
        (lambda path: files.fp8_matmul(path, scale=[0.01]), 89, "FP8"),
        (lambda path: files.fp8_conv(path, kernel=(5, 5)), 120, "FP8"),
        (lambda path: files.fp8_conv(path, channel_scales=True), 89, "FP8"),
        (files.trt_fp8, 89, "FP8"),
        (files.nvfp4, 120, "FP4"),
        (_int4, 89, "Int4 weights"),
        (_fp8_weights, 89, "FP8 weights"),
    ],
)
def test_built_as_promised(make, sm, built, tmp_path):
    report = _build(make, tmp_path, sm)
    (layer,) = report.layers
    (expected,) = report.coverage.layers
    assert layer.built == layer.promised == expected.expected == built
    assert not report.missing
    assert report.share_of(built) == report.coverage.share_of(built)
    assert report.share_of(built) in (1, None)  # no shapes behind TensorRT's own Q
    text = report.format_table()
    assert "int8" not in text
    assert text.endswith(f"{built.replace('Int', 'int')}: 1 of 1 expected")


@pytest.mark.parametrize(
    ("make", "promised", "built", "reason"),
    [
        (lambda path: files.fp8_matmul(path, axis=0), "FP8", "Half", "R-AXIS"),
        (lambda path: files.fp8_conv(path, scale=[0.01]), "FP8", "Half", "R-SHAPE"),
        (lambda path: files.fp8_conv(path, kernel=(7, 7)), "FP8", "Half", "R-CONV-8"),
        (lambda path: files.fp8_conv(path, op_type="ConvTranspose"), "FP8", "Half", "R-CT-3"),
    ],
)
def test_another_type_than_promised(make, promised, built, reason, tmp_path):
    report = _build(make, tmp_path)
    (layer,) = report.layers
    assert (layer.promised, layer.built, layer.is_missing) == (promised, built, True)
    assert reason in layer.reason
    assert report.coverage.layers[0].expected == built
    text = report.format_table()
    assert "NOT FP8" in text
    assert "int8" not in text
    assert text.endswith("FP8: 0 of 1 expected")


def test_blocks_that_are_dequantized_first(tmp_path):
    """TensorRT-RTX 1.7 reads MXFP8, and multiplies in float; stored FP4 needs a kernel of its own."""
    report = _build(files.mxfp8, tmp_path, 120)
    assert (report.layers[0].promised, report.layers[0].is_missing) == ("MXFP8", True)
    assert "dequantizes the blocks" in report.layers[0].reason
    report = _build(lambda path: files.nvfp4(path, activations=False), tmp_path, 120)
    assert (report.layers[0].promised, report.layers[0].built) == ("FP4 weights", "Half")
    assert "another kernel dequantizes its FP4 weights first" in report.layers[0].reason


@pytest.mark.parametrize(
    ("make", "sm", "message"),
    [
        (files.fp8_matmul, 86, "it has 3 Q/DQ of FP8, which need SM 89 or later"),
        (files.trt_fp8, 75, "it has 4 Q/DQ of FP8, which need SM 89 or later"),
        (files.nvfp4, 89, "it has 3 Q/DQ of FP4, which need SM 100 or later"),
    ],
)
def test_a_gpu_without_the_type_is_refused_before_the_build(
    make, sm, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("qdq.build.build_plan", None)
    with pytest.raises(BuildError, match=message) as error:
        _build(make, tmp_path, sm)
    assert "\n" not in str(error.value)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    path = files.fp8_conv(tmp_path / "m.onnx", op_type="ConvTranspose")
    assert build_command(path, backend="rtx", json=tmp_path / "m.json") == 1
    output = capsys.readouterr().out
    assert "FP8: 0 of 1 expected" in output
    assert "--stronglyTyped" in output
    stored = json.loads((tmp_path / "m.json").read_text())
    assert [(layer["promised"], layer["built"]) for layer in stored["layers"]] == [("FP8", "Half")]
    assert stored["coverage"]["layers"][0]["expected"] == "Half"


@pytest.mark.parametrize(
    ("options", "types", "is_fused"),
    [
        ({}, ["FP8", "FP8"], True),
        ({"real": TensorProto.BFLOAT16}, ["FP8", "FP8"], True),
        ({"softmax_scale": 1 / 256}, ["FP8", "FP8"], True),
        ({"real": files.SINGLE}, ["FP8", "FP8"], False),
        ({"softmax_scale": None}, ["FP8", "Half"], False),
        ({"dtype": TensorProto.INT8, "softmax_scale": 1 / 127}, ["Int8", "Int8"], False),
    ],
)
def test_attention(options, types, is_fused, tmp_path):
    """One kernel for both products, as QDQ136 says."""
    report = _build(lambda path: files.attention(path, **options), tmp_path)
    assert [layer.built for layer in report.layers] == types
    first, second = report.layers
    assert (first.kernel == second.kernel) == is_fused
    assert first.kernel.startswith("_gemm_mha") == is_fused
    (attention,) = report.attention
    assert (attention.softmax, attention.is_fused) == ("p", is_fused)
    assert bool(attention.reason) is not is_fused
    assert ("QDQ136" in attention.reason) == ("FP8" in types and not is_fused)
    assert ("attention: " in report.format_table()) == ("FP8" in types)


@pytest.mark.parametrize(("tokens", "reason"), [(31, "it has 31 keys"), (32, "")])
def test_short_attention_is_several_kernels(tokens, reason, tmp_path):
    report = _build(lambda path: files.attention(path, tokens=tokens), tmp_path)
    (attention,) = report.attention
    assert attention.reason.startswith(reason)
    assert attention.is_fused is not bool(reason)
