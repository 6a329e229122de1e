"""Attention over the pixels of a map, as detectors have it: what qdq exports breaks none of its own rules."""

import pytest
import torch
from torch import nn

from qdq import (
    analyze_layers,
    calibrate_model,
    check_onnx,
    export_onnx,
    fold_batchnorm,
    rewire_operations,
    swap_modules,
)


def layer(inputs, outputs, kernel=1, groups=1, act=True):
    """Convolution, BatchNorm and SiLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    activation = nn.SiLU(inplace=True) if act else nn.Identity()
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation)


class PixelAttention(nn.Module):
    """One projection for all three; queries and keys are half as wide as values, which a convolution places."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.width, self.key = heads, width // heads, width // heads // 2
        self.project_in = layer(width, width + 2 * self.key * heads, act=False)
        self.position = layer(width, width, 3, width, act=False)
        self.project_out = layer(width, width, act=False)

    def forward(self, x):
        batch, channels, height, width = x.shape
        heads = self.project_in(x).view(batch, self.heads, -1, height * width)
        query, key, value = heads.split([self.key, self.key, self.width], dim=2)
        scores = (query.transpose(-2, -1) @ key) * self.key**-0.5
        mixed = value @ scores.softmax(-1).transpose(-2, -1)
        mixed = mixed.view(batch, channels, height, width)
        return self.project_out(
            mixed + self.position(value.reshape(batch, channels, height, width))
        )


class AreaAttention(nn.Module):
    """Attention within strips of the map."""

    def __init__(self, width, heads, areas):
        super().__init__()
        self.heads, self.width, self.areas = heads, width // heads, areas
        self.project_in = layer(width, 3 * width, act=False)
        self.position = layer(width, width, 5, width, act=False)
        self.project_out = layer(width, width, act=False)

    def forward(self, x):
        batch, channels, height, width = x.shape
        rows = self.project_in(x).flatten(2).transpose(1, 2)
        rows = rows.reshape(batch * self.areas, -1, 3 * channels)
        heads = rows.view(batch * self.areas, -1, self.heads, 3 * self.width).permute(0, 2, 3, 1)
        query, key, value = heads.split([self.width] * 3, dim=2)
        scores = (query.transpose(-2, -1) @ key) * self.width**-0.5
        mixed = (value @ scores.softmax(-1).transpose(-2, -1)).permute(0, 3, 1, 2)
        value = value.permute(0, 3, 1, 2)
        maps = []
        for tokens in (mixed, value):
            tokens = tokens.reshape(batch, height, width, channels)
            maps.append(tokens.permute(0, 3, 1, 2).contiguous())
        return self.project_out(maps[0] + self.position(maps[1]))


class Block(nn.Module):
    """Attention and a perceptron, each with a shortcut."""

    def __init__(self, attention, width):
        super().__init__()
        self.attention = attention
        self.mlp = nn.Sequential(layer(width, 2 * width), layer(2 * width, width, act=False))

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Partial(nn.Module):
    """Half of the channels pass a block, and all halves are joined."""

    def __init__(self, block, width):
        super().__init__()
        self.first, self.last, self.block = layer(width, width), layer(3 * width // 2, width), block

    def forward(self, x):
        halves = list(self.first(x).chunk(2, 1))
        halves.append(self.block(halves[-1]))
        return self.last(torch.cat(halves, 1))


class Detector(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.stem = layer(3, 64, 3)
        self.neck = Partial(Block(attention, 32), 64)
        self.boxes = nn.Sequential(layer(64, 32, 3), nn.Conv2d(32, 16, 1))
        self.scores = nn.Sequential(layer(64, 32, 3), nn.Conv2d(32, 16, 1))

    def forward(self, x):
        x = self.neck(self.stem(x))
        return torch.cat([self.boxes(x), self.scores(x).sigmoid()], 1)


ATTENTIONS = {"pixels": lambda: PixelAttention(32, 2), "areas": lambda: AreaAttention(32, 2, 4)}


@pytest.fixture(params=ATTENTIONS)
def detector(request):
    torch.manual_seed(0)
    model, x = Detector(ATTENTIONS[request.param]()).eval(), torch.randn(2, 3, 16, 16)
    fold_batchnorm(model, x)
    swap_modules(model, x)
    plan = rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    return model, x, plan


def test_all_int8(detector, tmp_path):
    model, x, plan = detector
    reasons = {call.reason for call in plan.of("float") if call.function == "matmul"}
    assert all("R-MHA-2" in reason for reason in reasons)
    assert check_onnx(export_onnx(model, x, tmp_path / "model.onnx").path).problems == ()


def test_after_an_analysis(detector, tmp_path):
    model, x, _ = detector
    analysis = analyze_layers(model, [x], max_float_layers=4, max_float_share=1)
    assert len(analysis.float_layers) == 4
    assert check_onnx(export_onnx(model, x, tmp_path / "model.onnx").path).problems == ()
