"""mAP of detections, against values computed by hand."""

import sys

import pytest
import torch

from qdq.errors import DependencyError, ModelError
from qdq.workloads.detection.classes import match_classes, rename_classes
from qdq.workloads.detection.pictures import Target

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")

from qdq.workloads.detection.average_precision import AveragePrecision

BOX = [10.0, 10.0, 110.0, 110.0]
ELSEWHERE = [200.0, 200.0, 300.0, 300.0]


def measure(detections, objects):
    """mAP of one image: detections are (box, score, class), objects (box, class)."""
    boxes, scores, labels = zip(*detections, strict=True)
    found = {
        "boxes": torch.tensor(boxes),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels),
    }
    target = Target(
        torch.tensor([box for box, _ in objects]), torch.tensor([label for _, label in objects])
    )
    precision = AveragePrecision()
    precision.update([found], [target])
    return precision.compute()


CASES = {
    "exact": ([(BOX, 0.9, 0)], [(BOX, 0)], 1.0, 1.0),
    # 62 of 100 pixels of the width: IoU 0.62, which counts at 0.5, 0.55 and 0.6 of 10 thresholds
    "narrow": ([([10.0, 10.0, 72.0, 110.0], 0.9, 0)], [(BOX, 0)], 0.3, 1.0),
    # one of two objects: precision 1 for the recalls 0, 0.01 ... 0.5 of 101
    "half": ([(BOX, 0.9, 0)], [(BOX, 0), (ELSEWHERE, 0)], 51 / 101, 51 / 101),
    "another class": ([(BOX, 0.9, 1)], [(BOX, 0)], 0.0, 0.0),
    # a false detection with the higher score halves the precision
    "false first": ([(ELSEWHERE, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0)], 0.5, 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_average_precision(case):
    detections, objects, expected, expected_at_half = CASES[case]
    figures = measure(detections, objects)
    assert figures == pytest.approx({"mAP": expected, "mAP50": expected_at_half}, abs=1e-4)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(DependencyError, match=r"qdq\[metrics\]"):
        AveragePrecision()


def test_classes_are_matched_by_name():
    classes = match_classes(["dog", "cat"], ["background", "cat", "bird", "dog"], "net")
    assert classes.tolist() == [-1, 1, -1, 0]
    detections = {
        "boxes": torch.arange(12.0).reshape(3, 4),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([3, 2, 1]),
    }
    renamed = rename_classes(detections, classes)
    assert renamed["labels"].tolist() == [0, 1]
    assert renamed["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert renamed["boxes"][:, 0].tolist() == [0, 8]


def test_a_missing_class_is_refused():
    with pytest.raises(ModelError, match="net has no class horse; it has cat, dog"):
        match_classes(["cat", "horse"], ["cat", "dog"], "net")
