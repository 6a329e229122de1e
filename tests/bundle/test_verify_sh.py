"""verify.sh with a stand-in for trtexec. `tools/verify_bundles.py` runs every fault on every version."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import stand_in_trtexec as stand_in
from small_bundle import (
    FAULTS,
    VERSIONS,
    damage,
    is_named,
    make_run,
    read_checks,
    verify,
    write_tools,
    write_trtexec,
)

from qdq.bundle import make_bundle

SHELLS = ("dash", "bash", "dash", "bash", "dash")
# One fault of each kind of evidence: numbers of the engine, what was written, layers, times, build, files.
TRIED = {
    "8.6.1": "missing_relu",
    "10.3.0": "float_engine",
    "10.16.0": "slower_than_float",
    "11.0.0": "no_engine",
    "11.1.0": "scale_times_two",
}


def find_shell(name):
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    return name


@pytest.mark.parametrize(("version", "shell"), list(zip(VERSIONS, SHELLS, strict=True)))
def test_a_sound_engine_passes(bundle, tmp_path, version, shell):
    trtexec = write_trtexec(tmp_path, version)
    process = verify(bundle, trtexec, "--gpu", "pretended gpu", shell=find_shell(shell), seed=1)
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((bundle / "result.json").read_text())
    assert result["format"] == "qdq result 2"
    expected = json.loads((bundle / "expected.json").read_text())
    assert result["model_sha256"] == expected["model_sha256"]
    assert result["environment"]["tensorrt"] == version
    assert result["environment"]["gpu"] == "NVIDIA Pretended GPU"
    checks = read_checks(bundle)
    expected = {"files", "build int8", "build float", "numbers a", "numbers b", "census", "profile"}
    expected |= {"gpu", "time"}
    if version == "11.1.0":
        expected |= {"references a", "references b"}
    assert checks.keys() == expected
    assert {status for status, _ in checks.values()} == {"passed"}
    assert f"passed: {len(expected)} passed, 0 failed, 0 not checked" in process.stdout
    (time,) = (check for check in result["checks"] if check["name"] == "time")
    assert time["figures"]["speedup"] == pytest.approx(0.082 / 0.042, rel=0.03)


@pytest.mark.parametrize(("version", "fault"), TRIED.items())
def test_a_fault_is_caught_and_named(bundle, tmp_path, version, fault):
    process = verify(bundle, write_trtexec(tmp_path, version), "--gpu=Orin", fault=fault)
    assert process.returncode == 1, process.stdout
    assert is_named(bundle, fault), process.stdout
    if version == "11.1.0":
        status, text = read_checks(bundle)["references a"]
        assert status == "failed"
        assert "trtexec finds a mean squared difference of 0." in text
    if fault != "no_engine":  # which says nothing of the GPU
        text = "this GPU is NVIDIA Pretended GPU, and --gpu asks for Orin"
        assert read_checks(bundle)["gpu"] == ("failed", text)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A bundle with the second convolution and one linear layer in FP8, the others in int8."""
    run = make_run(tmp_path_factory.mktemp("mixed"), fp8=("middle", "b"))
    return make_bundle(run, run / "bundle", count=2, with_float=True)


def test_a_mixed_bundle_promises_each_type(mixed):
    expected = json.loads((mixed.folder / "expected.json").read_text())
    types = [product["type"] for product in expected["products"]]
    assert types == ["Int8", "FP8", "Int8", "FP8"]
    table = mixed.format_table()
    assert "2 of 4 products expected in int8\n2 of 4 products expected in FP8\n" in table
    assert "model.onnx is left out: the network has float16 tensors" in table


@pytest.mark.parametrize("version", ["10.3.0", "11.0.0"])  # a dialect of the inspector each
@pytest.mark.parametrize(
    ("fault", "code", "status", "text"),
    [
        ("", 0, "passed", "2 of 2 products in int8, 2 of 2 products in FP8"),
        ("missing_qdq", 1, "failed", "2 of 2 products in int8, 1 of 2 products in FP8; in another"),
        ("float_engine", 1, "failed", "0 of 2 products in int8, 0 of 2 products in FP8"),
    ],
)
def test_a_mixed_engine_has_each_promised_type(mixed, tmp_path, version, fault, code, status, text):
    bundle = shutil.copytree(mixed.folder, tmp_path / "bundle")
    process = verify(bundle, write_trtexec(tmp_path, version), fault=fault, seed=1)
    assert process.returncode == code, process.stdout + process.stderr
    checks = read_checks(bundle)
    assert checks["census"][0] == status
    assert checks["census"][1].startswith(text)
    assert ("middle/Conv (Half" in checks["census"][1]) == bool(fault)
    assert checks["build int8-FP8"][0] == "passed"
    assert checks["time"][1].startswith("int8-FP8 takes")
    assert checks["numbers a"][0] == "passed"


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("8.6.1", "8.9", "TensorRT before 10 has no int8-FP8; use 10 or later."),
        ("10.3.0", "8.6", "int8-FP8 needs a GPU of SM 89 or higher, and this one has SM 86;"),
    ],
)
def test_a_target_without_fp8_is_refused_before_the_build(
    mixed, tmp_path, version, capability, reason
):
    bundle = shutil.copytree(mixed.folder, tmp_path / "bundle")
    process = verify(bundle, write_trtexec(tmp_path, version), capability=capability)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"verify.sh: {reason}")
    assert read_checks(bundle)["everything"] == ("not checked", line.removeprefix("verify.sh: "))
    assert not list((bundle / "results").glob("*.plan"))


