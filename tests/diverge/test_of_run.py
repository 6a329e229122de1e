"""`qdq diverge RUN`: the model of a run is made again, with what the accuracy passes changed in it."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from clamped_net import CLAMPED

import qdq
from qdq.check import OnnxModel
from qdq.cli import main as cli
from qdq.diverge.of_run import _list_commands, diverge_run
from qdq.errors import DataError
from qdq.pairs import load_pairs

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False)
    last = [nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 4)]
    return nn.Sequential(first, nn.ReLU(), second, *last).eval()

def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]
"""


def make_run(folder, formats="int8", *, net=NET, center=False):
    """A run as the recipe makes it, without the stages that take long."""
    (folder / "net.py").write_text(net)
    settings = {
        "model": f"{folder}/net.py:build",
        "weights": "DEFAULT",
        "data": f"{folder}/net.py:batches",
        "metric": None,
        "calib_batches": 2,
        "eval_images": 4,
        "batch_size": 4,
        "image_size": None,
        "seed": 0,
        "exclude": [],
        "formats": formats,
        "center": center,
        "output_options": {"outputs": [], "mask": None, "output_weights": []},
    }
    run = qdq.start_run(folder / "run", settings=settings)
    options = {"model": settings["model"], "data": settings["data"]}
    workload = qdq.load_workload(qdq.WorkloadOptions(calib_batches=2, eval_samples=4, **options))
    model, calibration = workload.module, workload.calibration
    names = qdq.parse_formats(formats)
    if center:
        qdq.center_inputs(model, calibration)
    qdq.swap_modules(model, workload.example, formats=names)
    qdq.rewire_operations(model, workload.example, formats=names)
    qdq.calibrate_model(model, calibration, method="max", statistics=run.statistics_file)
    if len(names) > 1:
        statistics = qdq.Statistics.load(run.statistics_file)
        pins = {"2": "fp8", "3": "int8"}
        qdq.choose_formats(model, calibration, statistics, sm=89, method="max", pinned=pins)
    qdq.correct_bias(model, list(calibration))
    assert model[0].bias is not None  # NET has none in float
    onnx = qdq.export_onnx(model, workload.example, run.model_file).path
    qdq.save_references(model, calibration, run.references_file, onnx)
    qdq.save_tuned(model, run.quantized_file)
    run.finish()
    return run.folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("formats", ["fp8", "int8,fp8"])
def test_a_run_with_fp8(formats, tmp_path):
    run = make_run(tmp_path, formats)
    result = diverge_run(run)
    assert result.divergence.first is None
    code_types = {tensor.dtype for tensor in list_code_tensors(run / "model.onnx")}
    assert ir.DataType.FLOAT8E4M3FN in code_types
    assert (ir.DataType.INT8 in code_types) == (formats != "fp8")
    for version in ("10", "11"):
        assert ("--stronglyTyped" in result.trtexec[version]) == (version == "10")


@pytest.mark.parametrize("fault", [None, "weight", "bias"])
def test_a_centered_run(fault, tmp_path):
    """The file has the offset in the bias of the convolution before the clamp, which is no fault."""
    run = make_run(tmp_path, net=CLAMPED, center=True)
    assert "Sub" not in {node.op_type for node in ir.load(run / "model.onnx").graph}
    assert diverge_run(run).divergence.first is None
    if fault is None:
        return
    options = {"model": f"{tmp_path}/net.py:build", "data": f"{tmp_path}/net.py:batches"}
    workload = qdq.load_workload(qdq.WorkloadOptions(calib_batches=2, eval_samples=4, **options))
    model = workload.module
    qdq.center_inputs(model, workload.calibration)
    qdq.swap_modules(model, torch.randn(1, 3, 8, 8))
    qdq.rewire_operations(model, torch.randn(1, 3, 8, 8))
    qdq.load_tuned(model, run / "quantized.safetensors")
    assert "input_offset" in model[2]._buffers
    with torch.no_grad():
        model[0].get_parameter(fault).mul_(1.5)
    qdq.save_tuned(model, run / "quantized.safetensors")
    first = diverge_run(run).divergence.first
    assert first.name in ("0", "2._input_quantizer")


def list_code_tensors(onnx):
    graph = ir.load(onnx).graph
    return [node.inputs[0] for node in graph if node.op_type == "DequantizeLinear"]


def test_a_clean_run(run_folder, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        cli.main(["diverge", str(run_folder), "--samples", "2", "--json", str(tmp_path / "d.json")])
    printed = capsys.readouterr().out
    assert exit.value.code == 0, printed
    assert "on 2 batches: none of" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("TensorRT 10:"))
    assert "--onnx=../model.onnx " in line
    assert " --int8 --fp16 " in line
    assert "trtexec --onnx=../model.fp16.onnx" in printed  # of TensorRT 11
    assert "--loadInputs=input:../inputs/0.0.input.bin" in line
    assert "--markDebug=relu," in line
    assert "--saveAllDebugTensors=numpy" in line
    facts = json.loads((tmp_path / "d.json").read_text())
    assert {row["kind"] for row in facts["tensors"]} == {"quantizer", "layer", "output"}
    assert {row["is_beyond"] for row in facts["tensors"]} == {False}
    assert facts["tensors"][0]["tie_floor_db"] == "inf"
    assert facts["first"] is None


