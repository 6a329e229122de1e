"""A small residual network in int8, calibrated once, and the ONNX files that the exporters make of it."""

import contextlib
import copy
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import qdq


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 16, 3, padding=1)
        self.layers = nn.Sequential(Block(16), Block(16))
        self.fc = nn.Linear(16, 32)

    def forward(self, x):
        x = self.layers(torch.relu(self.stem(x)))
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


@dataclass
class Case:
    """A network three times: float, swapped without ranges, calibrated; its input and its ONNX files by exporter."""

    float: nn.Module
    swapped: nn.Module
    calibrated: nn.Module
    images: torch.Tensor
    files: dict[str, Path]


@pytest.fixture(scope="session")
def _case(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranges")
    network, images = Net().eval(), torch.randn(4, 16, 8, 8)
    files = {name: folder / f"{name}.onnx" for name in ("dynamo", "torchscript", "qdq")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (images,), files["dynamo"], dynamo=True, opset_version=19, verbose=False
        )
        torch.onnx.export(network, (images,), files["torchscript"], dynamo=False)
    swapped = copy.deepcopy(network)
    qdq.swap_modules(swapped, example_inputs=images)
    qdq.rewire_operations(swapped, images)
    calibrated = copy.deepcopy(swapped)
    qdq.calibrate_model(calibrated, [images], method="max")
    qdq.export_onnx(calibrated, images, files["qdq"], dynamic_batch=False)
    return Case(network, swapped, calibrated, images, files)


@pytest.fixture
def case(_case):
    """The case; a test may change its models."""
    models = [copy.deepcopy(model) for model in (_case.float, _case.swapped, _case.calibrated)]
    return Case(*models, images=_case.images, files=_case.files)
