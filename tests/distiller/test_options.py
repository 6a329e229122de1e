"""The options of the classifier sample: Distiller's names, short names, defaults and choices, and what is refused."""

import ast
import json
import sys
from pathlib import Path
from typing import get_args

import cyclopts
import pytest
from golden import FOLDER, read_cases

pytest.importorskip("torchvision", reason="needs the extra 'demo'")

from qdq.cli.main import run_command
from qdq.cli.recipes import load_recipe
from qdq.distiller.command.former_options import FIXES
from qdq.distiller.command.quantize_options import MODES, ClipName, QuantizeOptions

recipe = load_recipe("compress_classifier")
POST_TRAINING = read_cases("distiller_cli_ptq")
CLASSIFIER = [
    case for case in read_cases("distiller_cli_classifier") if case["options"] != ["data"]
]


def list_arguments():
    """Option -> its argument in cyclopts."""
    app = cyclopts.App()
    app.default(recipe.compress_classifier)
    arguments = {}
    for argument in app.assemble_argument_collection():
        for name in argument.names:
            arguments[name] = argument
    return arguments


ARGUMENTS = list_arguments()


def default_of(option):
    return ARGUMENTS[option].field_info.default


def name_of(case):
    """The long name, which is that of the field."""
    return max((name for name in case["options"] if name.startswith("--")), key=len)


def is_known(case):
    return all(name in ARGUMENTS for name in case["options"])


@pytest.mark.parametrize("case", POST_TRAINING, ids=name_of)
def test_post_training_options(case):
    assert is_known(case)
    for name in case["options"]:
        default = default_of(name)
        assert (list(default) if isinstance(default, tuple) else default) == case["default"]
        assert (ARGUMENTS[name].hint is bool) == case["is_flag"]
    if case["choices"]:
        assert list(get_args(ARGUMENTS[case["options"][0]].hint)) == case["choices"]


def test_modes_and_clip_modes():
    golden = json.loads((FOLDER / "distiller_cli_ptq.json").read_text())
    assert golden["mode_names"] == MODES
    assert list(golden["clip_names"]) == list(get_args(ClipName))
    options = QuantizeOptions(qe_mode="asym_u", qe_mode_wts="sym_restr")
    assert (options.mode_acts, options.mode_wts) == ("ASYMMETRIC_UNSIGNED", "SYMMETRIC_RESTRICTED")


