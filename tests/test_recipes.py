"""The recipe as a person runs it: to the end, with bad input, interrupted."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
from clamped_net import CLAMPED
from PIL import Image
from processes import TORCHRUN
from stopped_recipe import Stop, run_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "ptq.py"
TUNING = ROOT / "recipes" / "qat.py"
SMALL = [
    "--model",
    "squeezenet1_1",
    "--weights",
    "random",
    "--calib-batches",
    "2",
    "--eval-images",
    "4",
    "--analysis-images",
    "2",
    "--batch-size",
    "2",
    "--max-float-layers",
    "0",
]
WRITTEN = [
    "analysis.jsonl",
    "calibration.json",
    "calibration.safetensors",
    "model.onnx",
    "model.rtx.engine",
    "plan.yaml",
    "quantized.safetensors",
    "references.safetensors",
    "report.html",
    "report.json",
    "report.txt",
    "run.json",
    "run.log",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight random images of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(8):
        path = folder / str(index % 2) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


def assert_whole(folder):
    """Nothing half-written."""
    for path in folder.iterdir():
        assert path.name in {*WRITTEN, "recovery.safetensors"}  # the latter of an unfinished run
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".onnx":
            onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.slow
@pytest.mark.trt
@pytest.mark.timeout(600)  # eight runs of the recipe
def test_interrupted_at_every_stage_then_whole(tmp_path, pictures):
    folder = tmp_path / "run"
    arguments = [*SMALL, "--data-dir", pictures, "--output", folder, "--calib-method", "best"]
    stops = (("float", 0), ("calibrate", 1), ("recover accuracy", 1), ("build", 1))
    for stage, files in stops:
        code, errors = run_recipe(RECIPE, arguments, tmp_path, Stop(stage, files, signal.SIGINT))
        assert code == 130, errors
        assert errors.strip().splitlines() == [
            "interrupted: every file written so far is complete; run the same command again"
        ]
        assert_whole(folder)
    for stage, files in (("analyze", 1), ("export and check", 1), ("report", 1)):
        assert (
            run_recipe(RECIPE, arguments, tmp_path, Stop(stage, files, signal.SIGKILL))[0]
            == -signal.SIGKILL
        )
        assert_whole(folder)
        assert json.loads((folder / "run.json").read_text())["status"] == "running"

    (folder / "report.html").write_text("left by an earlier run")
    (folder / "notes.txt").write_text("of the user")
    code, errors = run_recipe(RECIPE, arguments, tmp_path)
    assert code == 0, errors
    (folder / "notes.txt").unlink()
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN
    assert_whole(folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    report = json.loads((folder / "report.json").read_text())
    assert report["summary"]["weighted_layers_swapped"] == 26
    assert report["summary"]["census_missing_int8"] == []
    assert report["findings"] == []


TUNED = [
    "--model",
    "squeezenet1_1",
    "--weights",
    "random",
    "--calib-batches",
    "2",
    "--eval-images",
    "4",
]


@pytest.mark.slow
@pytest.mark.trt
def test_fine_tuning_interrupted_then_whole(tmp_path, pictures):
    folder = tmp_path / "run"
    arguments = [
        *TUNED,
        "--batch-size",
        "2",
        "--steps",
        "6",
        "--data-dir",
        pictures,
        "--output",
        folder,
    ]
    arguments += ["--loss", "both"]
    code, errors = run_recipe(TUNING, arguments, tmp_path, Stop("fine-tune", 1, signal.SIGINT))
    assert code == 130, errors
    assert (
        run_recipe(TUNING, arguments, tmp_path, Stop("fine-tune", 2, signal.SIGKILL))[0]
        == -signal.SIGKILL
    )
    code, errors = run_recipe(TUNING, arguments, tmp_path)
    assert code == 0, errors
    assert "6 steps" in (tmp_path / "output.txt").read_text()
    written = {path.name for path in (folder / "tuning").iterdir()}
    # With labels nothing is held out.
    assert written == {
        "last.safetensors",
        "state.safetensors",
        "tuning.json",
    }
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["summary"]["weighted_layers_swapped"]
        == report["summary"]["census_expected_int8"]
        == 26
    )
    assert report["summary"]["census_missing_int8"] == []
    assert [row["name"] for row in report["evaluation"]["candidates"]] == [
        "float",
        "calibrated",
        "start",
        "fine-tuned",
        "ONNX",
    ]
    names = [step["name"] for step in report["steps"]["steps"]]
    assert names == ["calibrated, all int8", "float layers: 0", "biases corrected"]


@pytest.mark.slow
@pytest.mark.trt
def test_fine_tuning_in_two_processes_gives_what_one_gives(tmp_path, pictures, processes):
    arguments = [*TUNED, "--batch-size", "4", "--steps", "4", "--data-dir", pictures, "--output"]
    command = [*TORCHRUN, TUNING, *arguments, tmp_path / "two"]
    process = processes.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("== calibrate") == output.count("== build") == output.count("4 steps") == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {*WRITTEN, "tuning"}

    stop = Stop("export and check", 0, signal.SIGKILL)
    assert run_recipe(TUNING, [*arguments, tmp_path / "one"], tmp_path, stop)[0] == -signal.SIGKILL
    two_processes, one_process = (
        json.loads((tmp_path / name / "tuning" / "tuning.json").read_text())
        for name in ("two", "one")
    )
    # Batches of another size may sum in another order, and then values at ties round the other way: another number of
    # threads alone changes the later losses by 2 %.
    assert two_processes["losses"][0] == pytest.approx(one_process["losses"][0], rel=1e-3)
    assert two_processes["losses"] == pytest.approx(one_process["losses"], rel=0.05)
    curves = [
        [point["metric"] for point in tuning["curve"]] for tuning in (two_processes, one_process)
    ]
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-2)
    assert curves[0] == pytest.approx(curves[1], abs=0.5)


def empty_folder(tmp_path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    return ["--data-dir", tmp_path / "data"]


def text_as_image(tmp_path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / "cat" / name).write_text("no image")
    return ["--data-dir", tmp_path / "data"]


def foreign_checkpoint(tmp_path):
    torch.save({"conv.weight": torch.zeros(1, 3, 3, 3)}, tmp_path / "other.pth")
    return ["--weights", tmp_path / "other.pth"]


def foreign_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    return ["--output", tmp_path / "mine"]


def unknown_layer(tmp_path):
    (tmp_path / "plan.yaml").write_text("layers: {features.0: float, features.99: float}")
    return ["--plan", tmp_path / "plan.yaml"]


def fp8_layer(tmp_path):
    (tmp_path / "plan.yaml").write_text("layers: {features.0: fp8}")
    return ["--plan", tmp_path / "plan.yaml"]


def foreign_profile(tmp_path):
    (tmp_path / "profile.json").write_text(
        '[{"count": 1}, {"name": "layer1.0.conv1/Conv", "averageMs": 1.0}]'
    )
    return ["--profile", tmp_path / "profile.json"]


def bad_pattern(tmp_path):
    (tmp_path / "plan.yaml").write_text("layers: {'re:(': float}")
    return ["--plan", tmp_path / "plan.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude", "re:("], "'re:(' is not a regular expression"),
        (
            ["--exclude", "featurs.*"],
            "the pattern 'featurs.*' in exclude matches no module and no call",
        ),
        (
            ["--exclude", "classifier", "nothing"],
            "the pattern 'nothing' in exclude matches no module and no call",
        ),
        (foreign_profile, "no layer of the model is named in the kernels"),
        (["--groups", "re:["], "'re:[' is not a regular expression"),
        (["--groups", "no_such_*"], "the pattern 'no_such_*' of groups matches no quantized layer"),
        (unknown_layer, "the plan sets 'features.99' to float"),
        (fp8_layer, "the plan sets features.0 to fp8, but the formats of this run are int8"),
        (bad_pattern, "'re:(' is not a regular expression"),
        (["--target", "t4", "--sm", "89"], "--target t4 has SM 75, and --sm is 89"),
        (["--eval-images", "1.5"], 'unable to convert "1.5" into int'),
        (["--eval-images", "4000000000"], "4000000000 crops of a few photographs were requested"),
        (["--batch-size", "4000000000"], "crops of a few photographs were requested"),
        (["--model", "resnet5"], "unknown model 'resnet5'"),
        (["--data-dir", "missing"], "missing does not exist"),
        (empty_folder, "contain no images"),
        (text_as_image, "expected an image, found text"),
        (foreign_checkpoint, "does not fit squeezenet1_1"),
        (foreign_folder, "is not a run folder"),
        (["--output", "/dev/null/run"], "cannot use /dev/null/run as a run folder"),
        (["--weights", "nonsense"], "unknown weights 'nonsense'"),
        (["--sm", "77"], "cannot build for SM 77"),
        (["--batch-size", "0"], 'invalid value "0" for --batch-size'),
        (["--calib-batches", "-3"], 'invalid value "-3" for --calib-batches'),
        (["--max-float-layers", "-1"], 'invalid value "-1" for --max-float-layers'),
        (["--target-sqnr", "nan"], 'invalid value "nan" for --target-sqnr'),
        (["--confirm", "-1"], 'invalid value "-1" for --confirm'),
        (["--gpu", "voodoo2"], "gpu is 'voodoo2'"),
        (["--extra-macs", "0.1"], "--extra-macs is given, and --accuracy is fast"),
        (["--accuracy", "best", "--extra-macs", "nan"], "--extra-macs is nan; expected a share"),
        (["--accuracy", "best", "--extra-macs", "-0.1"], "--extra-macs is -0.1; expected a share"),
        (["--accuracy", "best", "--extra-macs", "5"], "--extra-macs is 5.0; expected a share"),
        (
            ["--accuracy", "best", "--extra-macs", "0", "--formats", "fp8"],
            "--extra-macs is given, and --formats is fp8",
        ),
        (["--center", "--formats", "fp8"], "--center is given, and --formats has fp8"),
        (["--profile", "missing.json"], "missing.json is not an engine profile"),
        (["--target-drop", "0.1"], "error: --target-drop is given, but no metric"),
        (["--target-metric", "1"], "error: --target-metric is given, but no metric"),
        (["--max-float-share", "2"], "error: --max-float-share is 2"),
        (["--rank-by", "accuracy"], 'invalid value "accuracy" for --rank-by'),
        (["--metric", "kl"], "--metric kl is given, and squeezenet1_1 is measured by top-1"),
        (["--seed", "-1"], 'invalid value "-1" for --seed'),
        (["--calib-method", "nonsense"], 'invalid value "nonsense" for --calib-method'),
        (["--nonsense"], "unknown option: --nonsense"),
        (["--batch-size"], "--batch-size requires an argument"),
        (["stray"], "stray"),
    ],
)
@pytest.mark.parametrize("program", ["recipe", "qdq ptq"])
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, program, arguments, message
):
    from qdq.cli import main
    from qdq.cli.recipes import load_recipe

    monkeypatch.chdir(tmp_path)
    options = arguments(tmp_path) if callable(arguments) else arguments
    defaults = {"--model": "squeezenet1_1", "--weights": "random", "--output": "run"}
    argv = [str(a) for a in options] + [
        part for pair in defaults.items() if pair[0] not in options for part in pair
    ]
    argv.append("-q")  # how many images there are, and what labels, is told as a warning
    monkeypatch.setattr(sys, "argv", [RECIPE.name, *argv])
    run = {
        "recipe": lambda: main.run_command(load_recipe("ptq").ptq),
        "qdq ptq": lambda: main.main(["ptq", *argv]),
    }
    with pytest.raises(SystemExit) as exit:
        run[program]()
    assert exit.value.code == 2
    captured = capsys.readouterr()
    error, fix = captured.err.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert fix.startswith("  fix: ")
    assert captured.out == ""  # no stage has begun


@pytest.mark.parametrize(
    ("formats", "sm", "method", "message"),
    [
        (("fp8",), 75, "mse", "SM 75 has no FP8"),
        (("fp8",), 89, "entropy", "'entropy' is for integer codes"),
        (("int8", "fp8"), 75, "laplace", "'laplace' is for integer codes"),
    ],
)
def test_formats_that_cannot_be_had_are_refused(formats, sm, method, message):
    import qdq
    from qdq.cli.refusals import check_formats

    with pytest.raises(qdq.ArgumentError, match=message):
        check_formats(formats, sm, method)


def test_formats_that_can_be_had():
    from qdq.cli.refusals import check_formats, choose_target_sm

    check_formats(("fp8",), 89, "best")
    check_formats(("int8", "fp8"), 75, "mse")  # everything is int8
    check_formats(("int8",), 75, "entropy")
    assert choose_target_sm("h100", None) == choose_target_sm("h100", 90) == 90
    assert choose_target_sm(None, 86) == 86
    assert choose_target_sm(None, None) is None


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = torch.nn.Linear(64, 64)

    def forward(self, x):
        x = self.inputs(x)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_the_formats_of_a_plan_are_those_of_the_run_and_of_the_target():
    import qdq
    from qdq.cli.refusals import check_layers
    from qdq.plan import PlanEntry

    net = SimpleNamespace(
        module=_Attention().eval(), example=torch.randn(2, 1, 16, 64), name="attention"
    )
    call = "scaled_dot_product_attention"
    fp8 = qdq.Plan({call: PlanEntry("fp8"), "inputs": PlanEntry("fp8")})
    int8 = qdq.Plan({"inputs": PlanEntry("int8")})
    check_layers(net, plan=fp8, formats=("fp8",), sm=89)
    check_layers(net, plan=fp8, formats=("int8", "fp8"), sm=89)
    with pytest.raises(qdq.ArgumentError, match="inputs to int8, but the formats of this run are"):
        check_layers(net, plan=int8, formats=("fp8",), sm=89)
    with pytest.raises(qdq.ArgumentError, match=f"{call} to fp8, which SM 86 does not have"):
        check_layers(net, plan=fp8, formats=("int8", "fp8"), sm=86)


def test_calls_may_be_excluded():
    import qdq
    from qdq.cli.refusals import check_layers

    options = qdq.WorkloadOptions(
        "resnet18", "random", calib_batches=1, eval_samples=1, batch_size=2
    )
    net = qdq.load_workload(options)
    check_layers(net, exclude=["layer1.0.add", "layer2.*", "fc"])
    with pytest.raises(qdq.ArgumentError, match=r"'layer1\.0\.mul' in exclude"):
        check_layers(net, exclude=["layer1.0.add", "layer1.0.mul"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0; it must be 1 or more"),
        (["--lr", "-1"], "lr is -1.0; it must be above 0"),
        (["--lr", "inf"], "lr is inf; it must be above 0 and finite"),
        (["--steps", "1.5"], 'unable to convert "1.5" into int'),
        (["--loss", "hinge"], 'invalid value "hinge" for --loss'),
        (["--loss", "labels"], "--loss labels needs images with labels"),
        (["--loss", "both"], "--loss both needs images with labels"),
        (["--layers", "no_such_layer"], "the pattern 'no_such_layer' in layers matches no module"),
        (["--layers", "features.1"], "the pattern 'features.1' in layers matches no module"),
        (["--layers", "re:("], "'re:(' is not a regular expression"),
        (["--exclude", "re:("], "'re:(' is not a regular expression"),
        (
            ["--exclude", "no_such_layer"],
            "the pattern 'no_such_layer' in exclude matches no module and no call",
        ),
        (
            ["--layers", "classifier.1", "--exclude", "classifier"],
            "'classifier.1' in layers matches are excluded",
        ),
        (
            ["--layers", "classifier", "--exclude", "re:.*[.]1"],
            "'classifier' in layers matches are excluded",
        ),
        (["--ranges", "free"], 'invalid value "free" for --ranges'),
        (["--plan", "missing.yaml"], "cannot read missing.yaml"),
    ],
)
def test_bad_input_of_fine_tuning(tmp_path, monkeypatch, capsys, arguments, message):
    from qdq.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["qat", "--model", "squeezenet1_1", "--weights", "random", *arguments])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    error, fix = captured.err.strip().splitlines()
    assert message in error
    assert fix.startswith("  fix: ")
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.trt
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--accuracy", "balanced"], 4),
        (["--accuracy", "balanced", "--patience", "3"], 6),
        (["--accuracy", "balanced", "--patience", "20"], 20),
        (["--accuracy", "balanced", "--grow", "0.5"], 20),
        ([], 20),
    ],
)
def test_fine_tuning_that_gains_nothing_stops(options, steps, tmp_path):
    """The rates are too small to change a weight, and each of the ten measurements is after two steps."""
    net, run = tmp_path / "net.py", tmp_path / "run"
    net.write_text(CLAMPED)
    arguments = ["--model", f"{net}:build", "--data", f"{net}:batches", "--calib-batches", "2"]
    arguments += ["--eval-images", "4", "--steps", "20", "--lr", "1e-20", "--bias-lr", "1e-20"]
    code, errors = run_recipe(TUNING, [*arguments, *options, "--output", run], tmp_path)
    assert code == 0, errors
    tuning = json.loads((run / "report.json").read_text())["tuning"]
    assert len(tuning["losses"]) == steps
    is_stopped = f"stopped: {steps // 2} measurements in a row were not better" in tuning["text"]
    assert is_stopped is (steps < 20)


def test_patience_where_nothing_is_measured(tmp_path, monkeypatch, capsys, pictures):
    from qdq.cli.main import main

    monkeypatch.chdir(tmp_path)
    options = ["--loss", "labels", "--patience", "3", "--data-dir", str(pictures), "-q"]
    with pytest.raises(SystemExit) as exit:
        main(["qat", "--model", "squeezenet1_1", "--weights", "random", *options])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--patience waits for a better metric" in captured.err


@pytest.mark.parametrize("verb", ["ptq", "qat"])
def test_what_is_read_from_the_run_folder_is_still_there_when_the_run_ends(
    tmp_path, monkeypatch, capsys, verb
):
    import qdq
    from qdq.cli.main import main

    folder = tmp_path / "run"
    qdq.start_run(folder).finish()
    plan = "layers: {features.0: float}  # a note of the user"
    for name in ("classifier.1", "features.3.squeeze"):
        plan = plan.replace("}", f", {name}: int8}}")
    kernels = [
        {"name": "features.3.squeeze", "averageMs": 0.1},
        {"name": "features.3.expand1x1", "averageMs": 0.1},
    ]
    contents = {
        "plan.yaml": plan,
        "model.profile.json": json.dumps(kernels),
        "notes.txt": "of the user",
    }
    for name, content in (contents | {"model.onnx": "stale"}).items():
        (folder / name).write_text(content)
    options = [
        "--model",
        "squeezenet1_1",
        "--weights",
        "random",
        "--eval-images",
        "2",
        "--calib-batches",
        "1",
    ]
    options += [
        "--batch-size",
        "2",
        "--plan",
        str(folder / "plan.yaml"),
        "--output",
        str(folder),
        "-q",
    ]
    options += ["--profile", str(folder / "model.profile.json")] if verb == "ptq" else []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(qdq, "predict", stop)
    with pytest.raises(SystemExit) as exit:
        main([verb, *options])
    assert exit.value.code == 130, capsys.readouterr().err
    assert {name: (folder / name).read_text() for name in contents} == contents
    assert (folder / "plan.input.yaml").read_text() == plan
    assert not (folder / "model.onnx").exists()


TWO_OUTPUTS = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(16, 16)

    def forward(self, x):
        y = self.first(x)
        return {"left": y, "right": y * y}


def batches():
    return [torch.ones(2, 16)] * 3
"""


