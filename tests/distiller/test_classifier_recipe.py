"""The classifier sample as a person runs it, on a small network and small images: its lines, its files, its engine."""

import logging
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from golden import read_cases
from torch import nn

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
from PIL import Image

from qdq.cli.main import run_command
from qdq.cli.recipes import load_recipe
from qdq.distiller import PostTrainLinearQuantizer, collect_quant_stats, read_statistics
from qdq.distiller.post_training.torch_int8 import clamps_sums
from qdq.workloads.classification.models import LoadedModel, Preprocess

recipe = load_recipe("compress_classifier")
CLASSES = 16
LINES = [case["format"] for case in read_cases("distiller_logs_files") if case["kind"] == "line"]
[FULL_FLOW] = [
    case["format"]
    for case in read_cases("distiller_logs_files")
    if case["kind"] == "regex of the full flow tests"
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, images):
        x = self.relu(self.norm(self.stem(images)))
        x = torch.relu(self.conv(x) + x)
        return self.fc(x.mean((2, 3)))


def load_small(arch, pretrained, checkpoint, seed):
    """In the place of torchvision's networks."""
    torch.manual_seed(seed)
    preprocess = Preprocess(16, 16, (0.5,) * 3, (0.25,) * 3)
    return LoadedModel(arch, Net().eval(), "trained", preprocess, CLASSES, None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """32 images to train on and 16 to test on, each class with a colour of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 16)):
        for index in range(count):
            label = index % CLASSES
            colour = np.array([label % 4, label // 4, 2]) * 50
            pixels = random.integers(0, 50, (20, 20, 3)) + colour
            path = folder / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, pictures):
    """Runs the recipe in an empty folder; returns its lines and the folder of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "load_classifier", load_small)

    def start(*arguments, code=0, data=pictures):
        argv = ["compress_classifier.py", *([str(data)] if data else []), "-b", "6", "-p", "2"]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(recipe.compress_classifier)
        captured = capsys.readouterr()
        assert exit.value.code == code, captured.err + captured.out[-3000:]
        lines = [line for line in captured.out.splitlines() if not line.startswith("TF32 is off")]
        return lines, Path(lines[0].removeprefix("Log file for this run: ")).parent

    return start


def as_pattern(line):
    """A format string of the source as a regular expression."""
    pattern = re.escape(line.replace("\\n", "").replace("\\t", "\t"))
    pattern = re.sub(r"%\\\.3f", r"\\d+\\.\\d{3}", pattern)
    return re.sub(r"%d|%s|<path>|<\w+>", r"\\S+", pattern)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def top1(lines):
    """As the scripts of users find it."""
    return [match["top1"] for match in map(re.compile(FULL_FLOW).search, lines) if match]


def test_calibration_alone_collects_and_saves(run):
    lines, folder = run("--qe-calibration", "0.5", "-n", "calibration", "-o", "runs")
    assert re.fullmatch(r"calibration___\d{4}\.\d\d\.\d\d-\d{6}", folder.name)
    assert folder.parent == Path("runs").resolve()
    assert lines[1:] == [
        "Collecting quantization calibration stats based on 50.0% of calibration dataset",
        "Pass 1: Collecting min, max, avg_min, avg_max, mean",
        "Pass 2: Collecting b, std parameters",
        f"Stats saved to runs/{folder.name}/acts_quantization_stats.yaml",
    ]
    assert files_of(folder) == ["acts_quantization_stats.yaml", f"{folder.name}.log"]
    logged = (folder / f"{folder.name}.log").read_text().splitlines()
    assert [line for line in logged if not line.startswith("TF32 is off")] == lines
    statistics = read_statistics(folder / "acts_quantization_stats.yaml")
    assert statistics["stem"].inputs[0].shape == "(6, 3, 16, 16)"
    assert statistics["stem"].inputs[0].total_numel == 8 * 3 * 16 * 16  # half of 16 images


