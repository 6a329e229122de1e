"""What the file says of its making, and that it says the same twice; models of more than one file."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq
from qdq import calibrate_model, check_onnx, export_onnx, predict, rewire_operations, swap_modules
from qdq.graph import save


def metadata(path):
    return {
        entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props
    }


def test_versions_and_ranges(quantized, images, tmp_path):
    facts = metadata(export_onnx(quantized, images, tmp_path / "a.onnx").path)
    assert facts["qdq.version"] == qdq.__version__
    assert facts["qdq.torch_version"] == torch.__version__
    assert facts.keys() == {"qdq.version", "qdq.torch_version", "qdq.ranges_sha256"}
    quantized.conv.input_quantizer._amax *= 1.5
    changed_facts = metadata(export_onnx(quantized, images, tmp_path / "b.onnx").path)
    assert changed_facts["qdq.ranges_sha256"] != facts["qdq.ranges_sha256"]


def test_calibration_and_decisions(residual, images, tmp_path):
    plan = swap_modules(residual, images, exclude=["head"])
    ranges = calibrate_model(residual, [images, images], method="max")
    facts = metadata(
        export_onnx(residual, images, tmp_path / "model.onnx", calibration=ranges, plan=plan).path
    )
    assert json.loads(facts["qdq.calibration"]) == {
        "methods": ["max"],
        "batches": 2,
        "left_in_float": {},
    }
    decisions = json.loads(facts["qdq.layers"])
    assert decisions["conv"][0] == "quantize"
    assert decisions["head"][0] == "float"
    assert "head" in decisions["head"][1]


def test_decisions_on_function_calls(residual, images, tmp_path):
    swap_modules(residual, images)
    rewired = rewire_operations(residual, images)
    calibrate_model(residual, [images], method="max")
    facts = metadata(export_onnx(residual, images, tmp_path / "model.onnx", rewired=rewired).path)
    operations = json.loads(facts["qdq.operations"])
    assert operations == {o.name: [o.action, o.reason] for o in rewired.operations}
    assert operations


SCRIPT = """
import sys
import torch
from torch import nn
from qdq import calibrate_model, export_onnx, swap_modules
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 5)).eval()
x = torch.randn(2, 3, 8, 8)
plan = swap_modules(model, x)
ranges = calibrate_model(model, [x], method="max")
export_onnx(model, x, sys.argv[1], calibration=ranges, plan=plan)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    digests = []
    for seed in ("1", "2"):
        path = tmp_path / seed / "model.onnx"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            cwd=tmp_path,
        )
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert os.uname().nodename.encode() not in content
    assert digests[0] == digests[1]


def test_a_model_of_two_files(quantized, images, tmp_path, monkeypatch):
    single = export_onnx(quantized, images, tmp_path / "one.onnx")
    monkeypatch.setattr(save, "_ONE_FILE_BYTES", 1000)
    two = export_onnx(quantized, images, tmp_path / "two.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "one.onnx",
        "two.onnx",
        "two.onnx.data",
    ]
    assert two.file_bytes == two.path.stat().st_size + (tmp_path / "two.onnx.data").stat().st_size
    assert check_onnx(two.path).findings == check_onnx(single.path).findings
    np.testing.assert_array_equal(predict(single.path, [images]), predict(two.path, [images]))


class PadBetween(nn.Module):
    """A pair behind Pad and copies, written by hand, as a forward with quantizers may do it."""

    def __init__(self):
        super().__init__()
        self.conv, self.twin = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        x = F.pad(torch.relu(x), [1, 1, 1, 1]).transpose(2, 3)
        return self.conv(x) + self.twin(x)


def test_passes_in_the_export(tmp_path):
    model, x = PadBetween().eval(), torch.randn(2, 16, 6, 6)
    swap_modules(model, x, include=[nn.Conv2d])
    calibrate_model(model, [x], method="max")
    report = export_onnx(model, x, tmp_path / "model.onnx")
    ops = [node.op_type for node in onnx.load(report.path).graph.node]
    assert report.quantize_nodes == 1  # both convolutions read one tensor with one range
    assert ops.index("QuantizeLinear") < ops.index("Transpose")
    assert ops.count("DequantizeLinear") == 3
    assert set(report.layers) == {"conv", "twin"}
    np.testing.assert_allclose(predict(report.path, [x]), predict(model, [x]), atol=1e-5)