@pytest.mark.parametrize("recipe", ["ptq", "qat"])
def test_the_weights_of_outputs_count_when_formats_are_chosen(tmp_path, monkeypatch, recipe):
    import qdq
    from qdq.cli import main

    chosen = []

    def stop(*_, **options):
        chosen.append(options["weights"])
        raise qdq.StateError("stopped.", "nothing.")

    monkeypatch.setattr(qdq, "choose_formats", stop)
    net = tmp_path / "net.py"
    net.write_text(TWO_OUTPUTS)
    argv = [recipe, "--model", f"{net}:Net", "--data", f"{net}:batches", "--output-weights"]
    argv += ["left=3", "--formats", "int8,fp8", "--sm", "89", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main.main([*argv, "--calib-batches", "2", "--device", "cpu"])
    assert chosen == [{"left": 3.0}]


def test_what_is_wrong_at_once_touches_no_earlier_run(tmp_path, monkeypatch):
    from qdq.cli.main import main

    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "model.onnx").write_text("of an earlier run")
    with pytest.raises(SystemExit):
        main(["ptq", "--batch-size", "0", "--output", str(tmp_path)])
    assert (tmp_path / "model.onnx").exists()


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    from qdq.cli.main import main

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty cache"))
    # Port 9 of this machine refuses at once, whatever network there is.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as exit:
        main(["ptq", "--model", "squeezenet1_1", "--output", str(tmp_path / "run")])
    assert exit.value.code == 2
    error, fix = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(
        "error: cannot fetch the weights SqueezeNet1_1_Weights.IMAGENET1K_V1 from https://"
    )
    assert "--weights random" in fix