@pytest.mark.trt
def test_quantize_evaluate_and_build(run):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    lines, folder = run(
        *[
            "--evaluate",
            "--quantize-eval",
            "--qe-per-channel",
            "--qe-calibration",
            "0.5",
            "--export-onnx",
            "m.onnx",
        ]
    )
    quantized = lines[: lines.index("3 of 3 layers in int8, 3 of them exactly")]
    for line in (
        r"Dataset sizes:",
        r"\ttest=16",
        as_pattern("Preparing model for quantization using PostTrainLinearQuantizer"),
        as_pattern("Updated stats saved to <path>"),
        as_pattern("Per-layer quantization parameters saved to <path>"),
        as_pattern("--- test ---------------------"),
        r"16 samples \(6 per mini-batch\)",
        r"Test: \[    2/    2\]    Loss \d\.\d{6}    Top1 \d+\.\d{6}    Top5 \d+\.\d{6}",
        as_pattern("==> Top1: %.3f    Top5: %.3f    Loss: %.3f\\n"),
        as_pattern("Saving checkpoint to: %s"),
    ):
        position = next(i for i, text in enumerate(quantized) if re.fullmatch(line, text))
        quantized = quantized[position + 1 :]
    assert quantized == []
    assert files_of(folder) == [
        f"{folder.name}.log",
        "acts_quantization_stats.yaml",
        "layer_quant_params.yaml",
        "quant_stats_after_prepare_model.yaml",
        "quantized_checkpoint.pth.tar",
    ]
    content = torch.load(folder / "quantized_checkpoint.pth.tar", weights_only=True)
    assert content["arch"] == "resnet18"
    assert f"{content['extras']['quantized_top1']:.3f}" == top1(lines)[0]
    settings = yaml.safe_load((folder / "layer_quant_params.yaml").read_text())
    assert settings["stem"]["per_channel_wts"] is True
    assert len(settings["linear_quant_params"]["stem.w_scale"]) == 16

    assert "int8: 3 of 3 expected" in lines
    assert any("its output is not rounded" in line for line in lines)
    assert onnx.load("m.onnx").graph.node
    assert Path("m.rtx.engine").stat().st_size > 0
    resumed, _ = run("-e", "--resume-from", folder / "quantized_checkpoint.pth.tar")
    assert top1(resumed) == top1(lines)


@pytest.mark.trt
def test_a_zero_point_is_converted_on_request(run):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    arguments = [
        "-e",
        "--qe",
        "--qem",
        "asym_u",
        "--qepc",
        "--qe-calibration",
        "1",
        "--export-onnx",
        "m.onnx",
    ]
    lines, _ = run(*arguments, "--export-convert")
    assert "3 of 3 layers in int8, 0 of them exactly" in lines
    assert any("have zero point" in line and "dB after" in line for line in lines)
    assert "int8: 3 of 3 expected" in lines


def test_what_int8_does_not_have_is_refused(run):
    """What the options do not show, the export refuses."""
    _, folder = run("-e", "--qe", "--qeba", "9", "--qe-calibration", "1")
    checkpoint = folder / "quantized_checkpoint.pth.tar"
    with pytest.raises(AssertionError, match="not for TensorRT int8") as error:
        run("-e", "--resume-from", checkpoint, "--export-onnx", "m.onnx")
    assert "conv: range-linear SYMMETRIC inputs" in str(error.value)
    with pytest.raises(AssertionError, match="the model is quantized: stem is a Range"):
        run("--resume-from", checkpoint, "--qe-calibration", "1")
    assert not Path("m.onnx").exists()
    assert list(Path("logs").glob("*/quantized_checkpoint.pth.tar"))


