"""Dynamic dimensions: which, under which names, and that they are dynamic in the file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq import Labelled, export_onnx, predict
from qdq.dynamic import change_sizes, name_dimensions, repeat_single
from qdq.errors import ArgumentError, ArgumentTypeError, ExportError

X = torch.zeros(2, 3, 8, 8)
TENSORS = {"x": X, "mask": torch.zeros(2, 8), "scale": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("dynamic", "has_batch", "expected"),
    [
        (None, True, {"x": {0: "batch"}, "mask": {0: "batch"}, "scale": {}}),
        (None, False, {"x": {}, "mask": {}, "scale": {}}),
        (
            {"x": {2: "height"}},
            True,
            {"x": {0: "batch", 2: "height"}, "mask": {0: "batch"}, "scale": {}},
        ),
        (
            {"x": {0: "n", -1: "width"}},
            True,
            {"x": {0: "n", 3: "width"}, "mask": {0: "batch"}, "scale": {}},
        ),
        (
            {"mask": {0: None, 1: "length"}},
            True,
            {"x": {0: "batch"}, "mask": {1: "length"}, "scale": {}},
        ),
        ({"mask": {1: "length"}}, False, {"x": {}, "mask": {1: "length"}, "scale": {}}),
    ],
    ids=["batch", "nothing", "more", "names", "fixed", "without batch"],
)
def test_names(dynamic, has_batch, expected):
    assert name_dimensions(TENSORS, dynamic, has_batch=has_batch) == expected


@pytest.mark.parametrize(
    ("dynamic", "error", "message"),
    [
        ({"y": {0: "n"}}, ArgumentError, "the input 'y'; the model has x, mask, scale"),
        ({"x": {4: "n"}}, ArgumentError, r"the axis 4 of x, whose shape is \[2, 3, 8, 8\]"),
        ({"scale": {0: "n"}}, ArgumentError, "the axis 0 of scale"),
        ({"x": {1: "n"}, "mask": {1: "n"}}, ArgumentError, "'n' is 3 in x and 8 in mask"),
        ({"x": {1: "a b"}}, ArgumentError, "'a b'"),
        ({"x": {1: 5}}, ArgumentTypeError, "the dimension 5"),
        ({"x": {"1": "n"}}, ArgumentTypeError, "the axis '1'"),
        ({"x": ["n"]}, ArgumentTypeError, "expected axes with names"),
        ("batch", ArgumentTypeError, "expected axes with names"),
    ],
)
def test_refusals(dynamic, error, message):
    with pytest.raises(error, match=message):
        name_dimensions(TENSORS, dynamic, has_batch=True)


def test_sizes_of_one_are_repeated_where_they_are_dynamic():
    tensors = {"x": torch.arange(3.0).reshape(1, 3, 1), "table": torch.zeros(1, 4)}
    repeated = repeat_single(tensors, {"x": {0: "batch", 2: "length"}, "table": {}})
    assert repeated["x"].shape == (2, 3, 2)
    assert torch.equal(repeated["x"][1, :, 1], torch.arange(3.0))
    assert repeated["table"].shape == (1, 4)


def test_other_sizes_differ_in_every_dynamic_dimension():
    dimensions = {"x": {0: "batch", 2: "height"}}
    assert change_sizes({"x": X}, dimensions, only_batch=False)["x"].shape == (1, 3, 16, 8)
    assert change_sizes({"x": X}, dimensions, only_batch=True)["x"].shape == (1, 3, 8, 8)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, images, scale):
        features = F.relu(self.first(images))
        return F.interpolate(features, scale_factor=2.0) + scale[:, None, None, None]


def test_a_file_runs_with_any_size_of_its_dynamic_dimensions(tmp_path):
    model = Pyramid().eval()
    example = Labelled((torch.rand(1, 3, 16, 16), torch.rand(1)))
    report = export_onnx(
        model,
        example,
        tmp_path / "model.onnx",
        dynamic={"images": {2: "height", 3: "width"}},
    )
    assert report.inputs == {"images": ["batch", 3, "height", "width"], "scale": ["batch"]}
    for size in ((1, 3, 16, 16), (3, 3, 32, 8), (5, 3, 10, 50)):
        batch = Labelled((torch.rand(size), torch.rand(size[0])))
        found = predict(report.path, [batch])
        np.testing.assert_allclose(found, predict(model, [batch]), atol=1e-5)


def test_sequence_first_inputs_have_their_batch_elsewhere(tmp_path):
    model = nn.Linear(4, 4).eval()
    report = export_onnx(
        model,
        torch.rand(7, 2, 4),
        tmp_path / "model.onnx",
        dynamic={"input": {0: None, 1: "batch"}},
    )
    assert report.inputs == {"input": [7, "batch", 4]}


def test_a_fixed_dimension_is_named(tmp_path):
    class Flat(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 48)[:, :3] if x.shape[1] == 4 else x

    with pytest.raises(ExportError) as caught:
        export_onnx(Flat(), torch.rand(3, 4, 12), tmp_path / "x.onnx", dynamic={"x": {1: "length"}})
    assert "length" in caught.value.message or "shape[1]" in caught.value.message


def test_the_axes_are_refused_before_any_work(tmp_path):
    with pytest.raises(ArgumentTypeError, match="expected axes"):
        export_onnx(Pyramid(), X, tmp_path / "model.onnx", dynamic=["batch"])