@pytest.mark.trt
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("recipe", "arguments", "is_split"),
    [
        (RECIPE, ["--accuracy", "balanced"], True),
        (RECIPE, [], False),
        (RECIPE, ["--accuracy", "balanced", "--formats", "fp8", "--sm", "89"], False),
        (TUNING, ["--steps", "2"], True),
    ],
)
def test_split_channels_reach_the_file(recipe, arguments, is_split, tmp_path):
    """Channel 1 behind the clamp is free, so two channels of the first layer have one weight afterwards."""
    from qdq.diverge.of_run import diverge_run

    net, run = tmp_path / "net.py", tmp_path / "run"
    free = "    first.weight.data[1] = 0.0\n    last ="
    net.write_text(CLAMPED.replace("    last =", free))
    arguments = [*arguments, "--model", f"{net}:build", "--data", f"{net}:batches"]
    arguments += ["--calib-batches", "2", "--eval-images", "4", "--max-float-layers", "0"]
    code, errors = run_recipe(recipe, [*arguments, "--output", run], tmp_path)
    assert code == 0, errors
    assert ("1 of 4 paths have channels split" in (run / "run.log").read_text()) is is_split
    assert ("Split channels\n" in (run / "report.txt").read_text()) is is_split
    assert ('id="splitting"' in (run / "report.html").read_text()) is is_split
    assert diverge_run(run).divergence.first is None


