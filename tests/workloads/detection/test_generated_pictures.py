"""Generated pictures are for detectors that know what they show."""

import pytest
from torch import nn

from qdq import ArgumentError, WorkloadOptions
from qdq.workloads import detection
from qdq.workloads.detection.loaded_detector import LoadedDetector


def test_a_detector_of_other_classes_needs_data(monkeypatch):
    detector = LoadedDetector(
        name="yolo/coco.pt",
        module=nn.Identity(),
        weights="of the file",
        categories=("person", "circle"),
        size=64,
        prepare=lambda images: images,
        detect=lambda outputs, images: [],
    )
    monkeypatch.setattr(detection, "_load_network", lambda *_: detector)
    with pytest.raises(ArgumentError, match="needs pictures") as caught:
        detection.load_detector(WorkloadOptions("yolo/coco.pt"))
    assert "--data FILE.yaml" in caught.value.fix
