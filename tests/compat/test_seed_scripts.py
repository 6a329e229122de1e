"""The scripts that the field begins with, untouched, by `python -m qdq.compat`: the file is right and builds."""

import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from qdq import build_engine
from qdq.check import check_onnx

SCRIPTS = Path(__file__).parent.parent / "data"


def run(script, *arguments):
    command = [sys.executable, "-m", "qdq.compat", str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_a_vector():
    x, fake, codes, scale = _vector()
    out = run("seed_vector.py").stdout
    for part in (x, fake, codes):
        assert str(part) in out
    assert str(scale) in out


def _vector():
    """By hand: s = 127 / amax."""
    torch.manual_seed(12345)
    x = torch.rand(10)
    scale = 127 / x.max()
    codes = (x * scale).round().clamp(-127, 127)
    return x, codes / scale, codes, scale


@pytest.mark.trt
@pytest.mark.parametrize(
    ("script", "pairs", "distance"),
    [
        # 53 convolutions and the classifier twice, the average pooling once
        ("seed_resnet50.py", 2 * 54 + 1, 1e-3),
        ("seed_layer1.py", 8, 1e-3),
        ("seed_multi_add.py", 3, 1e-6),
    ],
)
def test_exports(script, pairs, distance, tmp_path):
    pytest.importorskip("torchvision")
    path = tmp_path / "model.onnx"
    log = run(script, path).stderr
    assert "have no amax" in log
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [o.version for o in model.opset_import if o.domain == ""] == [13]
    counts = [
        sum(node.op_type == kind for node in model.graph.node)
        for kind in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert counts == [pairs, pairs]

    saved = torch.load(f"{path}.pt", weights_only=True)
    inputs = saved["inputs"] if isinstance(saved["inputs"], tuple) else (saved["inputs"],)
    session = onnxruntime.InferenceSession(path)
    feeds = {
        value.name: tensor.numpy()
        for value, tensor in zip(session.get_inputs(), inputs, strict=True)
    }
    found, expected = (
        torch.from_numpy(session.run(None, feeds)[0]).double().flatten(),
        saved["outputs"].double().flatten(),
    )
    assert 1 - torch.cosine_similarity(found, expected, dim=0) <= distance

    assert {finding.rule for finding in check_onnx(path).findings} >= {"QDQ123"}
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    report = build_engine(path, backend="rtx")
    assert not report.missing_int8