@pytest.mark.parametrize(
    ("max_float_layers", "precisions", "expected"),
    [(0, None, 0.05), (1, None, 0.0), (0, {"a": "int8"}, 0.05), (0, {"a": "float"}, 0.0)],
)
def test_no_layer_becomes_wider_by_default_if_some_may_go_to_float(
    max_float_layers, precisions, expected
):
    from qdq.cli.refusals import choose_extra_macs

    plan = None if precisions is None else SimpleNamespace(precisions=precisions)
    options = {"max_float_layers": max_float_layers, "plan": plan, "accuracy": "balanced"}
    assert choose_extra_macs(None, ["int8"], **options) == expected
    assert choose_extra_macs(0.2, ["int8"], **options) == 0.2


@pytest.mark.trt
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("recipe", "arguments", "channels"),
    [
        (RECIPE, ["--accuracy", "balanced", "--extra-macs", "1"], 32),
        (RECIPE, ["--accuracy", "balanced"], 16),  # 5 % more MACs are too few
        (RECIPE, ["--accuracy", "balanced", "--extra-macs", "1", "--exclude", "2"], 32),
        (TUNING, ["--steps", "2", "--extra-macs", "1"], 32),
        (TUNING, ["--steps", "2"], 16),
    ],
)
def test_wider_layers_reach_the_file(recipe, arguments, channels, tmp_path):
    from qdq.diverge.of_run import diverge_run

    net, run = tmp_path / "net.py", tmp_path / "run"
    net.write_text(CLAMPED)
    arguments = [*arguments, "--model", f"{net}:build", "--data", f"{net}:batches"]
    arguments += ["--calib-batches", "2", "--eval-images", "4", "--max-float-layers", "0"]
    code, errors = run_recipe(recipe, [*arguments, "--output", run], tmp_path)
    assert code == 0, errors
    graph = onnx.load(run / "model.onnx").graph
    shapes = [list(tensor.dims) for tensor in graph.initializer]
    assert [channels, 16, 1, 1] in shapes and [16, channels, 3, 3] in shapes
    report = json.loads((run / "report.json").read_text())
    paths = {path["layers"][0]: path for path in report["splitting"]["paths"]}
    assert paths["2"]["added"] == channels - 16
    assert (report["splitting"]["extra_macs"] > 0) is (channels > 16)
    assert report["summary"]["census_missing_int8"] == []
    assert diverge_run(run).divergence.first is None