@pytest.mark.parametrize("case", CLASSIFIER, ids=name_of)
def test_other_options(case):
    """Also those that are refused are known by all their names."""
    names = set(case["options"]) - {"-v", "--verbose"}  # every command of qdq has these
    assert names <= ARGUMENTS.keys()
    if not names or name_of(case).removeprefix("--").replace("-", "_") in FIXES:
        return
    expected = ast.literal_eval(case["default"]) if "default" in case else None
    if case.get("action") == "'store_true'":
        expected = False
    for name in names:
        default = default_of(name)
        if isinstance(default, Path):
            default = str(default)
        assert default == (None if expected == "" else expected)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the recipe in an empty folder; returns the exit code and the errors."""
    monkeypatch.chdir(tmp_path)

    def start(arguments):
        monkeypatch.setattr(sys, "argv", ["compress_classifier.py", *arguments.split()])
        with pytest.raises(SystemExit) as exit:
            run_command(recipe.compress_classifier)
        return exit.value.code, capsys.readouterr().err

    return start


REFUSED = {
    "--bogus": "unknown option: --bogus",
    "--qem foo": 'Choose from: "sym", "sym_restr", "asym_s", "asym_u"',
    "-e --qe --qeca most": 'Choose from: "none", "avg", "n_std", "gauss", "laplace"',
    "--lapq-init-mode L4": '"L1", "L2", "L3"',
    "--lapq-method BFGS": '"Powell"',
    "--qe-pytorch-backend x86": 'Choose from: "fbgemm", "qnnpack"',
    "--qeba -1": "--qeba",
    "--qe-bits-accum 0": "--qe-bits-accum",
    "-e --qe --qeba 33": "--qeba",
    "-e --qe --qebw 33": "--qebw",
    "-e --qe --qe-bits-accum 64": "--qe-bits-accum",
    "-e --qe --qe-bits-accum 1": "--qe-bits-accum",
    "-e --qe --qesab 40": "--qesab",
    "-e --qe --qesab 0": "--qesab",
    "-e --qe --qe-lapq --qept": "--qe-lapq and --qe-convert-pytorch exclude each other",
    "-e --qe --qe-lapq --qe-dynamic": "--qe-lapq and --qe-dynamic exclude each other",
    "-e --qe --qe-lapq --qeca avg": "--qe-clip-acts is avg",
    "-e --qe --qe-lapq --qema asym_u": "--qe-mode-acts is asym_u, whose zero points depend on them",
    "-e --qe --qe-lapq --qemw asym_s": "--qe-mode-wts is asym_s, whose zero points depend on them",
    "--compress a.yaml --kd-teacher resnet18 --kd-dw 0": "--kd-distill-wt (--kd-dw) is 0",
    "-e --qe --qeba 16 --export-onnx m.onnx": "--qe-bits-acts is 16; TensorRT int8 has codes of 8",
    "-e --qe --qebw 9 --export-onnx m.onnx": "--qe-bits-wts is 9",
    "-e --qe --qe-bits-accum 16 --export-onnx m.onnx": "--qe-bits-accum is 16",
    "--print-freq 1.5": "--print-freq",
    "": "nothing is to be done; expected --evaluate, --qe-calibration",
    "-e --qe --qe-dynamic --qe-calibration 0.1": (
        "--qe-dynamic, --qe-calibration are given; expected one of --qe-stats-file, --qe-dynamic, "
        "--qe-calibration, --qe-config-file"
    ),
    "-e --qe --qe-stats-file a --qe-config-file b": "--qe-stats-file, --qe-config-file are given",
    "--qe-calibration 0": "--qe-calibration is 0.0; expected a fraction above 0, and at most 1",
    "--qe-calibration 1.5": "--qe-calibration is 1.5",
    "--qe-calibration nan": "--qe-calibration is nan",
    "-e --etes 2": "--effective-test-size is 2.0",
    "-e --vs 1": "--validation-split is 1.0; expected a fraction of at least 0, and below 1",
    "--act-hist 2": "--activation-histograms is 2.0",
    "-e --lapq-eval-size 0": "--lapq-eval-size is 0.0",
    "-e --cpu --gpus 0": "--cpu and --gpus exclude each other",
    "-e --pretrained --exp-load-weights-from a": "two sources of weights",
    "--qe": "nothing is to be done",
    "--qe --qe-calibration 0.1": "--quantize-eval needs --evaluate",
    "-e --compress a.yaml": "--compress trains; it excludes --evaluate",
    "--qe-calibration 0.1 --compress a.yaml": "--compress trains",
    "-e --qe --qe-clip-acts n_std": "n_std needs a number of standard deviations",
    "-e --qe-lapq": "--qe-lapq needs --evaluate --quantize-eval",
    "-e --qe-convert-pytorch": "--qe-convert-pytorch needs --evaluate --quantize-eval",
    "-e --qe --qept --qe-dynamic": "--qe-convert-pytorch needs constant ranges",
    "-e --qe --qept --qebw 4": "needs 8 bits, and --qe-bits-wts is 4",
    "-e --export-onnx m.onnx": "--export-onnx exports a quantized model, and none is made",
    "-e --qe --qe-dynamic --export-onnx m.onnx": "--export-onnx needs constant scales",
    "-e --qe --qem asym_u --export-onnx m.onnx": "--qe-mode-acts is asym_u, whose codes have a zero",
    "-e --qe --qemw asym_s --export-onnx m.onnx": "--qe-mode-wts is asym_s",
    "-e --qe --qept --export-onnx m.onnx": "two ways to int8",
    "-e --qe --export-onnx m.onnx --sm 61": "61",
    "-e --qe --qeba 16 --export-onnx": "--qe-bits-acts is 16",
    "-e -n ../up": "it names a folder",
    "-e -a resnet19": "unknown model 'resnet19'",
    "-e -a squeezenet1_1 --pretrained": "the published weights of squeezenet1_1 are not on this",
    "-e -a squeezenet1_1 --exp-load-weights-from no.pth": "no.pth",
    "-e -a squeezenet1_1 --resume-from no.pth": "no.pth",
    "-e --qe --qe-stats-file no.yaml": "the statistics file no.yaml does not exist",
    "-e --qe --qe-config-file no.yaml": "no.yaml",
    "--compress no.yaml": "no.yaml",
    "no_folder -e -a squeezenet1_1": "no_folder does not exist",
    "-e --gpus 9": "device is cuda:9",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda text: text or "nothing")
def test_refused_in_one_line_with_a_way_out(run, monkeypatch, arguments):
    monkeypatch.setattr("torch.hub.get_dir", lambda: "no_weights_here")
    code, errors = run(arguments)
    assert code == 2
    lines = [line for line in errors.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 2
    assert lines[0].startswith("error: ") and REFUSED[arguments] in lines[0]
    assert lines[1].startswith("  fix: ")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("field", FIXES)
def test_former_options_name_what_to_use(run, field):
    option = "--" + field.replace("_", "-")
    value = "" if ARGUMENTS[option].hint is bool else " 1"
    code, errors = run(f"{option}{value}")
    assert code == 2
    assert errors.splitlines()[0] == f"error: {option} is not an option here."
    assert errors.splitlines()[1] == f"  fix: {FIXES[field]}"
    assert set(errors.split()) & {"use", "pass", "read", "compare", "quantize"}


IGNORED = {
    "-e --qem asym_u --qeba 4 -a resnet19": (
        "nothing is quantized after training: --qe-mode, --qe-bits-acts"
    ),
    "-e --lapq-maxiter 2 -a resnet19": "--qe-lapq is not given: --lapq-maxiter",
    "-e --export-convert -a resnet19": "--export-onnx is not given: --export-convert",
    "-e --qe --qe-clip-n-stds 2 -a resnet19": (
        "it belongs to --qe-clip-acts n_std: --qe-clip-n-stds"
    ),
    "-e --qe --qencl fc -a resnet19": "nothing is clipped: --qe-no-clip-layers",
    "-e --qe --qe-config-file c.yaml --qepc --qem sym_restr": (
        "the settings are those of c.yaml: --qe-mode, --qe-per-channel"
    ),
    "-e --kd-temp 2 -a resnet19": "--kd-teacher is not given: --kd-temperature",
}


@pytest.mark.parametrize("arguments", IGNORED)
def test_options_without_effect_are_named(run, arguments):
    code, errors = run(arguments)
    assert code == 2  # no such model, or no such file
    assert f"ignored, because {IGNORED[arguments]}\n" in errors


def test_the_file_of_the_export_has_a_default_name():
    """nargs '?' with the constant 'model.onnx'."""
    (golden,) = [case for case in CLASSIFIER if "--export-onnx" in case["options"]]
    app = cyclopts.App(result_action="return_value")
    app.default(recipe.compress_classifier)
    for arguments, file in (
        (["-e", "--qe"], None),
        (["--export-onnx", "-e"], ast.literal_eval(golden["const"])),
        (["--export-onnx", "a.onnx", "-e"], "a.onnx"),
    ):
        _, bound, _ = app.parse_args(arguments)
        options = bound.arguments.get("options")
        assert options.export.file == (file and Path(file))


def test_layers_are_lists_as_in_argparse(run):
    _, errors = run("-e --qe --qeca avg --qencl conv1 fc --qe-no-quant-layers layer1.0.conv1 -a no")
    assert "ignored" not in errors and "unknown model 'no'" in errors
