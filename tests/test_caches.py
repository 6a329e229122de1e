"""What a model keeps from call to call neither fixes the shapes of a file nor changes by its export."""

import numpy as np
import pytest
import torch
from torch import nn

from qdq import calibrate_model, export_onnx, predict, rewire_operations, swap_modules
from qdq.caches import forgetting_calls
from qdq.errors import ExportError


class Head(nn.Module):
    """Keeps anchors for the shape of its last call, like the heads of YOLO."""

    shape = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 1)
        self.grids = [None]

    def forward(self, x):
        if self.shape != x.shape:
            height, width = x.shape[-2:]
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            self.anchors = torch.stack([columns, rows]).reshape(2, -1) + 0.5
            self.grids[0] = rows
            self.shape = x.shape
        y = self.conv(x).flatten(2)
        return torch.cat([y[:, :2] + self.anchors, y[:, 2:]], 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.body = nn.Conv2d(16, 16, 3, 1, 1)
        self.head = Head()

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("dynamic", [None, {"x": {2: "height", 3: "width"}}], ids=["batch", "all"])
def test_a_cached_shape_does_not_fix_the_file(size, dynamic, tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    images = torch.rand(size, 3, 32, 32)
    swap_modules(model, images)
    rewire_operations(model, images)
    calibrate_model(model, [images])
    predict(model, [images])
    kept = model.head.anchors, model.head.shape, model.head.grids[0]

    report = export_onnx(model, images, tmp_path / "model.onnx", dynamic=dynamic)

    restored = model.head.anchors, model.head.shape, model.head.grids[0]
    assert all(now is before for now, before in zip(restored, kept, strict=True))
    others = torch.rand(3, 3, 32, 48 if dynamic else 32)
    expected = predict(model, [others])
    found = predict(report.path, [others])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=0.05)


def test_a_shape_that_cannot_be_forgotten_is_named(tmp_path):
    class ByShape(nn.Module):
        """Keeps anchors of every shape that it has seen."""

        def __init__(self):
            super().__init__()
            self.anchors = {}

        def forward(self, x):
            if tuple(x.shape) not in self.anchors:
                self.anchors[tuple(x.shape)] = torch.zeros(int(x.shape[0]), 1)
            return x + self.anchors[tuple(x.shape)]

    model = ByShape()
    model(torch.rand(2, 4))
    with pytest.raises(ExportError) as caught:
        export_onnx(nn.Sequential(model), torch.rand(2, 4), tmp_path / "model.onnx")
    assert "keeps 0.anchors from call to call" in caught.value.fix
    assert set(model.anchors) == {(2, 4)}


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1))
        self.count = 0
        self.seen = []

    def forward(self, x):
        self.total += x.sum()
        self.count += 1
        self.seen.append(x)
        self.last = x
        return x


def test_everything_is_restored():
    model = Stateful()
    model(torch.ones(2))
    seen, total = list(model.seen), model.total
    with forgetting_calls(model, [lambda: 1 / 0, lambda: model(torch.ones(3))]) as list_changed:
        assert model.count == 2
        assert list_changed() == ["count", "seen", "last"]
    assert model.count == 1
    assert model.last is seen[0]
    assert len(model.seen) == 1
    assert model.total is total
    assert model.total.item() == 2


def test_an_error_in_the_block_restores_too():
    model = Stateful()
    with pytest.raises(KeyError), forgetting_calls(model, [lambda: model(torch.ones(3))]):
        raise KeyError
    assert model.count == 0
    assert not hasattr(model, "last")
