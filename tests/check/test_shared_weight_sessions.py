"""A layer that runs several times, in both sessions of ONNX Runtime."""

import numpy as np
import torch
from torch import nn

from qdq import calibrate_model, export_onnx, predict, rewire_operations, swap_modules
from qdq.check import OnnxModel


class Pyramid(nn.Module):
    """One head on two maps, as in detectors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 32, 3)

    def forward(self, x):
        first = torch.relu(self.stem(x))
        second = nn.functional.max_pool2d(first, 2)
        heads = [torch.relu(self.head(maps)) for maps in (first, second)]
        return {"large": self.last(heads[0]), "small": self.last(heads[1])}


def test_the_default_session_loads_a_weight_that_two_layers_read(tmp_path):
    torch.manual_seed(0)
    model, x = Pyramid().eval(), torch.randn(2, 16, 12, 12)
    swap_modules(model, x)
    rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    path = export_onnx(model, x, tmp_path / "model.onnx").path
    assert OnnxModel(path, session="default").outputs == ["large", "small"]
    expected = predict(model, [x])
    found = predict(path, [x], session="default")
    for name, output in expected.items():
        np.testing.assert_allclose(found[name], output, atol=0.02)
