"""Detectors of torchvision: their weights, classes and detections, and the whole workload on generated pictures."""

from dataclasses import replace

import pytest
import torch

from qdq import WorkloadOptions, predict
from qdq.errors import ArgumentError, ModelError

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")

from qdq.workloads import detection
from qdq.workloads.detection import load_detector
from qdq.workloads.detection.torchvision_detectors import (
    build_detector,
    load_torchvision_detector,
)

SSDLITE = "ssdlite320_mobilenet_v3_large"
NAMES = ("cat", "dog", "cow")
SIZE = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector of 4 classes with the background, and the file of its weights."""
    detector = build_detector(SSDLITE, 4, SIZE, seed=3)
    file = tmp_path_factory.mktemp("weights") / "ssdlite.pth"
    torch.save(detector.state_dict(), file)
    return detector, file


def test_a_checkpoint_gives_the_detections_of_its_detector(checkpoint):
    detector, file = checkpoint
    loaded = load_torchvision_detector(SSDLITE, NAMES, str(file), SIZE)
    assert loaded.categories == ("__background__", *NAMES)
    assert (loaded.size, loaded.weights) == (SIZE, f"checkpoint {file}")
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = detector(list(images))
    outputs = predict(loaded.module, [loaded.prepare(images)])
    for detections, rows in zip(loaded.detect(outputs, images), expected, strict=True):
        assert len(rows["scores"]) > 0
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(detections[key], rows[key])


def test_another_number_of_classes_is_refused(checkpoint):
    with pytest.raises(
        ModelError, match="has 4 classes with the background, and the data set has 3"
    ):
        load_torchvision_detector(SSDLITE, NAMES[:2], str(checkpoint[1]), SIZE)


def test_a_checkpoint_of_the_published_classes_has_their_names(tmp_path):
    file = tmp_path / "coco.pth"
    torch.save(build_detector(SSDLITE, 91, SIZE).state_dict(), file)
    loaded = load_torchvision_detector(SSDLITE, NAMES, str(file), SIZE)
    assert len(loaded.categories) == 91
    assert loaded.categories[17:19] == ("cat", "dog")


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("ssdlite320_mobilenet_v3", "random", "did you mean ssdlite320_mobilenet_v3_large"),
        ("resnet50", "random", "expected a detector of torchvision"),
        (SSDLITE, "nothing", "unknown weights 'nothing'"),
        (SSDLITE, "nothing.pth", "there is no checkpoint nothing.pth"),
    ],
)
def test_unknown_names_are_refused(model, weights, message):
    with pytest.raises(ModelError, match=message):
        load_torchvision_detector(model, NAMES, weights, SIZE)


def test_a_tiny_size_is_refused():
    with pytest.raises(ArgumentError, match="detectors need 64"):
        build_detector(SSDLITE, 4, 32)


def test_a_workload_calibrates_and_evaluates_on_other_pictures(checkpoint):
    options = WorkloadOptions(
        SSDLITE, str(checkpoint[1]), calib_batches=2, eval_samples=5, batch_size=2, image_size=SIZE
    )
    workload = load_detector(options)
    calibration, evaluation = list(workload.calibration), list(workload.evaluation)
    assert [len(batch) for batch in calibration] == [2, 2]
    assert [len(batch) for batch in evaluation] == [2, 2, 1]
    assert evaluation[0].shape == (2, 3, SIZE, SIZE)
    assert workload.num_held_out == 2
    training, fitted, held_out = workload.split_training()
    indices = [*held_out.pictures.indices, *fitted.pictures.indices]
    assert indices == [*workload.calibration.pictures.indices]
    assert training.num_samples == 1998
    assert not {*training.pictures.indices} & {*held_out.pictures.indices}
    for image in torch.cat(calibration):
        assert not any(torch.equal(image, other) for other in torch.cat(evaluation))

    assert len(workload.example) == 2
    assert workload.calibration.subset(3).num_samples == 3
    figures = workload.measure(workload.module)
    assert set(figures) == {"mAP", "mAP50"}
    assert 0 <= figures["mAP"] <= figures["mAP50"] < 0.2  # random weights


def test_perfect_outputs_have_a_perfect_score(monkeypatch, checkpoint):
    """`score` compares with the objects of the images that it hands to `predict`."""
    options = WorkloadOptions(
        SSDLITE, "random", calib_batches=1, eval_samples=3, batch_size=2, image_size=SIZE
    )
    workload = load_detector(options)
    pictures = workload.evaluation.pictures
    answers = iter([target for _, targets in pictures for target in targets])

    def detect(outputs, images):
        rows = [next(answers) for _ in images]
        return [
            {"boxes": row.boxes, "labels": row.labels + 1, "scores": torch.ones(len(row.labels))}
            for row in rows
        ]

    perfect = detection.make_score(
        replace(workload.evaluation.detector, detect=detect), pictures, detection.SHAPE_NAMES
    )
    assert perfect(lambda inputs: {}) == pytest.approx({"mAP": 1.0, "mAP50": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "yolo/model.pt", "weights": "x.pt"}, "has its own"),
        ({"calib_batches": 0}, "calib_batches x batch_size is 0"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        ({"metric": "net.py:score"}, "is measured by mAP"),
        ({"image_size": 0}, "image_size is 0 pixels"),
        ({"image_size": 32}, "detectors need 64"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        load_detector(WorkloadOptions(**{"model": SSDLITE, "weights": "random", **options}))
