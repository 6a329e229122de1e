"""The gate on stored runs: what it lets through, what it stops and why, what it refuses to judge."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from qdq import ArgumentError, DataError, gate_run
from qdq.cli.main import main
from qdq.gate import format_junit

DATA = Path(__file__).parent / "data"
GOOD, WORSE = DATA / "gate_good.json", DATA / "gate_worse.json"
# What the stored runs hold: top-1 84.4 and 83.6 % (float 84.8), SQNR 22.25 and 17.5 dB, agreement 0.986 and 0.971,
# int8 0.95 and 0.7 of the multiplications, 4.9 and 5.5 MB.


def gate(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(["gate", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def changed(tmp_path, change, source=GOOD):
    """A stored run with something in it changed."""
    content = json.loads(source.read_text())
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [
        ("max_drop", 0.4, 0.39),  # 84.8 - 84.4: in floats 0.40000000000000036
        ("min_sqnr", 22.25, 22.26),
        ("min_agreement", 0.986, 0.987),
        ("min_int8_macs", 0.95, 0.951),
        ("max_size", 4.9, 4.89),
    ],
)
def test_a_limit_is_kept_up_to_itself(name, met, missed):
    assert gate_run(GOOD, **{name: met}).passed
    report = gate_run(GOOD, **{name: missed})
    assert not report.passed
    (check,) = report.failures
    assert check.name == name.replace("_", "-")
    assert check.limit == missed
    assert check.value == pytest.approx(met)
    assert f"{missed:g}" in check.message


def test_macs_in_fp8(tmp_path):
    """Of the census by type; a layer in FP8 is not one in float."""

    def change(content):
        content["summary"]["census"] = {"FP8": {"expected": 2, "missing": [], "macs": 0.3}}
        stem, body, _ = content["build"]["layers"]
        stem |= {"int8": False, "built": "FP8"}
        body |= {"int8": False, "built": "Half"}

    path = changed(tmp_path, change)
    assert gate_run(path, min_fp8_macs=0.3).passed
    (check,) = gate_run(path, min_fp8_macs=0.4).failures
    assert "0.3000 of the MACs run in FP8" in check.message
    assert "stem" not in check.message
    assert "body" in check.message

    def only_int8(content):
        content["summary"]["census"] = {"Int8": {"expected": 2, "missing": [], "macs": 0.95}}

    assert not gate_run(changed(tmp_path, only_int8), min_fp8_macs=0.1).passed
    with pytest.raises(DataError, match="has no fraction of MACs in FP8"):
        gate_run(GOOD, min_fp8_macs=0.1)


def test_unknown_work_is_said_to_be_unknown(tmp_path):
    def change(content):
        content["build"]["coverage"]["layers"].append({"name": "loop", "share": None})

    (check,) = gate_run(changed(tmp_path, change), min_int8_macs=0.9).checks
    assert "(1 nodes of unknown work are not counted)" in check.message


def test_against_a_baseline():
    report = gate_run(WORSE, baseline=GOOD, max_drop=0.8, max_sqnr_drop=4.75)
    assert report.passed
    assert [check.value for check in report.checks] == pytest.approx([0.8, 4.75])
    assert len(gate_run(WORSE, baseline=GOOD, max_drop=0.79, max_sqnr_drop=4.74).failures) == 2
    better = gate_run(GOOD, baseline=WORSE, max_drop=0)
    assert better.passed
    assert "0.80 points above the baseline" in better.checks[0].message
    assert "the same as the baseline" in gate_run(GOOD, baseline=GOOD, max_drop=0).checks[0].message


def test_exit_code_and_reasons(capsys):
    code, out, _ = gate(capsys, GOOD, "--max-drop", 0.5, "--min-int8-macs", 0.9)
    assert code == 0
    assert out.splitlines()[-1].endswith("0 of 2 limits missed")
    code, out, _ = gate(
        capsys,
        WORSE,
        "--baseline",
        GOOD,
        "--max-drop",
        0.5,
        "--min-sqnr",
        17,
        "--min-int8-macs",
        0.9,
    )
    assert code == 1
    drop, sqnr, macs, verdict = out.splitlines()
    assert drop.startswith(
        "FAIL  max-drop: top-1 of ONNX is 83.60 %, 0.80 points below the baseline"
    )
    assert sqnr == "pass  min-sqnr: SQNR of ONNX is 17.50 dB; at least 17 dB"
    assert (
        "<script>alert(1)</script> (0.2500, the kernel takes fp16.), stem (0.0500, left in float"
        in macs
    )
    assert verdict.endswith("2 of 3 limits missed")


def test_a_run_folder(tmp_path):
    (tmp_path / "report.json").write_text(GOOD.read_text())
    assert gate_run(tmp_path, min_sqnr=20).passed


@pytest.mark.parametrize(
    ("where", "limit"),
    [
        (("evaluation", "candidates", -1, "top1"), {"max_drop": 1}),
        (("evaluation", "candidates", 0, "top1"), {"max_drop": 1}),
        (("evaluation", "candidates", -1, "sqnr_db"), {"min_sqnr": 1}),
        (("evaluation", "candidates", -1, "agreement"), {"min_agreement": 0.1}),
        (("summary", "int8_macs"), {"min_int8_macs": 0}),
        (("summary", "onnx_megabytes"), {"max_size": 100}),
    ],
)
@pytest.mark.parametrize("value", [None, "missing", True, float("nan"), float("inf")])
def test_a_fact_that_is_missing_never_passes(tmp_path, where, limit, value):
    def change(content):
        *keys, last = where
        for key in keys:
            content = content[key]
        content[last] = value

    path = changed(tmp_path, change)
    message = {
        None: "a limit asks for it",
        "missing": "is 'missing', expected",
        True: "is true, expected",
    }
    with pytest.raises(
        DataError, match=message.get(value, "cannot be read: (nan|inf) is not a number")
    ):
        gate_run(path, **limit)


@pytest.mark.parametrize("key", ["summary", "evaluation", "build"])
def test_a_section_that_is_missing(tmp_path, key):
    path = changed(tmp_path, lambda content: content.pop(key))
    if key == "build":  # only the reasons are in it
        assert not gate_run(path, min_int8_macs=0.99).passed
    else:
        with pytest.raises(DataError):
            gate_run(path, min_int8_macs=0.5)


def measure(content, **scores):
    """Give all candidates a metric instead of labels."""
    for candidate in content["evaluation"]["candidates"]:
        candidate.update(top1=None, top5=None, scores=scores)


def test_runs_on_other_images_are_not_compared(tmp_path):
    def refuse(first, second):
        with pytest.raises(DataError, match="not evaluated on the same images"):
            gate_run(first, baseline=second, max_drop=1)

    refuse(GOOD, changed(tmp_path, lambda content: content["evaluation"].update(images=499)))
    refuse(GOOD, changed(tmp_path, lambda content: content["evaluation"].pop("images")))
    refuse(
        GOOD,
        changed(tmp_path, lambda content: content["evaluation"]["candidates"][0].update(top1=0.85)),
    )
    copy = tmp_path / "copy.json"
    copy.write_text(changed(tmp_path, lambda content: measure(content, mAP=0.4)).read_text())
    refuse(copy, changed(tmp_path, lambda content: measure(content, mAP=0.41)))
    refuse(copy, changed(tmp_path, lambda content: measure(content, mIoU=0.4)))
    refuse(copy, GOOD)
    same = changed(tmp_path, lambda content: measure(content, mAP=0.4 + 1e-7))
    assert gate_run(copy, baseline=same, max_score_drop={"mAP": 0.01}).passed
    copy.write_text(
        changed(tmp_path, lambda content: content["data"].update(labels_digest="0123")).read_text()
    )
    refuse(copy, changed(tmp_path, lambda content: content["data"].update(labels_digest="4567")))


def test_where_the_images_lie_and_what_was_quantized_does_not_matter(tmp_path):
    def move(content):
        content["data"]["evaluation"] = "500 of 500 images in /elsewhere, drawn with seed 0"

    assert gate_run(GOOD, baseline=changed(tmp_path, move), max_drop=0).passed
    copy = tmp_path / "copy.json"
    copy.write_text(
        changed(tmp_path, lambda content: content["data"].update(labels_digest="0123")).read_text()
    )
    # One of the two is from before there were digests.
    assert gate_run(GOOD, baseline=copy, max_drop=0).passed

    def retrain(content):
        content["data"]["labels_digest"] = "0123"
        content["evaluation"]["candidates"][0]["top1"] = 0.86

    assert gate_run(changed(tmp_path, retrain), baseline=copy, max_drop=0).passed


@pytest.mark.parametrize(
    ("where", "value", "limit", "message"),
    [
        (
            ("evaluation", "candidates", -1, "sqnr_db"),
            22.0456,
            {"min_sqnr": 22.05},
            "22.046 dB; at least 22.05 dB",
        ),
        (
            ("evaluation", "candidates", -1, "agreement"),
            0.98999,
            {"min_agreement": 0.99},
            "0.98999 of the images",
        ),
        (("summary", "onnx_megabytes"), 5.0000001, {"max_size": 5.0}, "5.0000001 MB; at most 5 MB"),
        (
            ("evaluation", "candidates", -1, "top1"),
            0.8429999,
            {"max_drop": 0.5},
            ", 0.50001 points below float",
        ),
    ],
)
def test_what_is_missed_by_little_does_not_look_like_the_limit(
    tmp_path, where, value, limit, message
):
    def change(content):
        *keys, last = where
        for key in keys:
            content = content[key]
        content[last] = value

    (check,) = gate_run(changed(tmp_path, change), **limit).checks
    assert not check.passed and message in check.message


def with_outputs(report):
    report["evaluation"]["candidates"][-1] |= {
        "agreement": None,
        "sqnr_db": 15.9,
        "outputs": [
            {"name": "boxes", "agreement": None, "sqnr_db": 35.8},
            {"name": "class=scores", "agreement": None, "sqnr_db": 15.9},
        ],
    }


def test_each_output_has_its_limit(tmp_path, capsys):
    run = changed(tmp_path, with_outputs)
    code, out, _ = gate(
        capsys, "--min-sqnr", "boxes=30", "--min-sqnr", "class=scores=20", "--max-size", 9, run
    )
    assert code == 1
    assert out.splitlines()[:3] == [
        "pass  min-sqnr of boxes: SQNR of boxes of ONNX is 35.80 dB; at least 30 dB",
        "FAIL  min-sqnr of class=scores: SQNR of class=scores of ONNX is 15.90 dB; at least 20 dB",
        "pass  max-size: the ONNX file has 4.90 MB; at most 9 MB",
    ]
    (check,) = gate_run(run, min_sqnr=16).checks
    assert not check.passed
    assert "is 15.90 dB (class=scores, the worst of 2 outputs); at least 16 dB" in check.message
    assert gate_run(run, min_sqnr={"boxes": 35}).passed
    with pytest.raises(DataError, match="no finite SQNR of the output logits") as caught:
        gate_run(run, min_sqnr={"logits": 1})
    assert "name one of boxes, class=scores" in caught.value.fix
    with pytest.raises(DataError, match="no agreement of ONNX"):
        gate_run(run, min_agreement=0.9)


def with_scores(report):
    for candidate, score in zip(
        report["evaluation"]["candidates"], (0.5, 0.2, 0.41, 0.4), strict=False
    ):
        candidate["scores"] = {"mAP": score}
    report["evaluation"]["candidates"][-1]["scores"] = {"mAP": 0.4}


def test_metrics_of_the_task_have_their_limits(tmp_path, capsys):
    run = changed(tmp_path, with_scores)
    code, out, _ = gate(capsys, "--min-score", "mAP=0.4", "--max-score-drop", "mAP=0.05", run)
    assert code == 1
    assert out.splitlines()[:2] == [
        "pass  min-score of mAP: mAP of ONNX is 0.4000; at least 0.4",
        "FAIL  max-score-drop of mAP: mAP of ONNX is 0.4000, and 0.5000 of float; at most 0.05",
    ]
    baseline = changed(tmp_path, with_scores)
    assert gate_run(run, baseline=baseline, max_score_drop={"mAP": 0}).passed
    with pytest.raises(DataError, match="no mIoU of ONNX") as caught:
        gate_run(run, min_score={"mIoU": 0.1})
    assert caught.value.fix == "name one of mAP."
    with pytest.raises(DataError, match="no mAP of ONNX"):
        gate_run(GOOD, min_score={"mAP": 0.1})
    with pytest.raises(ArgumentError, match="names no metric"):
        gate_run(run, min_score=0.3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ([], "no limit is given"),
        (["--max-drop", "nan"], "max_drop is nan"),
        (["--max-drop", "-1"], "max_drop is -1"),
        (["--min-int8-macs", "90"], "between 0 and 1, a fraction"),
        (["--max-size", "inf"], "max_size is inf"),
        (["--max-sqnr-drop", "1"], "no baseline"),
        (["--baseline", GOOD, "--min-sqnr", "1"], "no limit that compares with it"),
        (["--max-drop", "half"], "invalid value for --max-drop"),
        (["--min-sqnr", "half"], "invalid value for --min-sqnr"),
        (["--min-sqnr", "scores=x"], "invalid value for --min-sqnr"),
        (["--min-sqnr", "20", "--min-sqnr", "21"], "invalid value for --min-sqnr: 20, 21"),
        (["--min-sqnr", "a=2", "--min-sqnr", "a=3"], "invalid value for --min-sqnr: a=2, a=3"),
        (["--min-sqnr", "scores=inf"], "min_sqnr of scores is inf"),
        (["--min-sqnr", "scores=20"], "has no finite SQNR of the output scores of ONNX"),
        (["--nonsense"], "--nonsense"),
        (["--min-sqnr", "1", "--junit", "/dev/null/gate.xml"], "cannot write /dev/null/gate.xml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, limits, message):
    code, out, errors = gate(capsys, GOOD, *limits)
    assert code == 2
    assert out == ""
    error, fix = errors.splitlines()
    assert message in error
    assert fix.startswith("  fix: ")


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"evaluation": {"candidates": []}}', "[" * 10**5, "\xff"]
)
def test_what_is_no_run(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "report.json").write_bytes(content.encode("latin-1"))
    code, out, errors = gate(capsys, tmp_path, "--min-sqnr", 1)
    assert code == 2
    assert out == ""
    assert "report.json" in errors.splitlines()[0]


def assert_is_junit(xml):
    """The rules of Ant's JUnit.xsd, which are those of Jenkins' junit-10.xsd and more; written out by hand."""
    root = ElementTree.fromstring(xml)  # noqa: S314  # what the gate wrote
    assert root.tag == "testsuites"
    assert root.attrib == {}
    (suite,) = root
    assert suite.tag == "testsuite"
    required = {
        "name",
        "timestamp",
        "hostname",
        "tests",
        "failures",
        "errors",
        "time",
        "package",
        "id",
    }
    assert set(suite.attrib) == required
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    assert suite.get("hostname") == "localhost"
    assert float(suite.get("time")) >= 0
    tags = [child.tag for child in suite]
    cases = suite.findall("testcase")
    assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
    assert int(suite.get("tests")) == len(cases)
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
    assert int(suite.get("errors")) == len(suite.findall("testcase/error"))
    for case in cases:
        assert set(case.attrib) == {"name", "classname", "time"}
        assert [child.tag for child in case] in ([], ["failure"], ["error"])
        for failure in case:
            assert set(failure.attrib) == {"type", "message"}
            assert failure.text == failure.get("message")
    return cases


def test_junit_and_json(tmp_path, capsys):
    junit, written = tmp_path / "out" / "gate.xml", tmp_path / "gate.json"
    code, out, _ = gate(
        capsys, WORSE, "--min-sqnr", 17, "--min-int8-macs", 0.9, "--junit", junit, "--json", written
    )
    assert code == 1
    good, bad = assert_is_junit(junit.read_bytes())
    assert (good.get("name"), list(good)) == ("min-sqnr", [])
    assert bad.get("name") == "min-int8-macs"
    assert "<script>alert(1)</script>" in bad[0].text
    assert bad[0].text in out
    content = json.loads(written.read_text())
    assert content["passed"] is False
    assert [(check["name"], check["passed"]) for check in content["checks"]] == [
        ("min-sqnr", True),
        ("min-int8-macs", False),
    ]
    assert content["checks"][1]["value"] == pytest.approx(0.7)


def test_what_cannot_be_judged_leaves_no_green_result_behind(tmp_path, capsys):
    junit, written = tmp_path / "gate.xml", tmp_path / "gate.json"
    files = ("--junit", junit, "--json", written)
    assert gate(capsys, GOOD, "--min-sqnr", 17, *files)[0] == 0
    assert [len(case) for case in assert_is_junit(junit.read_bytes())] == [0]
    code, out, _ = gate(capsys, tmp_path / "no\x1b run", "--min-sqnr", 17, *files)
    assert (code, out) == (2, "")
    (case,) = assert_is_junit(junit.read_bytes())
    assert case[0].tag == "error" and case[0].get("type") == "ArgumentError"
    assert "there is no" in case[0].text and "no\\x1b run" in case.get("classname")
    content = json.loads(written.read_text())
    assert content["passed"] is False and "there is no" in content["error"]


def test_names_are_data(tmp_path):
    """What XML and terminals cannot take does not reach them."""
    name = "a\x00b\x1b[31m]]>&\nc\ud800"

    def change(content):
        content["evaluation"]["candidates"][-1]["name"] = name
        content["build"]["layers"][0] |= {"module": name, "int8": False}

    report = gate_run(changed(tmp_path, change), min_sqnr=99, min_int8_macs=1)
    table = report.format_table()
    assert len(table.splitlines()) == 3
    shown = "a\\x00b\\x1b[31m]]>&\\nc?"
    assert shown in table
    cases = assert_is_junit(format_junit(report))
    assert shown in cases[1][0].text


def test_needs_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from qdq.cli.gate import gate\nfrom pathlib import Path\n"
        f"sys.exit(gate(Path({str(GOOD)!r}), min_sqnr=('20',)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class TestTargets:
    """Results that `verify.sh` wrote, here by hand."""

    @staticmethod
    def write(path, speedup=None, int8_ms=2.0, failed=(), model=64 * "a"):
        figures = {"int8_ms": int8_ms, **({"speedup": speedup} if speedup else {})}
        status = "passed" if speedup else "not checked"
        checks = [{"name": "time", "status": status, "text": "no float", "figures": figures}]
        for name in failed:
            checks.append({"name": name, "status": "failed", "text": "bad", "figures": {}})
        keys = ("tensorrt", "compute_capability", "system", "python", "numpy")
        result = {
            "format": "qdq result 2",
            "model_sha256": model,
            "verdict": "failed" if failed else "passed",
            "passed": 1,
            "failed": len(failed),
            "not_checked": 0,
            "environment": {**dict.fromkeys(keys, "1"), "gpu": path.stem},
            "checks": checks,
        }
        path.write_text(json.dumps(result))
        return path

    def test_the_worst_target_counts(self, tmp_path):
        targets = [self.write(tmp_path / "L4", 1.6), self.write(tmp_path / "Orin", 1.1, 5.0)]
        assert gate_run(GOOD, targets=targets, min_speedup=1.1, max_latency_ms=5).passed
        report = gate_run(GOOD, targets=targets, min_speedup=1.11, max_latency_ms=4.99)
        assert [check.name for check in report.failures] == ["min-speedup", "max-latency-ms"]
        assert [check.value for check in report.failures] == [1.1, 5.0]
        assert "on Orin, TensorRT 1 (" in report.failures[0].message

    def test_the_worst_of_two_targets_of_one_kind_counts(self, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        second.mkdir()
        targets = [self.write(first / "Orin", 0.5, 9.0), self.write(second / "Orin", 2.0, 1.0)]
        report = gate_run(GOOD, targets=targets, min_speedup=1.0, max_latency_ms=5.0)
        assert [check.value for check in report.failures] == [0.5, 9.0]
        assert str(first / "Orin") in report.failures[0].message

    def test_a_failed_check_of_a_target_fails(self, tmp_path, capsys):
        target = self.write(tmp_path / "L4", 1.6, failed=["census"])
        code, out, _ = gate(capsys, GOOD, "--target", target, "--min-speedup", 1.5)
        assert code == 1
        assert (
            "FAIL  target: L4, TensorRT 1: failed, 1 passed, 1 failed, 0 not checked; census: bad"
            in out
        )
        assert "1 of 2 limits missed" in out

    def test_a_time_that_was_not_measured_is_an_error(self, tmp_path):
        target = self.write(tmp_path / "L4")
        with pytest.raises(DataError, match="has no speedup, and a limit asks for it: no float"):
            gate_run(GOOD, targets=[target], min_speedup=1.2)
        assert gate_run(GOOD, targets=[target], max_latency_ms=2).passed

    def test_a_target_of_another_bundle_is_refused(self, tmp_path, capsys):
        """Its times and numbers are of another model, however good they are."""
        target = self.write(tmp_path / "L4", 1.6, model=64 * "b")
        code, _, err = gate(capsys, GOOD, "--target", target, "--min-speedup", 1.5)
        assert code == 2
        assert "is of another bundle: it was made from an ONNX file with SHA-256 bbbb" in err

    def test_a_report_that_does_not_tell_its_model(self, tmp_path):
        report = changed(tmp_path, lambda content: content.pop("model_sha256"))
        with pytest.raises(DataError, match="does not tell which ONNX file it is of"):
            gate_run(report, targets=[self.write(tmp_path / "L4", 1.6)], min_speedup=1.5)

    def test_a_limit_without_a_target_is_an_error(self):
        with pytest.raises(ArgumentError, match="no result of a target"):
            gate_run(GOOD, max_latency_ms=2)
