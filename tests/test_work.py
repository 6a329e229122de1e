"""MACs of calls in torch. The truth: definitions by hand, and the coverage of the exported graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq.graph.coverage import measure_coverage
from qdq.work import trace_work


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


PICTURES = torch.randn(2, 4, 8, 8)
GRID = torch.zeros(2, 3, 5, 2)


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 2 * 4 * 16 * 16 * 4),
        (lambda x: F.interpolate(x, size=(8, 16), mode="bilinear"), 2 * 4 * 8 * 16 * 2),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), 2 * 4 * 16 * 16 * 16),
        (lambda x: F.interpolate(x, scale_factor=2), 0),
        (lambda x: F.grid_sample(x, GRID, align_corners=False), 2 * 4 * 3 * 5 * 4),
        (lambda x: F.grid_sample(x, GRID, "nearest", align_corners=False), 0),
        (lambda x: torch.fft.fft(x + 0j).abs(), 2 * 4 * 8 * (2 * 8 * 3)),
        (lambda x: torch.fft.rfft(x).abs(), 2 * 4 * 8 * (8 * 3)),
        (lambda x: torch.fft.irfft(x, 14), 2 * 4 * 8 * (14 * 4)),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 1]), 8),
        (lambda x: x * x + x.mean(), 0),
    ],
)
def test_calls(function, macs):
    _, work = trace_work(Call(function), PICTURES)
    assert work.total == macs
    assert work.unknown == ()


def test_operators_of_torchvision():
    ops = pytest.importorskip("torchvision", reason="needs the extra 'demo'").ops
    weight, offset = torch.randn(6, 4, 3, 3), torch.zeros(2, 18, 8, 8)
    _, work = trace_work(Call(lambda x: ops.deform_conv2d(x, offset, weight, padding=1)), PICTURES)
    assert work.total == 2 * 6 * 8 * 8 * 4 * 9
    boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])] * 2
    _, work = trace_work(Call(lambda x: ops.roi_align(x, boxes, 3, sampling_ratio=2)), PICTURES)
    assert work.total == 2 * 4 * 9 * 4 * 4
    _, work = trace_work(Call(lambda x: ops.roi_align(x, boxes, 3)), PICTURES)
    assert work.unknown == ("roi_align",)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 32, 3, padding=1)
        self.gru = nn.GRU(32, 24, batch_first=True)
        self.head = nn.Linear(24, 16)

    def forward(self, x):
        return self.head(self.gru(self.conv(x).transpose(1, 2))[0])


def test_torch_and_the_file_agree():
    model, x = Recurrent().eval(), torch.randn(1, 16, 12)
    _, work = trace_work(model, x)
    assert work.macs["gru"] == 12 * 3 * 24 * (32 + 24)
    assert work.share_of(["conv", "gru", "head"]) == pytest.approx(1)
    program = torch.onnx.export(model, (x,), dynamo=True, opset_version=18, verbose=False)
    assert measure_coverage(program.model).macs == work.total
