"""`qdq ptq --target A B`: each target has what a run for it alone has, from one calibration, also after a kill."""

import json
import shutil
import signal
from pathlib import Path

import onnx
import pytest
import torch

import qdq

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
from safetensors.torch import load_file
from stopped_recipe import Stop, run_recipe

from qdq.cli.targets import choose_targets

RECIPES = Path(__file__).parents[1] / "recipes"
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.first = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 64)

    def forward(self, x):
        x = self.first(x + self.attention(x, x, x, need_weights=False)[0])
        return self.second(self.norm(x).clamp(-2, 2)).mean(1)


def build():
    torch.manual_seed(5)
    return Net().eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(4, 32, 64, generator=generator)
        x[:, 0, 0] = 300.0  # FP8 keeps it beside the others
        yield x
"""
FP8, INT8 = onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT8


@pytest.fixture
def arguments(tmp_path):
    net = tmp_path / "net.py"
    net.write_text(NET)
    options = ["--model", f"{net}:build", "--data", f"{net}:batches", "--formats", "int8,fp8"]
    return [*options, "--calib-batches", "2", "--eval-images", "4"]


def list_types(path):
    """Types of the codes of a file."""
    types = [constant.data_type for constant in onnx.load(path).graph.initializer]
    return {FP8, INT8}.intersection(types)


def assert_same_results(folder, other):
    """The model files have the same bytes, the rest the same numbers."""
    for name in ("model.onnx", "plan.yaml"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("quantized.safetensors", "references.safetensors"):
        tensors, others = load_file(folder / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), name
    reports = [json.loads((path / "report.json").read_text()) for path in (folder, other)]
    for section in ("formats", "analysis", "steps", "evaluation"):
        assert reports[0][section] == reports[1][section], section


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.timeout(300)  # three runs of a tiny network
def test_each_target_is_as_alone_also_after_a_kill(tmp_path, arguments):
    folder = tmp_path / "run"
    several = [*arguments, "--target", "l4", "orin", "--output", folder]
    stop = Stop("orin", 1, signal.SIGKILL)  # l4 is done
    code, errors = run_recipe(RECIPES / "ptq.py", several, tmp_path, stop)
    assert code == -signal.SIGKILL, errors
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert json.loads((folder / "l4" / "run.json").read_text())["status"] == "finished"
    shutil.copytree(folder / "l4", tmp_path / "l4")
    written = (folder / "calibration.safetensors").stat().st_mtime_ns
    code, errors = run_recipe(RECIPES / "ptq.py", several, tmp_path)
    assert code in (0, 1), errors  # 1: so small a network is faster in fp16
    assert (folder / "calibration.safetensors").stat().st_mtime_ns == written
    assert "continues after correct_bias" in (folder / "l4" / "run.log").read_text()
    assert not list(folder.rglob("recovery.safetensors"))

    alone = [*arguments, "--target", "orin", "--output", tmp_path / "orin"]
    code, errors = run_recipe(RECIPES / "ptq.py", alone, tmp_path)
    assert code == 1, errors
    alone_report = json.loads((tmp_path / "orin" / "report.json").read_text())
    warned = {finding["rule"] for finding in alone_report["check"]["findings"]}
    assert "QDQ150" in warned
    for target in ("l4", "orin"):
        assert_same_results(folder / target, tmp_path / target)
    assert list_types(folder / "l4" / "model.onnx") == {FP8, INT8}
    assert list_types(folder / "orin" / "model.onnx") == {INT8}

    table = json.loads((folder / "report.json").read_text())["targets"]
    for entry in table:
        report = json.loads((tmp_path / entry["target"] / "report.json").read_text())
        assert entry["sqnr_db"] == report["summary"]["candidates"]["ONNX"]["sqnr_db"]
        macs = [census["macs"] for census in report["summary"]["census"].values()]
        assert entry["low_macs"] == pytest.approx(sum(macs))
        assert entry["predicted_ms"] > 0
        has_fp16 = report["export"]["precision"] is not None
        assert has_fp16 == (entry["target"] == "l4")  # orin has no FP8
    assert table[0]["sqnr_db"] > table[1]["sqnr_db"] + 3  # the outliers
    text = (folder / "report.txt").read_text()
    assert "orin: rtx" in text and "cannot build for SM 87" in text
    page = (folder / "report.html").read_text()
    assert '<section id="targets"' in page and '<a href="l4/report.html">' in page
    assert '<a href="../report.html">' in (folder / "l4" / "report.html").read_text()


@pytest.mark.trt
@pytest.mark.timeout(120)
def test_fine_tuning_of_both_formats(tmp_path, arguments):
    folder = tmp_path / "run"
    options = ["--target", "l4", "--steps", "2", "--lr", "1e-3", "--output", folder]
    code, errors = run_recipe(RECIPES / "qat.py", [*arguments, *options], tmp_path)
    report = json.loads((folder / "report.json").read_text())
    assert code == 1, errors
    assert "QDQ150" in [finding["rule"] for finding in report["check"]["findings"]]
    assert report["check"]["payoff"]["gpu"] == "l4"  # the target
    formats = {}
    for choice in report["formats"]["choices"]:
        formats |= dict.fromkeys(choice["layers"], choice["format"])
    assert formats["first"] == "fp8" and formats["second"] == "int8"
    assert qdq.load_plan(folder / "plan.yaml").precisions == formats
    assert list_types(folder / "model.onnx") == {FP8, INT8}
    assert report["tuning"]["losses"] and report["check"]["parity"]["sqnr_db"] > 30
    precisions = {layer["name"]: layer["precision"].lower() for layer in report["layers"]}
    assert {name: precisions[name] for name in formats} == formats
    census = report["summary"]["census"]
    assert [census[name]["missing"] for name in ("Int8", "FP8")] == [[], []]


CHOICE = {"sm": None, "device": torch.device("cpu"), "formats": ("int8", "fp8"), "method": "mse"}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("l4", "orin", "l4"), {}, "--target names l4 twice"),
        (("l4", "v100"), {}, "target is 'v100'; known are"),
        (("l4", "orin"), {"sm": 89}, "--target names 2 GPUs, and --sm is for one"),
        (("l4", "orin"), {"gpu": "l4"}, "--target names 2 GPUs, and --gpu is for one"),
        (("l4", "orin"), {"has_profile": True}, "--target names 2 GPUs, and --profile is for one"),
        (("l4", "orin"), {"formats": ("fp8",)}, "--formats is fp8, and SM 87 has no FP8"),
        (("l4",), {"sm": 86}, "--target l4 has SM 89, and --sm is 86"),
        (("l4",), {"gpu": "voodoo2"}, "gpu is 'voodoo2'"),
    ],
)
def test_targets_that_cannot_be_had_are_refused(names, options, message):
    with pytest.raises(qdq.ArgumentError, match=message):
        choose_targets(names, **(CHOICE | options))


def test_targets_that_can_be_had():
    targets = choose_targets(("l4", "orin", "rtx50"), **CHOICE)
    facts = [(target.name, target.sm, target.backend.sm, target.gpu) for target in targets]
    assert facts == [("l4", 89, 89, "l4"), ("orin", 87, 89, "orin"), ("rtx50", 120, 120, None)]
    (alone,) = choose_targets(("orin",), **CHOICE)
    assert (alone.name, alone.sm, alone.gpu) == ("orin", 87, "orin")
    (of_another,) = choose_targets(("orin",), **(CHOICE | {"gpu": "orinnano"}))
    assert (of_another.name, of_another.gpu) == ("orin", "orinnano")
    (named,) = choose_targets((), **(CHOICE | {"sm": 120, "gpu": "l4"}))
    assert (named.name, named.sm, named.backend.sm, named.gpu) == ("", 120, 120, "l4")
