"""A recurrent layer beside int8 layers: what plan, file, engine and gate say about the work, counted by hand."""

import json

import pytest
import torch
from torch import nn

from qdq import (
    build_engine,
    calibrate_model,
    check_onnx,
    export_onnx,
    gate_run,
    plan_swap,
    rewire_operations,
    swap_modules,
)

STEPS = 20
CONVOLUTION, GRU, HEAD = STEPS * 64 * 64 * 3, STEPS * 3 * 32 * (64 + 32), STEPS * 32 * 32
INT8 = (CONVOLUTION + HEAD) / (CONVOLUTION + GRU + HEAD)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.gru = nn.GRU(64, 32, batch_first=True)
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.gru(torch.relu(self.conv(x)).transpose(1, 2))[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(1, 64, STEPS)
    plan = plan_swap(model, x)
    swap_modules(model, x)
    rewired = rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    path = tmp_path_factory.mktemp("recurrent") / "model.onnx"
    export_onnx(model, x, path, dynamic_batch=False)
    return plan, rewired, path


def test_the_plans(exported):
    plan, rewired, _ = exported
    assert f"{INT8:.1%} of all MACs in quantized layers" in plan.format_table()
    assert f"(R-RNN); {1 - INT8:.1%} of all MACs" in plan.format_table()
    assert rewired.int8_macs / rewired.macs == pytest.approx(INT8)


def test_the_file(exported):
    coverage = check_onnx(exported[-1]).coverage
    assert coverage.int8_share == pytest.approx(INT8)
    (layer,) = (layer for layer in coverage.layers if not layer.int8)
    assert (layer.op_type, layer.macs) == ("GRU", GRU)


@pytest.mark.trt
def test_the_engine_and_the_gate(exported, tmp_path, request):
    built = build_engine(exported[-1], tmp_path / "model.engine")
    assert built.int8_share == pytest.approx(INT8)
    assert built.missing_int8 == []
    stored = json.loads((request.config.rootpath / "tests/data/gate_good.json").read_text())
    stored["summary"]["int8_macs"] = built.int8_share
    (tmp_path / "report.json").write_text(json.dumps(stored))
    assert not gate_run(tmp_path / "report.json", min_int8_macs=0.9).passed