def test_sources_of_ranges(run):
    _, folder = run("--qe-calibration", "1")
    statistics = folder / "acts_quantization_stats.yaml"
    from_file, second = run("-e", "--qe", "--qe-stats-file", statistics)
    assert f"Loading activation stats from: {statistics}" in from_file
    assert "acts_quantization_stats.yaml" not in files_of(second)

    Path("config.yaml").write_text(f"""\
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    bits_activations: 8
    bits_parameters: 8
    mode: SYMMETRIC
    model_activation_stats: {statistics}
    overrides:
      fc: {{bits_weights: 4}}
""")
    _, third = run("-e", "--qe", "--qe-config-file", "config.yaml")
    settings = yaml.safe_load((third / "layer_quant_params.yaml").read_text())
    assert [settings[name]["bits_weights"] for name in ("conv", "fc")] == [8, 4]

    _, fourth = run(*["-e", "--qe", "--qe-dynamic", "--qenql", "conv"])
    settings = yaml.safe_load((fourth / "layer_quant_params.yaml").read_text())
    assert "conv" not in settings and "stem" in settings
    assert "quant_stats_after_prepare_model.yaml" not in files_of(fourth)

    lines, _ = run("-e", "--qe")
    assert any("based on 5.0% of calibration dataset" in line for line in lines)


def test_options_reach_the_layers(run):
    _, folder = run(
        *[
            "-e",
            "--qe",
            "--qema",
            "asym_u",
            "--qemw",
            "sym_restr",
            "--qeba",
            "6",
            "--qebw",
            "5",
            "--qeca",
            "n_std",
            "--qe-clip-n-stds",
            "2",
        ],
        *["--qencl", "conv", "fc", "--qenql", "fc", "--qesab", "7", "--qe-save-fp-weights"],
    )
    settings = yaml.safe_load((folder / "layer_quant_params.yaml").read_text())
    stem = settings["stem"]
    assert stem["mode"] == {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC_RESTRICTED"}
    assert (stem["bits_activations"], stem["bits_weights"]) == (6, 5)
    assert (stem["clip_acts"], stem["clip_n_stds"]) == ("N_STD", 2)
    assert stem["scale_approx_mult_bits"] == 7
    assert settings["conv"]["clip_acts"] == "NONE"
    assert "fc" not in settings
    content = torch.load(folder / "quantized_checkpoint.pth.tar", weights_only=True)
    assert "stem.float_weight" in content["state_dict"]


def test_a_quantized_model_is_not_quantized_again(run, capsys):
    _, folder = run("-e", "--qe", "--qe-calibration", "1")
    checkpoint = folder / "quantized_checkpoint.pth.tar"
    with pytest.raises(AssertionError, match="already, by PostTrainLinearQuantizer"):
        run("-e", "--qe", "--resume-from", checkpoint)
    with pytest.raises(AssertionError, match="is of resnet18, and --arch is vgg16"):
        run("-e", "-a", "vgg16", "--resume-from", checkpoint)


def test_the_int8_modules_of_torch(run, caplog):
    emulated, _ = run(*["-e", "--qe", "--qe-calibration", "1"])
    for backend in torch.backends.quantized.supported_engines:
        if backend in ("fbgemm", "qnnpack"):
            caplog.clear()
            lines, _ = run(
                *["-e", "--qe", "--qe-calibration", "1", "--qept", "--qe-pytorch-backend"], backend
            )
            is_clamping = "adds products in 16 bits" in caplog.text
            assert is_clamping == clamps_sums(backend)
            assert is_clamping or top1(lines) == top1(emulated)


def test_lapq(run):
    pytest.importorskip("scipy")
    arguments = [
        "-e",
        "--qe",
        "--qe-calibration",
        "1",
        "--qe-lapq",
        "--lapq-maxfev",
        "25",
        "--qebw",
        "3",
        "--qeba",
        "3",
    ]
    lines, folder = run(*arguments)
    assert lines.count("Preparing model for quantization using PostTrainLinearQuantizer") == 1
    assert 'Using "Powell" minimization algorithm.' in lines
    assert len(top1(lines)) == 2  # before and after the search
    assert sum("LAPQ searches on 100.0% of the test images" in line for line in lines) == 1
    assert "Optimization done" in lines
    content = torch.load(folder / "quantized_checkpoint.pth.tar", weights_only=True)
    assert f"{content['extras']['quantized_top1']:.3f}" == top1(lines)[-1]
    journal = Path("logs/lapq_journal.jsonl").read_text()
    again, _ = run(*arguments)
    assert Path("logs/lapq_journal.jsonl").read_text() == journal
    assert top1(again) == top1(lines)
    resumed, _ = run("-e", "--resume-from", folder / "quantized_checkpoint.pth.tar")
    assert top1(resumed) == top1(lines)[-1:]


@pytest.mark.parametrize("convert", [False, True])
def test_what_the_export_refuses_is_said_before_the_evaluation(convert, caplog):
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(2, 3, 16, 16)
    model.conv.weight.data += 0.05  # off the middle, so that there is a zero point
    statistics = collect_quant_stats(model, [images])
    overrides = OrderedDict(
        conv={"mode": {"activations": "SYMMETRIC", "weights": "ASYMMETRIC_SIGNED"}}
    )
    quantizer = PostTrainLinearQuantizer(
        model, overrides=overrides, model_activation_stats=statistics
    )
    quantizer.prepare_model(images)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="qdq"):
        recipe.warn_of_refusal(quantizer.model, convert)
    assert len(caplog.messages) == (0 if convert else 2)
    if not convert:
        assert "will be refused" in caplog.messages[0] and "conv: " in caplog.messages[0]
        assert "zero point" in caplog.messages[0] and "--export-convert" in caplog.messages[1]
    quantizer.model(images)  # it is as it was


