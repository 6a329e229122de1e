"""The report of a whole small run: what stands in it is what the stages returned."""

import hashlib
import json
from dataclasses import dataclass, replace

import pytest
import torch

import qdq
from qdq.check import Finding

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")

from qdq.workloads.classification.batches import ImageBatches
from qdq.workloads.workload import Workload

pytestmark = pytest.mark.trt


@pytest.fixture
def stages(residual, tmp_path):
    """What every stage returned for the small network, as the arguments of `write_report`."""
    calibration = ImageBatches(torch.randn(4, 3, 12, 12), None, 2, 4, "4 random images", "none")
    images = ImageBatches(
        torch.randn(6, 3, 12, 12), [0, 1, 2, 3, 4, 0], 4, 6, "6 random images", "made up"
    )
    workload = Workload("small", "random", residual, calibration, images, list)
    run = qdq.start_run(tmp_path / "run", seed=7, settings={"model": "small", "output": tmp_path})
    run.stage("everything")
    logits = {"float": qdq.predict(residual, images)}
    folded = qdq.fold_batchnorm(residual, calibration.images)
    plan = qdq.swap_modules(residual, calibration.images)
    rewired = qdq.rewire_operations(residual, calibration.images)
    ranges = qdq.calibrate_model(residual, calibration, method="max")
    analysis = qdq.analyze_layers(residual, calibration, max_float_layers=1, max_float_share=1)
    logits["mixed"] = qdq.predict(residual, images)
    exported = qdq.export_onnx(residual, calibration.images, run.folder / "model.onnx")
    check = qdq.check_onnx(
        exported.path, expected=logits["mixed"], found=qdq.predict(exported.path, images)
    )
    build = qdq.build_engine(exported.path, backend="rtx")
    evaluation = qdq.evaluate_outputs(logits, images.labels, files={"float": residual})
    return {
        "run": run,
        "workload": workload,
        "folded": folded,
        "plan": plan,
        "rewired": rewired,
        "ranges": ranges,
        "analysis": analysis,
        "exported": exported,
        "check": check,
        "build": build,
        "evaluation": evaluation,
    }


def test_report_says_what_the_stages_found(stages, capsys):
    report = qdq.write_report(**stages)
    folder = stages["run"].folder
    written = json.loads((folder / "report.json").read_text())
    assert report.path == folder / "report.json"
    assert written["model"] == "small, random"
    digest = hashlib.sha256(b"0,1,2,3,4,0").hexdigest()[:16]
    assert written["data"] == {
        "calibration": "4 random images",
        "evaluation": "6 random images",
        "labels": "made up",
        "labels_digest": digest,
    }
    assert written["settings"] == {"model": "small", "output": str(folder.parent)}
    assert written["seed"] == 7
    assert written["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert written["seconds"]["everything"] > 0

    summary = written["summary"]
    assert (summary["batchnorms"], summary["batchnorms_folded"]) == (1, 1)
    assert (summary["weighted_layers"], summary["weighted_layers_swapped"]) == (3, 3)
    assert summary["float_layers"] == stages["analysis"].float_layers
    assert len(summary["float_layers"]) == 1
    assert summary["int8_macs"] == pytest.approx(stages["build"].int8_share)
    assert qdq.gate_run(
        folder, min_agreement=0, min_int8_macs=summary["int8_macs"], max_size=1
    ).passed
    assert summary["census_expected_int8"] == 2  # three layers, one of them left in float
    assert summary["census_missing_int8"] == written["findings"] == []
    assert summary["missed_modules"] == summary["layers_without_range"] == []
    assert summary["onnx_megabytes"] == pytest.approx((folder / "model.onnx").stat().st_size / 1e6)
    assert summary["engine_megabytes"] == pytest.approx(
        (folder / "model.rtx.engine").stat().st_size / 1e6
    )
    assert summary["candidates"]["mixed"]["sqnr_db"] == pytest.approx(
        stages["evaluation"].candidates[1].sqnr_db
    )
    assert summary["candidates"]["float"]["sqnr_db"] is None  # infinite: JSON has no word for it
    assert summary["parity"]["images"] == 6

    assert [layer["name"] for layer in written["layers"]] == ["stem", "conv", "add", "pool", "head"]
    assert written["command"] == stages["run"].command
    assert report.page == folder / "report.html"
    assert "small, random" in report.page.read_text()

    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "report.txt").read_text() == report.text + "\n"
    assert report.text in capsys.readouterr().out
    assert (report.findings, report.exit_code) == ((), 0)


def test_page_has_every_section_in_order(stages):
    text = qdq.write_report(**stages).text
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    expected = [
        "Model",
        "Data",
        "Layers",
        "Functions",
        "Sensitivity",
        "Exported file",
        "Engine",
        "Result",
        "On the target",
        "Findings",
    ]
    assert titles == [*expected, "Files"]
    assert "Findings\n  none" in text
    for command in stages["build"].trtexec.values():
        assert f"\n  {command}\n" in text


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning returns."""

    losses: tuple[float, ...]
    curve: tuple[dict[str, float], ...]

    def format_table(self):
        return "2 steps of fine-tuning"


def test_fine_tuning_stands_in_all_three_files(stages):
    tuned = Tuned((0.5, 0.25), ({"step": 0, "metric": 10.0}, {"step": 2, "metric": 20.0}))
    report = qdq.write_report(**stages, tuning=tuned)
    written = json.loads(report.path.read_text())["tuning"]
    assert written == {
        "losses": [0.5, 0.25],
        "curve": list(tuned.curve),
        "text": "2 steps of fine-tuning",
    }
    assert "Fine-tuning\n  2 steps of fine-tuning" in report.text
    assert "step 2: 20" in report.page.read_text()


def test_findings_of_every_kind_give_exit_code_1(stages):
    check = replace(
        stages["check"], findings=(Finding("QDQ190", "model.onnx", "differs", "export again."),)
    )
    ranges = [
        replace(stages["ranges"][0], amax=None, note="left in float: it saw zeros only"),
        *stages["ranges"][1:],
    ]
    lost = next(layer for layer in stages["build"].layers if layer.expected_int8)
    layers = [
        replace(layer, int8=False, built="Half", reason="no int8 kernel")
        if layer is lost
        else layer
        for layer in stages["build"].layers
    ]
    build = replace(stages["build"], layers=layers)
    report = qdq.write_report(**{**stages, "check": check, "ranges": ranges, "build": build})
    assert report.exit_code == 1
    assert report.findings == (
        "QDQ190 model.onnx: differs",
        f"{ranges[0].name}: left in float: it saw zeros only",
        f"{lost.module}: no int8 kernel",
    )
    assert report.summary["layers_without_range"] == [ranges[0].name.rpartition(".")[0]]
    assert report.summary["census_missing_int8"] == [lost.module]
    assert all(finding in report.text for finding in report.findings)
