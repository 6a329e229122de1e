"""Layers that share a weight, and layers whose weights only look alike."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qdq import calibrate_model, check_onnx, export_onnx, fold_batchnorm, predict, swap_modules

WIDTH = 16


def export(model, x, path, **options):
    swap_modules(model, x, include="*")
    calibrate_model(model, [x], method="max")
    report = export_onnx(model, x, path, **options)
    np.testing.assert_allclose(predict(path, [x]), predict(model, [x]), atol=0.02)
    return report


def codes_in(path):
    initializers = onnx.load(path).graph.initializer
    return [
        value.name
        for value in initializers
        if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1
    ]


@pytest.fixture
def x():
    return torch.randn(2, WIDTH, 8, 8)


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("factor", [4.0, "of each channel"])
def test_weights_that_differ_by_a_factor(factor, weights, x, tmp_path):
    """Their codes are equal, and each layer has its own."""
    model = nn.Sequential(*(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))).eval()
    scale = (
        2.0 ** torch.arange(WIDTH).remainder(5)
        if factor == "of each channel"
        else torch.tensor(factor)
    )
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight * scale.reshape(-1, 1, 1, 1))
    path = export(model, x, tmp_path / "model.onnx", weights=weights).path
    assert not [finding for finding in check_onnx(path).findings if finding.rule == "QDQ113"]
    if weights == "int8":
        assert codes_in(path) == ["0.weight", "1.weight"]


def test_equal_weights_are_stored_once(x, tmp_path):
    model = nn.Sequential(*(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))).eval()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    path = export(model, x, tmp_path / "model.onnx").path
    assert len(codes_in(path)) == 1
    assert not [finding for finding in check_onnx(path).findings if finding.rule == "QDQ113"]


class Head(nn.Module):
    """One convolution on several levels, each with a BatchNorm of its own, as EfficientDet has it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(WIDTH) for _ in range(3)])
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2)
            norm.running_mean.normal_()

    def forward(self, x):
        return sum(
            norm(self.conv(level))
            for norm, level in zip(self.norms, (x, x * 2, x.relu()), strict=True)
        )


def test_a_layer_with_a_batchnorm_on_each_level(x, tmp_path):
    model = Head().eval()
    expected = "conv before it runs 3 times in one forward: a fold would change every run"
    assert {(pair.folded, pair.reason) for pair in fold_batchnorm(model, x)} == {(False, expected)}
    path = export(model, x, tmp_path / "model.onnx").path
    assert "BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}
    assert not [finding for finding in check_onnx(path).findings if finding.rule == "QDQ122"]


def test_a_batchnorm_that_could_have_been_folded(x, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3)
    ).eval()
    path = export(model, x, tmp_path / "model.onnx").path
    assert [finding.rule for finding in check_onnx(path).findings if finding.rule == "QDQ122"] == [
        "QDQ122"
    ]
