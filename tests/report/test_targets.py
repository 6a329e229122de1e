"""Results of targets in the page of a run."""

import json

import pytest
from made_report import make_report

import qdq
from qdq.check.payoff import LayerTime, Payoff
from qdq.cli.main import main
from qdq.files import to_jsonable
from qdq.report.load import parse_report
from qdq.report.page import render_report
from qdq.report.targets import list_target_rows, load_targets
from qdq.report.wording import NOTHING

MODEL = 64 * "a"


def write_result(path, gpu, checks, verdict="passed"):
    counts = {}
    for status in ("passed", "failed", "not checked"):
        counts[status.replace(" ", "_")] = sum(check["status"] == status for check in checks)
    environment = {
        "tensorrt": "10.3.0",
        "gpu": gpu,
        "compute_capability": "8.9",
        "system": "Linux",
        "python": "none",
        "numpy": "none",
    }
    result = {"format": "qdq result 2", "verdict": verdict, **counts, "environment": environment}
    result["model_sha256"] = MODEL
    path.write_text(json.dumps({**result, "checks": checks}))
    return path


def make_check(name, status="passed", text="fine", **figures):
    return {"name": name, "status": status, "text": text, "figures": figures}


@pytest.fixture
def two_targets(tmp_path):
    time = make_check("time", int8_ms=1.25, float_ms=2.5, speedup=2.0)
    census = make_check("census", "failed", "3 of 4 in int8; <b>conv2</b>")
    unread = make_check("time", "not checked", "int8 takes 3 ms; no float network", int8_ms=3)
    return [
        write_result(tmp_path / "l4.json", "NVIDIA L4", [time]),
        write_result(tmp_path / "orin.json", "Orin", [census, unread], "failed"),
    ]


def test_one_column_for_each_target(two_targets):
    targets = load_targets(two_targets, MODEL)
    names = [target.name for target in targets]
    assert names == ["NVIDIA L4, TensorRT 10.3.0", "Orin, TensorRT 10.3.0"]
    rows = {row.name: row.cells for row in list_target_rows(targets)}
    assert [cell.text for cell in rows["verdict"]] == ["passed", "failed"]
    assert [cell.text for cell in rows["quantized engine, ms"]] == ["1.25", "3"]
    assert [cell.text for cell in rows["speedup"]] == ["2", NOTHING]
    assert rows["speedup"][1].note == "int8 takes 3 ms; no float network"
    assert [cell.is_bad for cell in rows["census"]] == [False, True]
    assert rows["census"][0].note == "not among the checks of this target"


def test_the_page_shows_them(two_targets, tmp_path):
    report = parse_report(make_report(["conv1", "conv2"]), tmp_path / "report.json")
    assert 'id="target"' not in render_report(report)
    page = render_report(report, load_targets(two_targets, MODEL))
    assert page.count("NVIDIA L4, TensorRT 10.3.0") == 1
    assert "&lt;b&gt;conv2" in page
    assert "<b>conv2" not in page


def test_predicted_times_are_shown(tmp_path):
    """`qdq ptq --gpu` has them."""
    content = make_report(["conv1", "conv2"])
    report = parse_report(content, tmp_path / "report.json")
    assert 'id="payoff"' not in render_report(report)
    layers = [{"name": "conv2/<b>Conv", "float16": 31.25, "int8": 4.5, "kind": "product"}]
    times = {
        "gpu": "l4",
        "inputs": {"x": "1x3"},
        "float16": 1500.0,
        "int8": 1500.0,
        "int8_half_rest": 1000.0,
    }
    figures = {"num_kernels": 3, "num_unknown": 2, "losses": (), "types": ("FP8",)}
    payoff = Payoff(layers=(LayerTime(**layers[0]),), **times, **figures)
    content["check"]["payoff"] = to_jsonable(payoff)
    page = render_report(parse_report(content, tmp_path / "report.json"))
    assert (
        "Predicted on l4 from data sheets, for x 1x3: fp16 1.500 ms, FP8 1.500 ms, 1.00 times as fast; with the float "
        "part in fp16 1.000 ms, 1.50 times as fast. 2 kernels of unknown size are not counted. That does not pay "
        "(QDQ150). The layers" in page
    )
    assert "Will FP8 pay" in page
    assert "<td>31.2</td><td>4.5</td>" in page
    assert "conv2/&lt;b&gt;Conv" in page


def test_the_command(two_targets, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    report = make_report(["conv1", "conv2"], model_sha256=MODEL)
    (run / "report.json").write_text(json.dumps(report))
    page, content = tmp_path / "page.html", tmp_path / "page.json"
    files = [*map(str, two_targets), "-o", str(page), "--json", str(content)]
    with pytest.raises(SystemExit) as exit:
        main(["report", str(run), "--target", *files])
    assert exit.value.code == 0
    assert 'id="target"' in page.read_text()
    assert len(json.loads(content.read_text())["targets"]) == 2
    with pytest.raises(SystemExit) as exit:
        main(["report", str(run), str(run), "--target", *files])
    assert exit.value.code == 2
    assert "--target is given, and several runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "qdq result 9"}, "its format is 'qdq result 9'"),
        ({"verdict": "fine"}, "verdict"),
        ({"checks": [{"name": "time"}]}, "checks"),
    ],
)
def test_another_file_is_refused(tmp_path, change, message):
    path = write_result(tmp_path / "r.json", "L4", [])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(qdq.DataError, match=message):
        load_targets([path], MODEL)


def test_a_file_that_is_no_result(tmp_path):
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(qdq.DataError, match="is not the result of a target: its format is null"):
        load_targets([tmp_path / "r.json"], MODEL)


def test_the_result_of_another_bundle_is_refused(two_targets, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    report = make_report(["conv1", "conv2"], model_sha256=64 * "b")
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit) as exit:
        main(["report", str(run), "--target", str(two_targets[0])])
    assert exit.value.code == 2
    assert "l4.json is of another bundle" in capsys.readouterr().err
    assert not (run / "report.html").exists()