@pytest.mark.parametrize("fault", [name for name in FAULTS if FAULTS[name].file])
def test_a_damaged_bundle_is_named(bundle, tmp_path, fault):
    damage(bundle, fault)
    # the build fails at once, so this is fast
    process = verify(bundle, write_trtexec(tmp_path, "11.1.0"), fault="build_crash")
    assert process.returncode == 1
    assert is_named(bundle, fault), process.stdout
    assert is_named(bundle, "build_crash")


def test_without_python_the_rest_is_said_to_be_not_checked(bundle, tmp_path):
    (tmp_path / "tools").mkdir()
    tools = write_tools(tmp_path / "tools")
    process = verify(bundle, write_trtexec(tmp_path, "11.1.0"), path=tools)
    assert process.returncode == 0, process.stdout + process.stderr
    checks = read_checks(bundle)
    assert {name: status for name, (status, _) in checks.items()} == {
        **dict.fromkeys(["files", "build int8", "build float", "references a"], "passed"),
        **dict.fromkeys(["references b", "time"], "passed"),
        **dict.fromkeys(["numbers", "census", "profile"], "not checked"),
    }
    assert "needs python3" in checks["census"][1]


def test_nan_fails_without_python(bundle, tmp_path):
    """For trtexec NaN is not above the threshold, so it ends with code 0."""
    (tmp_path / "tools").mkdir()
    tools = write_tools(tmp_path / "tools")
    process = verify(bundle, write_trtexec(tmp_path, "11.1.0"), path=tools, fault="nan")
    assert process.returncode == 1, process.stdout
    checks = read_checks(bundle)
    assert checks["references a"][0] == "failed"
    assert "a mean squared difference of NaN" in checks["references a"][1]
    assert checks["references b"][0] == "passed"


def test_an_int64_output_is_not_compared_by_trtexec(tmp_path):
    text = """<ir_version: 9, opset_import: ["": 19]>
    g (float[1,4] x) => (int64[1] index, float[1,4] y)
    <float s = {0.1}, int8 z = {0},
     int8[4,4] w = {9, 0, 0, 0, 0, 8, 0, 0, 0, 0, 7, 0, 0, 0, 0, 6}, float ws = {0.1}>
    {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        wd = DequantizeLinear (w, ws, z)
        y = MatMul (d, wd)
        index = ArgMax <axis = 1, keepdims = 0> (y)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    x = np.array([[3, 1, -2, 1]], np.float32)
    folder = make_bundle(tmp_path / "m.onnx", tmp_path / "bundle", inputs={"x": x}).folder
    process = verify(folder, write_trtexec(tmp_path, "11.1.0"))
    assert process.returncode == 0, process.stdout + process.stderr
    checks = read_checks(folder)
    assert checks["references index"] == ("not checked", "trtexec cannot compare int64")
    assert checks["references y"][0] == checks["numbers index"][0] == "passed"


def test_an_earlier_result_is_not_taken_for_this_one(bundle, tmp_path):
    (bundle / "results").mkdir()
    (bundle / "result.json").write_text("{}")
    for number in range(2):
        outputs = {}
        for position, name in enumerate("ab"):
            outputs[name] = np.load(bundle / f"references/{number}.{position}.{name}.npy")
        stand_in.write_outputs(outputs, bundle / f"results/outputs.{number}.json")
    assert verify(bundle, write_trtexec(tmp_path, "10.3.0"), fault="no_outputs").returncode == 1
    assert is_named(bundle, "no_outputs")
    assert verify(bundle, tmp_path / "missing").returncode == 2
    assert read_checks(bundle)["everything"][0] == "not checked"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("8.5.3", "TensorRT 8.5.3 is older than 8.6"), ("", "does not print a version of TensorRT")],
)
def test_what_cannot_run_is_said(bundle, tmp_path, version, reason):
    program = tmp_path / "trtexec"
    number = version.replace(".", "0") and "8503"
    program.write_text(f"#!/bin/sh\necho '&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] #'\n")
    program.chmod(0o755)
    process = verify(bundle, program)
    assert process.returncode == 2
    assert reason in process.stderr
    assert json.loads((bundle / "result.json").read_text())["verdict"] == "could not run"


def test_it_works_in_its_own_folder_and_no_other(bundle, tmp_path, monkeypatch):
    """The shell looks for a relative folder in those of CDPATH first."""
    elsewhere = tmp_path / "elsewhere" / bundle.name
    (elsewhere / "results").mkdir(parents=True)
    monkeypatch.setenv("CDPATH", str(elsewhere.parent))
    monkeypatch.chdir(bundle.parent)
    process = verify(Path(bundle.name), tmp_path / "missing")
    assert process.returncode == 2
    assert read_checks(bundle)["everything"][0] == "not checked"
    shutil.copy(bundle / "verify.sh", elsewhere)
    process = verify(elsewhere, tmp_path / "missing")
    assert process.returncode == 2
    assert "has no expected.json; copy the bundle again" in process.stderr
    assert (elsewhere / "results").is_dir()


def test_wrong_arguments(bundle, tmp_path):
    process = verify(bundle, tmp_path / "trtexec", "--precision", "int8")
    assert process.returncode == 2
    assert "unknown argument: --precision" in process.stderr