@pytest.mark.parametrize(
    ("center", "formats", "accuracy", "expected"),
    [
        (None, ["int8"], "fast", False),
        (None, ["int8"], "balanced", True),
        (None, ["int8"], "best", True),
        (None, ["int8", "fp8"], "best", False),
        (True, ["int8"], "fast", True),
        (False, ["int8"], "best", False),
        (False, ["fp8"], "best", False),
    ],
)
def test_inputs_are_centered_by_default_above_fast(center, formats, accuracy, expected):
    from qdq.cli.refusals import choose_centering

    assert choose_centering(center, formats, accuracy) is expected


@pytest.mark.trt
@pytest.mark.timeout(120)
def test_centering_can_be_left_out(tmp_path):
    net, run = tmp_path / "net.py", tmp_path / "run"
    net.write_text(CLAMPED)
    arguments = ["--model", f"{net}:build", "--data", f"{net}:batches", "--calib-batches", "2"]
    arguments += ["--eval-images", "4", "--max-float-layers", "0", "--accuracy", "balanced"]
    code, errors = run_recipe(RECIPE, [*arguments, "--no-center", "--output", run], tmp_path)
    assert code == 0, errors
    assert json.loads((run / "report.json").read_text())["centering"] is None
    assert "Centered inputs" not in (run / "report.txt").read_text()
    assert 'id="centering"' not in (run / "report.html").read_text()


