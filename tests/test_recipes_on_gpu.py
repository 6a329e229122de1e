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
def test_quantized_on_the_gpu_and_on_the_cpu(tmp_path, pictures, device_names, gpu):
    data = ["--data-dir", pictures, "--calib-batches", 1, "--eval-images", 4]
    analysis = ["--analysis-images", 2, "--max-float-layers", 1]
    for device in ("cuda:0", "cpu"):
        folder = tmp_path / device
        run("ptq", *MODEL, *data, *analysis, "--device", device, "--output", folder, "-q")
    assert device_names == ["cuda:0", "cpu"]
    on_gpu, on_cpu = tmp_path / "cuda:0", tmp_path / "cpu"
    assert qdq.describe_device(gpu) in (on_gpu / "run.json").read_text()
    assert (on_gpu / "plan.yaml").read_text() == (on_cpu / "plan.yaml").read_text()
    assert (on_gpu / "model.onnx").read_bytes() == (on_cpu / "model.onnx").read_bytes()

    figures = tmp_path / "figures.json"
    evaluated = ["--data-dir", pictures, "--eval-images", 4, "--json", figures]
    run("eval", on_gpu / "model.onnx", *MODEL, *evaluated, "--device", "cuda:0", "-q")
    assert json.loads(figures.read_text())["device"] == qdq.describe_device(gpu)
