"""`qdq ptq` and `qdq eval` on a GPU: option --device reaches every stage."""

import json

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
from PIL import Image

import qdq
import qdq.device
from qdq.cli.main import main

MODEL = ["--model", "squeezenet1_1", "--weights", "random", "--batch-size", "2"]


@pytest.fixture
def pictures(tmp_path):
    """Eight random images of two classes."""
    folder = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for index in range(8):
        path = folder / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def device_names(monkeypatch, gpu):
    """What each command passes to `choose_device`; every name but cpu gives the GPU of the tests."""
    names = []
    choose_device = qdq.choose_device

    def choose(name=None):
        names.append(name)
        return choose_device("cpu") if name == "cpu" else gpu

    monkeypatch.setattr(qdq, "choose_device", choose)
    monkeypatch.setattr(qdq.device, "choose_device", choose)
    return names


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code in (None, 0, 1)  # 1: a finding of the check


@pytest.mark.trt
def test_quantized_on_the_gpu_and_measured_on_both(tmp_path, pictures, device_names, gpu):
    folder = tmp_path / "run"
    data = ["--data-dir", pictures, "--eval-images", 4]
    analysis = ["--calib-batches", 1, "--analysis-images", 2, "--max-float-layers", 1]
    run("ptq", *MODEL, *data, *analysis, "--device", "cuda:0", "--output", folder, "-q")
    assert qdq.describe_device(gpu) in (folder / "run.json").read_text()

    evaluations = {}
    for device in ("cuda:0", "cpu"):
        figures = tmp_path / f"{device}.json"
        run(
            "eval",
            folder / "model.onnx",
            *MODEL,
            *data,
            "--device",
            device,
            "--json",
            figures,
            "-q",
        )
        evaluations[device] = json.loads(figures.read_text())
    assert device_names == ["cuda:0", "cuda:0", "cpu"]
    assert evaluations["cuda:0"]["device"] == qdq.describe_device(gpu)
    assert evaluations["cpu"]["device"] == "cpu"
    sqnr = [evaluation["candidates"][1]["sqnr_db"] for evaluation in evaluations.values()]
    assert sqnr[0] == pytest.approx(sqnr[1], abs=0.1)
    assert sqnr[0] > 10
