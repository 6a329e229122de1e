"""`qdq check` with its options: what is printed and written, and the exit codes."""

import json

import onnx_ir as ir
import pytest
from small_graphs import SOUND, graph, load, op, pair
from test_fix import BODY, CONSTANTS, HEAD
from test_rules import BROKEN

from qdq.check import check_onnx
from qdq.check.rules import RULES
from qdq.check.sarif import format_sarif
from qdq.cli.main import main


@pytest.fixture
def qdq(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["check", *map(str, arguments)])
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return call


@pytest.fixture
def save(tmp_path):
    def call(text, name="m.onnx"):
        ir.save(load(text), tmp_path / name)
        return tmp_path / name

    return call


@pytest.mark.parametrize(
    ("case", "code"),
    [("QDQ102 not zero", 1), ("QDQ112 no pair", 1), ("QDQ121", 0), ("QDQ110 weight-only", 0)],
)
def test_exit_codes(qdq, save, case, code):
    found, out, _ = qdq(save(BROKEN[case][0]))
    assert found == code
    assert case.split()[0] in out


def test_clean_file(qdq, save):
    code, out, _ = qdq(save(SOUND))
    assert code == 0
    assert "found" not in out


def test_many_equal_findings_are_folded(qdq, save):
    lines = "".join(
        pair(f"p{i}", "x" if i == 0 else f"r{i - 1}") + op(f"r{i}", f"Relu(p{i})") for i in range(9)
    )
    text = graph(lines, op("y", "Neg(r8)")).replace("int8 z = {0}", "int8 z = {1}")
    code, out, _ = qdq(save(text))
    lines = [line for line in out.splitlines() if line.startswith("QDQ102")]
    assert code == 1
    assert (
        lines[0]
        == "QDQ102 error p0_q: the zero point is not zero (R-SYM). Fix: quantize symmetrically."
    )
    assert len(lines) == 6
    assert (
        lines[5]
        == "QDQ102 error ... and 13 more nodes, 18 in all: the zero point is not zero (R-SYM)."
    )
    assert (
        out.splitlines()[-1]
        == "found 18 errors, 0 warnings, 0 infos; qdq check --explain QDQ102 says why"
    )


def test_worst_comes_first(qdq, save):
    _, out, _ = qdq(
        save(
            BROKEN["QDQ112 no pair"][0]
            .replace("int8 z = {0}", "int8 z = {1}")
            .replace("float16", "float")
        )
    )
    severities = [line.split()[1] for line in out.splitlines() if line.startswith("QDQ")]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert set(severities) == {"error", "warning", "info"}


def test_select_and_ignore(qdq, save):
    path = save(BROKEN["QDQ112 no pair"][0].replace("int8 z = {0}", "int8 z = {1}"))
    assert qdq(path, "--select", "QDQ101,QDQ114")[0] == 0
    assert "QDQ112" not in qdq(path, "--select", "QDQ102")[1]
    assert qdq(path, "--ignore", "QDQ102", "--ignore", "qdq112")[0] == 0
    assert qdq(path, "--ignore", "QDQ102")[0] == 1


@pytest.mark.parametrize("flag", ["--select", "--ignore", "--explain"])
def test_unknown_id(qdq, save, flag):
    code, out, err = qdq(save(SOUND), flag, "QDQ1112")
    assert (code, out) == (2, "")
    assert "no rule 'QDQ1112'" in err
    assert "did you mean QDQ112?" in err


def test_unknown_id_leaves_no_file(qdq, save, tmp_path):
    assert qdq(save(SOUND), "--ignore", "X", "--fix", tmp_path / "out.onnx")[0] == 2
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("id", sorted(RULES))
def test_explain(qdq, id):
    code, out, _ = qdq("--explain", id)
    assert code == 0
    assert out.startswith(f"{id} ({RULES[id].severity}): ")
    assert "Why:" in out and "Evidence:" in out


def test_fix(qdq, tmp_path):
    text = (
        (HEAD + CONSTANTS + BODY)
        .replace("float xs", "float[1] xs")
        .replace("int8 xz", "int8[1] xz")
    )
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    assert qdq(tmp_path / "m.onnx", "--ignore", "QDQ117")[0] == 1
    code, out, _ = qdq(tmp_path / "m.onnx", "--ignore", "QDQ117", "--fix", tmp_path / "out.onnx")
    assert (code, out.splitlines()[0]) == (0, f"{tmp_path / 'out.onnx'}: 2 nodes of QDQ103 fixed")
    assert qdq(tmp_path / "m.onnx", "--ignore", "QDQ117", "--fix", tmp_path / "m.onnx")[0] == 0
    assert (
        qdq(tmp_path / "m.onnx", "--fix", tmp_path / "m.onnx")[1]
        .splitlines()[0]
        .endswith(": nothing fixed")
    )


def test_json_and_sarif(qdq, save, tmp_path):
    path = save(BROKEN["QDQ112 no pair"][0].replace("float16", "float"), "a file.onnx")
    assert qdq(path, "--json", tmp_path / "c.json", "--sarif", tmp_path / "c.sarif")[0] == 1
    written = json.loads((tmp_path / "c.json").read_text())
    assert [(f["rule"], f["severity"], f["node"]) for f in written["findings"]] == [
        ("QDQ112", "warning", "a"),
        ("QDQ121", "info", "g"),
    ]
    sarif = json.loads((tmp_path / "c.sarif").read_text())
    assert sarif == format_sarif(path, check_onnx(path).findings)


def test_sarif_has_the_structure_of_the_standard(save):
    """The properties that SARIF 2.1.0 requires, and the values that it allows."""
    path = save(BROKEN["QDQ112 no pair"][0].replace("float16", "float"), "a file.onnx")
    log = format_sarif(path, check_onnx(path).findings)
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "qdq"
    assert [rule["id"] for rule in driver["rules"]] == sorted(RULES)
    for rule in driver["rules"]:
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
        assert all(rule[key]["text"] for key in ("shortDescription", "fullDescription", "help"))
        assert "helpUri" not in rule
    assert run["artifacts"][0]["location"]["uri"].endswith("a%20file.onnx")
    assert [result["level"] for result in run["results"]] == ["warning", "note"]
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        artifact = location["physicalLocation"]["artifactLocation"]
        assert run["artifacts"][artifact["index"]]["location"]["uri"] == artifact["uri"]
        assert location["logicalLocations"][0]["name"]


def test_types_that_a_rule_explains_are_a_finding(save):
    report = check_onnx(save(BROKEN["QDQ107 weight"][0]))
    assert {finding.rule for finding in report.findings} == {"QDQ107", "QDQ201", "QDQ203"}


def test_types_that_no_rule_explains_are_a_finding_too(tmp_path):
    text = '<ir_version: 9, opset_import: ["": 19]> g (float[2] x, double[2] z) => (float[2] y) { y = Add(x, z) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    report = check_onnx(tmp_path / "m.onnx")
    assert {finding.rule for finding in report.problems} == {"QDQ201", "QDQ203"}
    assert "valid ONNX" not in report.format_table()