def test_float_checkpoints_and_folders(run):
    torch.save({"state_dict": Net().state_dict()}, "float.pth")
    lines, _ = run("-e", "--qe", "--resume-from", "float.pth")
    assert "Preparing model for quantization using PostTrainLinearQuantizer" in lines
    Path("train.yaml").write_text(TRAINING)
    _, folder = run("--compress", "train.yaml", "--epochs", "2", "--resume-from", "float.pth")
    assert (folder / "training").is_dir()
    with pytest.raises(AssertionError, match="is a folder; expected a checkpoint"):
        run("-e", "--resume-from", folder)


def test_histograms(run):
    _, folder = run("--act-hist", "0.5")
    assert {"acts_histograms.safetensors", "acts_quantization_stats.yaml"} <= set(files_of(folder))


TRAINING = """\
version: 1
quantizers:
  train:
    class: QuantAwareTrainRangeLinearQuantizer
    bits_activations: 8
    bits_weights: 8
    bits_bias: 32
    mode: SYMMETRIC
    ema_decay: 0.9
    freeze_bn_delay: 2
    per_channel_wts: True
lr_schedulers:
  decay: {class: ExponentialLR, gamma: 0.9}
policies:
  - quantizer: {instance_name: train}
    starting_epoch: 1
    ending_epoch: 100
    frequency: 1
  - lr_scheduler: {instance_name: decay}
    starting_epoch: 0
    ending_epoch: 100
    frequency: 1
"""


@pytest.mark.trt
def test_training_with_a_teacher_and_its_engine(run):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    Path("train.yaml").write_text(TRAINING)
    arguments = [
        "--compress",
        "train.yaml",
        "--epochs",
        "3",
        "--lr",
        "0.05",
        "--vs",
        "0.25",
        "--kd-teacher",
        "small",
    ]
    arguments += ["--kd-start-epoch", "2", "--kd-temp", "2"]
    lines, folder = run(*arguments, "--export-onnx", "m.onnx")
    assert lines[lines.index("Dataset sizes:") + 1 :][:3] == [
        "\ttraining=24",
        "\tvalidation=8",
        "\ttest=16",
    ]
    epochs = [line for line in lines if line.startswith("Epoch: ")]
    assert len(epochs) == 6
    for number, line in enumerate(epochs[::2]):
        assert re.fullmatch(
            rf"Epoch: \[{number}\]\[    2/    4\]    Loss \d\.\d{{6}}    Top1 \d+\.\d{{6}}    Top5 \d+\.\d{{6}}",
            line,
        )
    for number in range(3):
        assert f"--- validate (epoch={number})-----------" in lines
    saved = next(line for line in lines if line.startswith("Saving checkpoint to: "))
    assert saved.endswith("/checkpoint.pth.tar")
    assert "int8: 3 of 3 expected" in lines

    content = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    assert content["epoch"] == 3
    resumed, _ = run("-e", "--resume-from", folder / "checkpoint.pth.tar")
    assert top1(resumed) == top1(lines)[-1:]
    # A finished training is read back from its folder.
    again, _ = run(*arguments, "--resume-from", folder)
    assert top1(again)[-1:] == top1(resumed)
    assert not [line for line in again if line.startswith("Epoch: ")]


