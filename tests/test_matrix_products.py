"""Products with a matrix, however they are spelled, become int8 like a linear layer: in torch, in the file, built."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq import (
    build_engine,
    calibrate_model,
    check_onnx,
    export_onnx,
    predict,
    rewire_operations,
    swap_modules,
)


class Addmm(nn.Module):
    """A linear layer with the inputs first, as GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        rows = x.view(-1, x.size(-1))
        return torch.addmm(self.bias, rows, self.weight).view(*x.shape[:-1], -1)


class Products(nn.Module):
    """Three spellings and a linear layer with the same sizes."""

    def __init__(self):
        super().__init__()
        self.first = Addmm(32, 48)
        self.second = nn.Parameter(torch.randn(32, 48) / 7)
        self.third = nn.Parameter(torch.randn(32, 48) / 6)
        self.last = nn.Linear(48, 16)

    def forward(self, x):
        y = F.relu(self.first(x))
        y = torch.einsum("btd,hd->bth", y, self.second)
        return self.last(F.relu(y) @ self.third)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, x = Products().eval(), torch.randn(4, 10, 32)
    reference = predict(model, [x])
    swap_modules(model, x)
    plan = rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    path = tmp_path_factory.mktemp("products") / "model.onnx"
    export_onnx(model, x, path)
    return model, x, reference, plan, path


def test_each_weight_has_a_range_for_each_output(exported):
    model, _, _, plan, _ = exported
    assert [operation.function for operation in plan.of("quantize")] == [
        "addmm",
        "einsum",
        "matmul",
    ]
    weights = {
        model.first._addmm_input2_quantizer: model.first.weight.abs().amax(0),
        model._einsum_input1_quantizer: model.second.abs().amax(1),
        model._matmul_input1_quantizer: model.third.abs().amax(0),
    }
    for quantizer, expected in weights.items():
        torch.testing.assert_close(quantizer.amax.flatten(), expected.detach())


def test_the_file_computes_the_same_and_is_all_int8(exported):
    model, x, reference, _, path = exported
    report = check_onnx(path, expected=predict(model, [x]), found=predict(path, [x]))
    assert report.problems == ()
    assert report.parity.is_sufficient
    assert report.coverage.int8_share == 1
    error = predict(path, [x]) - reference
    assert 10 * np.log10((reference**2).sum() / (error**2).sum()) > 30


@pytest.mark.trt
def test_the_engine_runs_all_of_them_in_int8(exported, tmp_path):
    built = build_engine(exported[-1], tmp_path / "model.engine")
    assert built.missing_int8 == []
    assert built.int8_share == 1
