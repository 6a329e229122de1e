"""Files of ultralytics, and NMS, against its own functions and a loop."""

import os
import pickle
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from qdq import fold_batchnorm, swap_modules
from qdq.errors import ArgumentError, DependencyError, ModelError
from qdq.workloads.detection import yolo
from qdq.workloads.detection.yolo import load_yolo, select_detections

SIZE = 64
NETWORK = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [16, 3, 2]] for _ in range(4)],
    "head": [[[2, 3], 1, "Detect", ["nc"]]],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """`ultralytics.nn.tasks`; what its import changes in the process is undone."""
    settings = {"YOLO_CONFIG_DIR": str(tmp_path_factory.mktemp("settings")), "YOLO_OFFLINE": "1"}
    save = torch.save
    with mock.patch.dict(os.environ, settings), np.printoptions():
        module = pytest.importorskip("ultralytics.nn.tasks")
        yield module
    torch.save = save
    torch.set_printoptions(profile="default")


@pytest.fixture(scope="module")
def saved(tasks, tmp_path_factory):
    """A tiny detector with random weights and its file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = tasks.DetectionModel(NETWORK, verbose=False).eval()
    detector.names = {0: "circle", 1: "square", 2: "triangle"}
    file = tmp_path_factory.mktemp("models") / "tiny.pt"
    torch.save({"model": detector, "train_args": {"imgsz": SIZE}}, file)
    return detector, file


def test_a_file_gives_the_network_without_nms(saved):
    detector, file = saved
    loaded = load_yolo(file)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        outputs = loaded.module(images)
        expected = detector(images)[0]
    assert list(outputs) == ["boxes", "scores"]
    assert torch.equal(torch.cat(list(outputs.values()), dim=1), expected)
    assert outputs["boxes"].shape == (2, 4, 8 * 8 + 4 * 4)
    assert (loaded.name, loaded.size) == ("yolo/tiny.pt", SIZE)
    assert loaded.categories == ("circle", "square", "triangle")


def test_box_and_score_heads_stay_in_float_and_nothing_else(saved):
    module = load_yolo(saved[1]).module
    images = torch.rand(2, 3, SIZE, SIZE)
    fold_batchnorm(module, images)
    plan = swap_modules(module, images)
    heads = {f"detector.model.4.{head}.{level}.2" for head in ("cv2", "cv3") for level in (0, 1)}
    reasons = {layer.name: layer.reason for layer in plan.of("float")}
    assert reasons.pop("detector.model.4.dfl.conv").startswith("expectation over a softmax")
    assert set(reasons) == heads
    assert all(reason.startswith("last convolution") for reason in reasons.values())
    assert plan.of("missed") == []


def test_detections_are_those_of_ultralytics(saved):
    nms = pytest.importorskip("ultralytics.utils.nms")
    outputs = make_outputs()
    detections = select_detections(outputs)
    joined = torch.cat([outputs["boxes"], outputs["scores"]], dim=1)
    expected = nms.non_max_suppression(joined, 0.001, 0.7, multi_label=True, max_time_img=10)
    for detection, rows in zip(detections, expected, strict=True):
        assert len(rows) > 10
        torch.testing.assert_close(detection["boxes"], rows[:, :4])
        torch.testing.assert_close(detection["scores"], rows[:, 4])
        assert detection["labels"].tolist() == rows[:, 5].tolist()


def make_outputs():
    """30 boxes that overlap much, and scores of 3 classes, for 2 images."""
    draw = torch.Generator().manual_seed(3)
    centres = torch.rand(2, 2, 30, generator=draw) * 20 + 20
    sides = torch.rand(2, 2, 30, generator=draw) * 10 + 10
    scores = torch.rand(2, 3, 30, generator=draw) ** 4
    return {"boxes": torch.cat([centres, sides], dim=1), "scores": scores}


def suppress(boxes, scores):
    """NMS for each class as a loop: a box stays if no better one of its class overlaps it by more than 0.7."""
    stays = []
    for label in range(len(scores)):
        better = []
        for anchor in scores[label].argsort(descending=True).tolist():
            if scores[label, anchor] <= 0.001:
                break
            if all(overlap(boxes[:, anchor], boxes[:, other]) <= 0.7 for other in better):
                better.append(anchor)
                stays.append((float(scores[label, anchor]), label, anchor))
    return sorted(stays, reverse=True)


def overlap(first, second):
    """Intersection over union of two boxes of centre and size."""
    starts = torch.maximum(first[:2] - first[2:] / 2, second[:2] - second[2:] / 2)
    ends = torch.minimum(first[:2] + first[2:] / 2, second[:2] + second[2:] / 2)
    both = (ends - starts).clamp(min=0).prod()
    return both / (first[2:].prod() + second[2:].prod() - both)


def test_detections_are_those_of_a_loop():
    outputs = make_outputs()
    arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
    for index, detection in enumerate(select_detections(arrays)):
        expected = suppress(outputs["boxes"][index], outputs["scores"][index])
        assert detection["labels"].tolist() == [label for _, label, _ in expected]
        assert detection["scores"].tolist() == [score for score, _, _ in expected]
        anchors = [anchor for _, _, anchor in expected]
        boxes = outputs["boxes"][index][:, anchors]
        corners = torch.cat([boxes[:2] - boxes[2:] / 2, boxes[:2] + boxes[2:] / 2]).T
        torch.testing.assert_close(detection["boxes"], corners)


def test_images_without_a_score_have_no_detections():
    outputs = make_outputs()
    outputs["scores"] *= 0
    assert [len(detection["scores"]) for detection in select_detections(outputs)] == [0, 0]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="none is fetched"):
        load_yolo(tmp_path / "yolo11n.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_file_cannot_run_code(tasks, tmp_path):
    payload = Payload()
    payload.folder = str(tmp_path / "made")
    file = tmp_path / "model.pt"
    torch.save({"model": payload}, file)
    with pytest.raises(ModelError, match="cannot be read as a model of ultralytics"):
        load_yolo(file)
    assert not (tmp_path / "made").exists()
    file.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(ModelError, match="cannot be read"):
        load_yolo(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [{"model": torch.nn.Linear(2, 2)}, {"weights": 3}])
def test_another_file_is_refused(tasks, tmp_path, content):
    file = tmp_path / "model.pt"
    torch.save(content, file)
    with pytest.raises(ModelError, match="holds a"):
        load_yolo(file)


def test_a_size_that_the_maps_do_not_divide_is_refused(saved):
    with pytest.raises(ArgumentError, match="must be a multiple of 32") as caught:
        load_yolo(saved[1], 100)
    assert "--image-size 96" in caught.value.fix


def test_without_ultralytics_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", None)
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    with pytest.raises(DependencyError, match="pip install ultralytics"):
        load_yolo(file)


def test_an_ultralytics_that_runs_pickles_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    monkeypatch.setattr(yolo, "import_ultralytics", lambda module: object())
    with pytest.raises(DependencyError, match="upgrade"):
        load_yolo(file)
