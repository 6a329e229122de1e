"""Names as messages and tables have them, and hostile ones in every command that prints some."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from qdq import Statistics
from qdq.cli.main import main
from qdq.text import PrintableFormatter, group_names, list_names, make_printable, printable

FAKE = "error: faked"
HOSTILE = {
    "line": f"a\n{FAKE}",
    "return": f"a\r{FAKE}",
    "separators": f"a\x85{FAKE}\u2028{FAKE}\u2029{FAKE}\x0b{FAKE}\x0c{FAKE}",
    "colour": "a\x1b[31m",
    "clear": "a\x1b[2J\x1b[1;1H\x9b2J",
    "title": "a\x1b]0;title\x07",
    "backspace": "safe\b\b\b\b",
    "direction": "a\u202egnp\u202c\u2066\u200f",
    "invisible": "a\u200b\ufeff\u00ad",
    "long": "a" * 100_000,
}


def test_groups_and_names_keep_their_order():
    groups = group_names([(("b", 1), "z"), (("a", 2), "y"), (("b", 1), "a"), (("b", 1), "z")])
    assert list(groups.items()) == [(("b", 1), ["z", "a", "z"]), (("a", 2), ["y"])]
    assert group_names([]) == {}


def test_of_many_names_the_first():
    assert list_names([], 2) == ""
    assert list_names(["a", "b"], 2) == "a, b"
    assert list_names(["a", "b", "c", "d", "e"], 2) == "a, b and 3 more"


def test_printable_is_one_line_that_says_what_was_there():
    assert printable("conv1.weight größe 層") == "conv1.weight größe 層"
    assert printable("a\nb\x1b\u202e\ud800") == r"a\nb\x1b\u202e\ud800"
    assert printable(Path("a\tb")) == r"a\tb"
    assert printable("x" * 200) == "x" * 200
    assert printable("ab" * 100_000, most=10) == "aba...abab"
    assert len(printable("\n" * 100_000)) == 200


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_printable_shows_nothing_but_what_can_be_seen(name):
    assert printable(name).isprintable()
    assert len(printable(name)) <= 200


@dataclass(frozen=True)
class Row:
    name: str
    number: float


@dataclass(frozen=True)
class Table:
    path: Path
    rows: tuple[Row, ...]
    notes: dict[str, list[str]]


def test_a_report_for_its_table():
    report = Table(Path("a\nb"), (Row("c\x1b", 1.0),), {"d\r": ["e\u202e", "f"]})
    shown = make_printable(report)
    assert shown == Table(Path(r"a\nb"), (Row(r"c\x1b", 1.0),), {r"d\r": [r"e\u202e", "f"]})
    assert report.rows[0].name == "c\x1b"


def test_the_log_is_one_line_a_record():
    record = logging.LogRecord("qdq.x", logging.WARNING, "", 0, "%s is odd", (f"a\n{FAKE}",), None)
    assert (
        PrintableFormatter("%(levelname)s %(message)s").format(record)
        == rf"WARNING a\n{FAKE} is odd"
    )


def make_file(path, name):
    """One layer with Q/DQ that breaks a rule, and nodes and tensors that bear a name."""
    weights = ", ".join(["0.5"] * 576)
    text = f"""
    <ir_version: 9, opset_import: ["": 19]>
    g (float[1,8,8,8] x) => (float[1,8,8,8] y)
    <float s = {{0.1}}, int8 z = {{3}}, float t = {{0.2}}, int8 u = {{0}},
     float[8,8,3,3] w = {{{weights}}}>
    {{
        a = QuantizeLinear(x, s, z)
        b = DequantizeLinear(a, s, z)
        d = Relu(b)
        q = QuantizeLinear(w, t, u)
        r = DequantizeLinear(q, t, u)
        y = Conv <pads = [1, 1, 1, 1]> (d, r)
    }}
    """
    model = ir.from_onnx_text(text)
    for number, node in enumerate(model.graph):
        node.name = f"{name}{number}"
        if node.outputs[0].name != "y":
            node.outputs[0].name = f"{name} tensor {number}"
    ir.save(model, path)
    return path


def call(capfd, *arguments):
    """What a command prints, native libraries included."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code, *capfd.readouterr()


def assert_harmless(*texts):
    for text in texts:
        for line in text.split("\n"):
            assert line.isprintable(), line[:300]
            assert not line.startswith(FAKE)
            assert len(line) < 5000


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_in_a_file_that_is_checked(tmp_path, capfd, name):
    path = make_file(tmp_path / "m.onnx", name)
    code, out, err = call(
        capfd, "check", path, "--json", tmp_path / "c.json", "--sarif", tmp_path / "c.sarif"
    )
    assert (code, err) == (1, "")
    assert "QDQ102" in out
    assert_harmless(out)
    findings = json.loads((tmp_path / "c.json").read_text())["findings"]
    # Programs get the name unchanged.
    assert any(name in finding["node"] for finding in findings)
    assert json.loads((tmp_path / "c.sarif").read_text())["runs"][0]["results"]


@pytest.mark.trt
@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_in_a_file_that_is_built(tmp_path, capfd, name):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    code, out, err = call(capfd, "build", make_file(tmp_path / "m.onnx", name), "--backend", "rtx")
    assert code in (0, 1, 2)
    assert_harmless(out, err)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_in_statistics_and_plans(tmp_path, capfd, name, quantized, images):
    from qdq import collect_statistics

    collected = collect_statistics(quantized, [images])
    tensors = {name + key: tensor for key, tensor in collected.tensors.items()}
    formats = {name + key: form for key, form in collected.formats.items()}
    renamed = Statistics(tensors, formats, collected.batches, collected.model)
    renamed.save(tmp_path / "c.safetensors")
    for verb in ("show", "solve"):
        code, out, err = call(capfd, "calibrate", verb, tmp_path / "c.safetensors")
        assert code == 0
        assert_harmless(out, err)
    for plan, precision in (("a", "int8"), ("b", "float")):
        (tmp_path / f"{plan}.yaml").write_text(json.dumps({"layers": {name: precision}}))
    code, out, err = call(capfd, "plan", "diff", tmp_path / "a.yaml", tmp_path / "b.yaml")
    # A key of YAML has at most 1024 characters.
    assert code == (2 if name == HOSTILE["long"] else 1)
    assert_harmless(out, err)


@pytest.mark.parametrize("name", [HOSTILE["line"], HOSTILE["clear"], HOSTILE["direction"]])
def test_names_of_files_and_arguments(tmp_path, capfd, name):
    for arguments in (
        ["check", tmp_path / name],
        ["build", tmp_path / name],
        ["report", tmp_path / name],
        ["explain", tmp_path / name, name],
        ["gate", tmp_path / name, "--max-drop", "1"],
        ["plan", "diff", tmp_path / name, tmp_path / name],
        ["calibrate", "show", tmp_path / name],
        ["env", name],
        [name],
        ["check", f"--{name}"],
        ["check", "--select", name, "m.onnx"],
    ):
        code, out, err = call(capfd, *arguments)
        assert (code, out) == (2, "")
        assert_harmless(err)
        assert len(err.splitlines()) == 2
