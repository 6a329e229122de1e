"""Networks, batches and metrics from files of the user, and the files that cannot be used."""

import json
import sys

import numpy as np
import pytest
import torch

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    ModelError,
    WorkloadOptions,
    load_workload,
)
from qdq.cli.main import main

GOOD = """
import torch
from torch import nn
from helper_of_net import WIDTH
import qdq

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3)
        self.mid = nn.Conv2d(WIDTH, WIDTH, 3)
        self.boxes = nn.Conv2d(WIDTH, 4, 1)
        self.scores = nn.Conv2d(WIDTH, 5, 1)

    def forward(self, image):
        y = torch.relu(self.mid(torch.relu(self.stem(image))))
        return {"boxes": 100 * self.boxes(y), "scores": self.scores(y)}

class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def build():
    return Net()

def batches():
    for index in range(5):
        yield qdq.Labelled({"image": torch.randn(2, 3, 12, 12)}, torch.tensor([index, 0]))

def pairs():
    return [(torch.full((2, 3, 12, 12), float(index)), torch.tensor([index % 4, 1])) for index in range(5)]

def score(predict):
    image = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)
    named = predict({"image": image})
    return {"largest box": named["boxes"].max(), "mean score": torch.from_numpy(named["scores"]).mean()}

def correct(predict):
    return predict(torch.ones(2, 3, 12, 12)).max()
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(GOOD)
    (tmp_path / "helper_of_net.py").write_text("WIDTH = 32\n")
    yield tmp_path / "net.py"
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    sys.modules.pop("helper_of_net", None)


def load(model="net.py:build", data="net.py:batches", **options):
    return load_workload(WorkloadOptions(model=model, data=data, **options))


def test_first_batches_calibrate_and_the_others_evaluate(net):
    workload = load(metric="net.py:score", calib_batches=2, eval_samples=5)
    assert [len(batch.inputs["image"]) for batch in workload.calibration] == [2, 2]
    assert [len(batch.inputs["image"]) for batch in workload.evaluation] == [2, 2, 1]
    images = [batch.inputs["image"] for batch in (*workload.calibration, *workload.evaluation)]
    assert len({float(image[0, 0, 0, 0]) for image in images}) == 5
    assert workload.evaluation.labels is None  # of two outputs, none is known to hold the classes
    assert len(workload.example.inputs["image"]) == 2
    assert not workload.module.training
    scores = workload.measure(workload.module)
    with torch.no_grad():
        named = workload.module(torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12))
    assert scores["largest box"] == pytest.approx(float(named["boxes"].max()))
    assert scores["mean score"] == pytest.approx(float(named["scores"].mean()), abs=1e-6)
    same = load(calib_batches=2)
    torch.testing.assert_close(same.module.state_dict(), workload.module.state_dict())
    assert same.num_held_out == 2
    (held_out,) = same.calibration.subset(2)
    (trained,) = same.load_training().without_first(2)
    (half,) = same.load_training().without_first(3)
    assert not torch.equal(held_out.inputs["image"], trained.inputs["image"])
    assert torch.equal(half.inputs["image"], trained.inputs["image"][1:])


def test_labels_of_a_classifier_are_its_classes(net):
    workload = load("net.py:Classifier", "net.py:pairs", calib_batches=3, metric="net.py:correct")
    assert workload.calibration.labels == [0, 1, 1, 1, 2, 1]
    assert workload.evaluation.labels == [3, 1, 0, 1]
    assert list(workload.measure(workload.module)) == ["correct"]


@pytest.mark.parametrize(
    ("options", "kind", "message", "fix"),
    [
        ({"data": None}, ArgumentError, "needs data of its own", "--data FILE.py:FUNCTION"),
        ({"weights": "x.pth"}, ArgumentError, "builds its own weights", "leave --weights out"),
        ({"image_size": 96}, ArgumentError, "batches of net.py:build come as they are", "--data"),
        ({"data": "net.py"}, ArgumentError, "--data is 'net.py'; expected FILE", "net.py:data"),
        ({"model": "absent.py:build"}, ArgumentError, "there is no file absent.py", "relative"),
        ({"metric": "net.py:nothing"}, ArgumentError, "no function nothing", "name one of Net"),
        ({"metric": "empty.py:f"}, ArgumentError, "no function f", "define f in it"),
        ({"model": "broken.py:f"}, ArgumentError, r"ValueError: of the user \(broken.py, line 2\)", "-v"),
        ({"model": "exits.py:f"}, ArgumentError, "SystemExit: 0", "-v"),
        ({"model": "syntax.py:f"}, ArgumentError, "SyntaxError", "-v"),
        ({"model": "bad.py:fails"}, ModelError, r"KeyError: 'weights' \(bad.py, line 3\)", "-v"),
        ({"model": "bad.py:number"}, ModelError, "returns a int; expected a torch module", "network"),
        ({"model": "bad.py:scripted"}, ArgumentTypeError, "scripted .TorchScript.", "Python module"),
        ({"model": "bad.py:narrow", "calib_batches": 1}, ModelError, "fails on the first sample of net.py", "-v"),
        ({"data": "bad.py:fails"}, DataError, r"bad.py:fails fails: KeyError", "-v"),
        ({"data": "bad.py:number"}, Exception, "batches is of type int", "list of batches"),
        ({"data": "bad.py:nothing"}, DataError, "returns 0 batches", "return more batches"),
        ({"calib_batches": 5}, DataError, "returns 5 batches, and all of them", "--calib-batches"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(net, options, kind, message, fix):
    folder = net.parent
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("x = 1\nraise ValueError('of the user')\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "bad.py").write_text(
        "import torch\ndef fails():\n    return {}['weights']\ndef number():\n    return 3\n"
        "def nothing():\n    return []\n"
        "class Narrow(torch.nn.Module):\n    def forward(self, image):\n        return image @ torch.ones(3, 3)\n"
        "def narrow():\n    return Narrow()\ndef scripted():\n    return torch.jit.script(torch.nn.ReLU())\n"
    )
    with pytest.raises(kind, match=message) as caught:
        load(**options)
    assert fix in caught.value.fix


def test_a_metric_that_is_no_number_is_refused(net):
    (net.parent / "scores.py").write_text(
        "import torch\ndef text(predict):\n    return 'good'\n"
        "def nan(predict):\n    return {'mAP': float('nan')}\n"
        "def several(predict):\n    return torch.zeros(2)\n"
        "def fails(predict):\n    return {}['boxes']\n"
    )
    workload = load(metric="scores.py:several", calib_batches=1)
    with pytest.raises(DataError, match="the metric several is of type Tensor"):
        workload.measure(workload.module)
    workload = load(metric="scores.py:fails", calib_batches=1)
    with pytest.raises(DataError, match=r"fails: KeyError: 'boxes' \(scores.py, line 9\)"):
        workload.measure(workload.module)
    workload = load(metric="scores.py:text", calib_batches=1)
    with pytest.raises(DataError, match="the metric text is of type str"):
        workload.measure(workload.module)
    workload = load(metric="scores.py:nan", calib_batches=1)
    with pytest.raises(DataError, match="the metric mAP is not a number"):
        workload.measure(workload.module)


@pytest.mark.trt
def test_own_network_from_the_command_line(net, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    own = ["--model", "net.py:build", "--data", "net.py:batches", "--metric", "net.py:score"]
    own += ["--calib-batches", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["ptq", *own, "--output", "run"])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    report = json.loads((net.parent / "run" / "report.json").read_text())
    assert report["model"] == "net.py:build, as net.py:build builds it"
    candidates = report["evaluation"]["candidates"]
    assert [candidate["name"] for candidate in candidates] == ["float", "all int8", "mixed", "ONNX"]
    assert all(
        set(candidate["scores"]) == {"largest box", "mean score"} for candidate in candidates
    )
    assert [output["name"] for output in candidates[-1]["outputs"]] == ["boxes", "scores"]
    assert "largest box" in (net.parent / "run" / "report.html").read_text()
    assert report["summary"]["census_missing_int8"] == []
    assert {layer["module"] for layer in report["build"]["layers"] if not layer["int8"]} == {
        "boxes",
        "scores",
    }

    with pytest.raises(SystemExit) as ended:
        main(["eval", "run/model.onnx", *own, "--outputs", "scores", "--json", "eval.json"])
    assert ended.value.code == 0
    evaluated = json.loads((net.parent / "eval.json").read_text())["candidates"]
    assert evaluated[1]["scores"] == pytest.approx(candidates[-1]["scores"])
    scores = candidates[-1]["outputs"][1]["sqnr_db"]
    np.testing.assert_allclose(evaluated[1]["sqnr_db"], scores, rtol=1e-6)
    with pytest.raises(SystemExit) as ended:
        main(["eval", *own, "--json", "net.py"])
    assert ended.value.code == 2
    assert net.read_text() == GOOD
    with pytest.raises(SystemExit) as ended:
        main(["gate", "run", "--min-score", "mean score=-9", "--min-sqnr", "scores=20"])
    assert ended.value.code == 0