def test_a_stopped_training_continues(run, monkeypatch):
    Path("train.yaml").write_text(TRAINING)
    arguments = ["--compress", "train.yaml", "--epochs", "3", "--lr", "0.05", "--vs", "0.25"]
    _, whole = run(*arguments)
    evaluate = recipe.evaluate

    def stop(model, images, print_freq, title=""):
        if "epoch=1" in title:
            raise KeyboardInterrupt
        return evaluate(model, images, print_freq, title)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "evaluate", stop)
        _, stopped = run(*arguments, code=130)
    lines, continued = run(*arguments, "--resume-from", stopped)
    assert not [line for line in lines if line.startswith("Epoch: [0]")]
    states = []
    for folder in (whole, continued):
        content = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
        states.append(content["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_training_needs_labels_and_a_quantizer(run):
    Path("train.yaml").write_text(TRAINING)
    with pytest.raises(AssertionError, match="the packaged photographs to train on have no labels"):
        run("--compress", "train.yaml", data=None)
    text = TRAINING.replace("quantizer: {", "lr_scheduler: {")
    Path("float.yaml").write_text(text.replace("name: train", "name: decay"))
    with pytest.raises(AssertionError, match=r"float\.yaml"):
        run("--compress", "float.yaml")


@pytest.mark.gpu
def test_on_a_gpu(run, monkeypatch, gpu):
    """The numbers are those of the CPU; what is saved there is evaluated there."""
    chosen = []

    def choose(name=None):
        chosen.append(name)
        return gpu

    lines, _ = run("-e", "--qe", "--qe-calibration", "1", "--cpu")
    with monkeypatch.context() as patch:
        patch.setattr(recipe.qdq, "choose_device", choose)
        on_gpu, folder = run("-e", "--qe", "--qe-calibration", "1", "--gpus", "0,1")
    assert chosen == ["cuda:0"]
    assert top1(on_gpu) == top1(lines)
    content = torch.load(folder / "quantized_checkpoint.pth.tar", weights_only=True)
    assert {tensor.device.type for tensor in content["state_dict"].values()} == {"cpu"}
    resumed, _ = run("-e", "--cpu", "--resume-from", folder / "quantized_checkpoint.pth.tar")
    assert top1(resumed) == top1(lines)


def test_interrupted(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "evaluate", interrupt)
    lines, folder = run(*["-e", "--qe", "--qe-calibration", "1"], code=130)
    assert lines[-1].startswith("Per-layer quantization parameters saved to")
    assert "quantized_checkpoint.pth.tar" not in files_of(folder)
    read_statistics(folder / "acts_quantization_stats.yaml")


def test_an_export_never_replaces_an_input(run):
    _, folder = run("-e", "--qe", "--qe-calibration", "1")
    checkpoint = folder / "quantized_checkpoint.pth.tar"
    before = checkpoint.read_bytes()
    with pytest.raises(AssertionError, match="is also an input of this command"):
        run("-e", "--resume-from", checkpoint, "--export-onnx", checkpoint)
    assert checkpoint.read_bytes() == before