class TwoInputs(torch.nn.Module):
    """Inputs whose alphabetical order is not that of the file."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 16)

    def forward(self, b, a):
        return self.layer(b) + a


@pytest.mark.parametrize(
    ("opset", "precision", "files"),
    [
        (17, "fp32", {"10": "model.onnx", "11": "model.onnx"}),
        (19, "fp32", {"10": "model.onnx", "11": "model.fp16.onnx"}),
        (19, "fp16", {"10": "model.fp16.onnx", "11": "model.fp16.onnx"}),
    ],
)
def test_commands_are_for_the_files_of_the_bundle(opset, precision, files, tmp_path):
    torch.manual_seed(0)
    model, batch = TwoInputs().eval(), {"b": torch.randn(2, 8), "a": torch.randn(2, 16)}
    qdq.swap_modules(model, batch, include="*")
    qdq.calibrate_model(model, [batch], method="max")
    run = tmp_path / "run"
    run.mkdir()
    options = {"opset": opset, "precision": precision}
    onnx = qdq.export_onnx(model, batch, run / "model.onnx", **options).path
    qdq.save_references(model, [batch], run / "references.safetensors", onnx)
    pairs = load_pairs(run / "references.safetensors").pairs
    commands = _list_commands(onnx, OnnxModel(onnx), pairs[:1])
    qdq.make_bundle(run, tmp_path / "bundle")
    for version, flags in commands.items():
        (path,) = (flag.removeprefix("--onnx=") for flag in flags if flag.startswith("--onnx="))
        assert path == f"../{files[version]}"
        assert (tmp_path / "bundle" / path.removeprefix("../")).is_file()
        (loaded,) = (flag for flag in flags if flag.startswith("--loadInputs="))
        for entry in loaded.removeprefix("--loadInputs=").split(","):
            assert (tmp_path / "bundle" / entry.partition(":../")[2]).is_file()


def test_another_weight_is_found(run_folder, tmp_path):
    """The torch model is that of the file with weights and ranges, not that of the settings alone."""
    tuned = run_folder / "quantized.safetensors"
    content = tuned.read_bytes()
    try:
        result = diverge_run(run_folder).divergence
        assert result.first is None
        settings = json.loads((run_folder / "run.json").read_text())["settings"]
        options = qdq.WorkloadOptions(
            model=settings["model"], data=settings["data"], calib_batches=2
        )
        model = qdq.load_workload(options).module
        qdq.swap_modules(model, torch.randn(1, 3, 8, 8))
        qdq.rewire_operations(model, torch.randn(1, 3, 8, 8))
        qdq.load_tuned(model, tuned)
        with torch.no_grad():
            model[0].bias += 0.5
        qdq.save_tuned(model, tuned)
        divergence = diverge_run(run_folder).divergence
        first = divergence.first
        facts = divergence.list_facts()
        assert facts["first"] == "0"
        assert next(row["name"] for row in facts["tensors"] if row["is_beyond"]) == "0"
        assert (first.kind, first.name) == ("layer", "0")
    finally:
        tuned.write_bytes(content)


def test_folders_that_cannot_be_compared(run_folder, tmp_path):
    with pytest.raises(DataError, match="it is no run folder, the run is not finished"):
        diverge_run(tmp_path)
    for name in ("model.onnx", "quantized.safetensors"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"model": "x"}}))
    with pytest.raises(DataError, match="lack 'weights': it is not a run of `qdq ptq`"):
        diverge_run(tmp_path)


def test_dumps_need_the_samples_of_the_target(run_folder, tmp_path):
    for path in run_folder.iterdir():
        if path.suffix != ".log":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = diverge_run(run_folder)
    (tmp_path / "dumps").mkdir()
    np.save(tmp_path / "dumps" / "0000_relu.npy", np.zeros((1, 16, 6, 6), np.float16))
    first = diverge_run(tmp_path, dumps=tmp_path / "dumps").divergence.first
    assert model.divergence.first is None
    assert first.tensor == "relu"
    state = json.loads((tmp_path / "run.json").read_text())
    other = tmp_path / "other.py"
    other.write_text(NET.replace("manual_seed(1)", "manual_seed(2)"))
    state["settings"]["data"] = f"{other}:batches"
    (tmp_path / "run.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="the first sample is not that of"):
        diverge_run(tmp_path, dumps=tmp_path / "dumps")