@pytest.mark.trt
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPE, ["--center"]),
        (RECIPE, ["--accuracy", "balanced"]),
        (TUNING, ["--center", "--steps", "2"]),
    ],
)
def test_centered_inputs_reach_the_file_and_the_engine(recipe, options, tmp_path):
    from qdq.diverge.of_run import diverge_run

    net, run = tmp_path / "net.py", tmp_path / "run"
    net.write_text(CLAMPED)
    arguments = ["--model", f"{net}:build", "--data", f"{net}:batches", "--calib-batches", "2"]
    arguments += ["--eval-images", "4", "--max-float-layers", "0", "--output", run, *options]
    code, errors = run_recipe(recipe, arguments, tmp_path)
    assert code == 0, errors
    graph = onnx.load(run / "model.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (clip,) = (node for node in graph.node if node.op_type == "Clip")
    low, high = (float(arrays[name]) for name in clip.input[1:])
    assert high - low == pytest.approx(6) and -4 < low < -2
    assert "Sub" not in {node.op_type for node in graph.node}
    report = json.loads((run / "report.json").read_text())
    assert report["summary"]["census"]["Int8"]["missing"] == []
    assert diverge_run(run).divergence.first is None
    assert "1 of 3 inputs of layers centered" in (run / "report.txt").read_text()
    (entry,) = (entry for entry in report["centering"]["inputs"] if not entry["reason"])
    assert entry["read_by"] == ["2"] and entry["offset"] == pytest.approx(-low, abs=1e-5)
    assert 'id="centering"' in (run / "report.html").read_text()
