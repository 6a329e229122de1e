"""One whole run of a small network with every kind of layer, and reports that were made up."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq


class Branches(nn.Module):
    """A shortcut, a convolution called as a function, a pooling, a layer that is excluded and one that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(32, 32, 1, 1) / 6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, images):
        x = torch.relu(self.stem(images))
        x = torch.relu(self.conv(x) + x)
        x = torch.relu(F.conv2d(x, self.mix))
        return self.head(torch.relu(self.hidden(self.pool(x).flatten(1))))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run, and what its stages returned."""
    pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from qdq.workloads.classification.batches import ImageBatches
    from qdq.workloads.workload import Workload

    torch.manual_seed(0)
    model = Branches().eval()
    calibration = ImageBatches(torch.randn(8, 3, 12, 12), None, 4, 8, "8 random images", "none")
    images = ImageBatches(
        torch.randn(6, 3, 12, 12), [0, 1, 2, 3, 4, 0], 4, 6, "6 random images", "made up"
    )
    workload = Workload("branches", "random", model, calibration, images, list)
    run = qdq.start_run(tmp_path_factory.mktemp("runs") / "small", settings={"model": "branches"})
    run.stage("everything")
    logits = {"float": qdq.predict(model, images)}
    folded = qdq.fold_batchnorm(model, calibration.images)
    plan = qdq.swap_modules(model, calibration.images, exclude=["head"])
    rewired = qdq.rewire_operations(model, calibration.images)
    ranges = qdq.calibrate_model(
        model, calibration, statistics=run.folder / "calibration.safetensors"
    )
    analysis = qdq.analyze_layers(
        model, calibration, max_float_layers=1, max_float_share=1, pinned={"hidden": "int8"}
    )
    exported = qdq.export_onnx(model, calibration.images, run.folder / "model.onnx")
    logits["ONNX"] = qdq.predict(exported.path, images)
    check = qdq.check_onnx(exported.path)
    build = qdq.build_engine(exported.path, backend="rtx")
    evaluation = qdq.evaluate_outputs(logits, images.labels, files={"float": model})
    stages = {
        "workload": workload,
        "folded": folded,
        "plan": plan,
        "rewired": rewired,
        "ranges": ranges,
        "analysis": analysis,
        "exported": exported,
        "check": check,
        "build": build,
        "evaluation": evaluation,
    }
    qdq.write_report(run, **stages)
    return run.folder, stages


@pytest.fixture
def store(tmp_path):
    """Write a made report into a run folder of its own."""

    def write(report, name="made"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    return write
