"""The recipe as a person runs it: on the digits, on EfficientNet-Lite0, and with what it refuses."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from golden import read_cases

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
pytest.importorskip("sklearn", reason="needs the extra 'demo'")

from qdq.cli.main import run_command
from qdq.cli.recipes import load_recipe
from qdq.systems import LinearQuant

recipe = load_recipe("fixed_point")


def read_case(key):
    return next(case for case in read_cases("playground_cli") if key in case)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the recipe with arguments in an empty folder; returns the exit code, the output and the errors."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["fixed_point.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_command(recipe.fixed_point)
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return start


@pytest.fixture(scope="module")
def trained():
    """The parameters of the digits net after a few epochs."""
    task = recipe.load_digits_task(batch_size=100, seed=0)
    return task.net.state_dict()


@pytest.fixture
def trained_digits(monkeypatch, trained):
    """Trains the digits only once."""
    qat_digits = load_recipe("qat_digits")
    qat_digits.train = lambda net, batches, epochs: net.eval().load_state_dict(trained)
    monkeypatch.setattr(recipe, "load_recipe", lambda name: qat_digits)


def read_accuracy(line):
    return float(line.split("acc1=")[1].split(",")[0])


def test_digits(run, trained_digits):
    code, output, errors = run("--type", "digits", "--bn_bits", "10", "--n_sample", "3")
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0] == "=================FLAGS=================="
    assert lines[1:4] == ["type: digits", "quant_method: linear", "param_bits: 8"]
    assert "========================================" in lines
    assert "0.0.weight 8" in lines and "0.1.running_mean 10" in lines
    assert "LinearQuant(sf=None, bits=8, overflow_rate=0.000, counter=3)" in output
    assert output.count("counter=0)") == output.count("counter=3)")
    settings = (
        "type=digits, quant_method=linear, param_bits=8, bn_bits=10, fwd_bits=8, overflow_rate=0.0"
    )
    assert lines[-1].startswith(f"{settings}, acc1=")
    assert read_accuracy(lines[-1]) > 0.9
    assert "have no quantizer" in errors

    code, more, _ = run("--type", "digits", "--fwd-bits", "32", "--param-bits", "32", "--ngpu", "0")
    assert code == 0 and "Quant(" not in more
    assert Path("acc1_acc5.txt").read_text().splitlines() == [lines[-1], more.splitlines()[-1]]


def test_the_example_of_the_source_is_understood(run):
    case = read_case("console_script")
    name, *options = case["example"].split()
    assert name == case["console_script"]
    code, _, errors = run(*options)
    assert code == 2
    assert "the network, weights and images of cifar10 are not packaged" in errors


def test_prints_are_those_of_the_source(run, trained_digits):
    first, flag, last, ignored, entry, *_ = read_case("prints")["prints"]
    code, output, _ = run("--type", "digits", "--param_bits", "6", "--n_sample", "2")
    assert code == 0
    lines = output.splitlines()
    assert lines[0] == first
    assert flag.startswith("<name>: <value>")
    end = lines.index(last)
    flags = dict(line.split(": ", 1) for line in lines[1:end])
    assert flags["param_bits"] == "6" and flags["n_sample"] == "2"
    entries = lines[end + 1 :]
    assert ignored.startswith("Ignoring <key>") and "Ignoring 0.1.running_mean" in entries
    assert entry.startswith("<key> <bits>") and "0.0.weight 6" in entries
    assert entries.index("0.0.weight 6") < entries.index("Ignoring 0.1.running_mean")
    models = output.split("Sequential(", 1)[1]
    assert models.index("sf=None, bits=8") < models.index("counter=0)")


def test_flow_is_that_of_the_source(run, trained_digits, monkeypatch):
    text = read_case("flow")["flow"]
    assert "n_sample batches of 10" in text and "duplicate" in text
    calls = []
    forward = LinearQuant.forward

    def watch(quantizer, values):
        calls.append((id(quantizer), quantizer.counter, len(values)))
        return forward(quantizer, values)

    monkeypatch.setattr(LinearQuant, "forward", watch)
    code, _, errors = run("--type", "digits", "--n_sample", "3", "--batch_size", "50")
    assert code == 0, errors
    first = [(counter, size) for quantizer, counter, size in calls if quantizer == calls[0][0]]
    assert first[:3] == [(3, 10), (2, 10), (1, 10)]
    assert {counter for counter, _ in first[3:]} == {0}
    assert sum(size for _, size in first[3:]) == 898  # the half that is evaluated, in batches of 50
    assert first[3] == (0, 50)


@pytest.mark.parametrize("method", ["minmax", "log", "tanh"])
def test_other_methods(run, trained_digits, method):
    code, output, errors = run("--type", "digits", "--quant_method", method)
    assert code == 0, errors
    assert f"(0_{method}_quant): NormalQuant(bits=8)" in output
    assert read_accuracy(output.splitlines()[-1]) > 0.9


def test_lite0_in_sequentials(lite0):
    net = copy.deepcopy(lite0.module)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(recipe.make_sequential(net)(images), lite0.module(images))


def test_lite0(run, monkeypatch, lite0):
    monkeypatch.setattr(recipe, "EVALUATION_CROPS", 4)
    options = ["--type", "efficientnet_lite0", "--n_samples", "1", "--param_bits", "12"]
    code, output, errors = run(*options, "--fwd_bits", "12", "--bn_bits", "10")
    assert code == 0, errors
    assert (
        output.count("counter=0)") == 2 * 49 + 1
    )  # convolutions, their BatchNorms, the linear layer
    assert "9 add (" in errors


def test_a_folder_of_images(run, tmp_path, lite0):
    from PIL import Image

    for index in range(6):
        path = tmp_path / "images" / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), (40 * index, 90, 10)).save(path)
    options = ["--type", "efficientnet_lite0", "--data_root", "images", "--input_size", "64"]
    code, output, errors = run(*options, "--n_sample", "2", "--param_bits", "8")
    assert code == 0, errors
    assert "data_dir: images" in output


def test_weights_in_a_folder(tmp_path):
    for name in ("vgg16_bn-1.pth", "vgg16-397923af.pth", "inception_v3_google-0cc3.pth"):
        (tmp_path / name).touch()
    assert recipe.find_weights("vgg16", tmp_path).name == "vgg16-397923af.pth"
    assert recipe.find_weights("inception_v3", tmp_path).name == "inception_v3_google-0cc3.pth"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the network, weights and images of cifar10 are not packaged"),
        (["--type", "resnet18", "--model_root", "empty"], "no weights of resnet18 in empty"),
        (
            ["--type", "resnet19"],
            "type is 'resnet19'; expected digits, efficientnet_lite0, alexnet",
        ),
        (["--type", "digits", "--data_dir", "images"], "digits has images of its own"),
        (["--type", "digits", "--param_bits", "0"], "param_bits: bits is 0"),
        (["--type", "digits", "--gpu", "9,1"], "device is cuda:9"),
        (["--type", "digits", "--overflow_rate", "1"], "overflow_rate is 1.0"),
        (["--quant_method", "cubic"], "quant_method"),
        (["--n_sample", "0"], "n_sample"),
    ],
)
def test_what_is_refused(run, options, message):
    code, _, errors = run(*options)
    assert code == 2
    assert message in errors.replace("--n-sample", "n_sample").replace(
        "quant-method", "quant_method"
    )
    assert "fix: " in errors
    assert not Path("acc1_acc5.txt").exists()
