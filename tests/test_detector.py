"""Detectors of torchvision: the core and the functions around it give what the detector gives."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import batched_nms

from qdq import (
    calibrate_model,
    export_onnx,
    fold_batchnorm,
    rewire_operations,
    split_detector,
    swap_modules,
)
from qdq.check import OnnxModel
from qdq.errors import ArgumentError, ArgumentTypeError, ExportError

OPTIONS = {"weights": None, "weights_backbone": None, "num_classes": 3}
SIZES = {"min_size": 64, "max_size": 96}
BUILDERS = {
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(**OPTIONS),
    "retinanet": lambda: detection.retinanet_resnet50_fpn(**OPTIONS, **SIZES),
    "fcos": lambda: detection.fcos_resnet50_fpn(**OPTIONS, **SIZES),
    "fasterrcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(**OPTIONS, **SIZES),
}
IMAGES = [torch.rand(3, 60, 80), torch.rand(3, 72, 64)]


class Backbone(nn.Module):
    """Two feature maps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, images):
        first = self.first(images)
        return OrderedDict([("0", first), ("1", self.second(first))])


def build_small():
    torch.manual_seed(0)
    anchors = DefaultBoxGenerator([[2], [2]])
    head = SSDHead([16, 32], anchors.num_anchors_per_location(), num_classes=3)
    return SSD(Backbone(), anchors, (64, 64), num_classes=3, head=head, score_thresh=0.0).eval()


def build(name):
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    model.score_thresh = 0.0
    return model


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_parts_give_the_detections_of_the_whole(name):
    model = build(name)
    with torch.no_grad():
        expected = model(IMAGES)
        split = split_detector(model)
        outputs = split.core(split.preprocess(IMAGES))
    found = split.postprocess({key: value.numpy() for key, value in outputs.items()}, IMAGES)
    assert len(found) == len(IMAGES)
    for detections, reference in zip(found, expected, strict=True):
        assert detections.keys() == reference.keys()
        assert all(torch.equal(detections[key], reference[key]) for key in reference)
    assert any(len(reference["boxes"]) for reference in expected)
    with torch.no_grad():  # the detector itself is as before
        assert torch.equal(model(IMAGES)[0]["boxes"], expected[0]["boxes"])


def test_the_quantized_core_is_exported(tmp_path):
    split = split_detector(build_small())
    batch = split.preprocess(IMAGES)
    fold_batchnorm(split.core, batch)
    swap_modules(split.core, batch)
    rewire_operations(split.core, batch)
    calibrate_model(split.core, [batch])
    with torch.no_grad():
        expected = split.core(batch)
    report = export_onnx(split.core, batch, tmp_path / "core.onnx")
    found = OnnxModel(report.path)(batch.numpy())
    for array, tensor in zip(found, expected.values(), strict=True):
        assert array.shape == tensor.shape
        assert abs(array - tensor.numpy()).max() < 0.1 * tensor.abs().max()
    detections = split.postprocess(dict(zip(expected, found, strict=True)), IMAGES)
    assert [set(entry) for entry in detections] == [{"boxes", "labels", "scores"}] * 2


def test_the_layers_keep_their_names():
    model = build("fasterrcnn")
    names = dict(model.named_modules())
    for name, module in split_detector(model).core.named_modules():
        if name and name != "rpn":
            assert module is names[name]


def test_missing_outputs_are_named():
    split = split_detector(build("ssdlite"))
    outputs = split.core(split.preprocess(IMAGES))
    outputs.pop("bbox_regression")
    with pytest.raises(ArgumentError, match="lack bbox_regression; there are cls_logits"):
        split.postprocess(outputs, IMAGES)


def test_other_models_are_refused():
    with pytest.raises(ArgumentTypeError, match="not a detector of torchvision"):
        split_detector(nn.Linear(1, 1))


def test_a_whole_detector_says_how_to_split_it(tmp_path):
    with pytest.raises(ExportError) as caught:
        export_onnx(build_small(), IMAGES, tmp_path / "model.onnx")
    assert "qdq.split_detector(model)" in caught.value.fix


class Suppressing(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 5, 1)

    def forward(self, images):
        rows = self.head(images).flatten(2)[0].T
        corners = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4].abs()], 1)
        chosen = batched_nms(corners, rows[:, 4], torch.zeros(len(rows)), 0.5)
        if len(chosen) > 3:
            chosen = chosen[:3]
        return corners[chosen]


def test_nms_that_cannot_be_exported_says_what_to_export(tmp_path):
    with pytest.raises(ExportError) as caught:
        export_onnx(Suppressing().eval(), torch.rand(2, 3, 8, 8), tmp_path / "model.onnx")
    assert "returns the outputs of backbone and head" in caught.value.fix
