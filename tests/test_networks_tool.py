"""tools/networks.py: what it reads from a run, what it calls a fault, and what it keeps."""

import ast
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import qdq
from qdq.errors import ArgumentError

FOLDER = Path(__file__).parents[1] / "tools"
TOOL = runpy.run_path(str(FOLDER / "networks.py"), run_name="networks")
Network, Row = TOOL["Network"], TOOL["Row"]


def parity(sqnr_db, floor_db, exact=0.5):
    return {"sqnr_db": sqnr_db, "tie_floor_db": floor_db, "exact": exact, "outputs": {}}


def candidate(sqnr_db, **scores):
    return {"sqnr_db": sqnr_db, "top1": None, "scores": scores}


@pytest.fixture
def report():
    """The parts of report.json that the tool reads, of a network with two outputs."""
    worst = parity(41.0, 44.5)
    return {
        "summary": {
            "candidates": {
                "float": candidate(None, mAP=0.5),
                "all int8": candidate(21.0, mAP=0.4),
                "mixed": candidate(30.0, mAP=0.45),
                "ONNX": candidate(30.0, mAP=0.46),
            },
            "parity": {**worst, "outputs": {"boxes": parity(70.0, 60.0), "scores": worst}},
            "int8_macs": 0.9,
            "census_expected_int8": 7,
            "census_missing_int8": ["stem"],
        },
        "findings": ["stem: not int8"],
        "check": {
            "findings": [
                {"severity": "info", "rule": "QDQ121", "node": "g", "message": "fp32"},
                {"severity": "warning", "rule": "QDQ112", "node": "n", "message": "no pair"},
            ]
        },
        "build": {"coverage": {"layers": [{"macs": 10}, {"macs": None}]}},
    }


def read(report, network=None, gate=""):
    row = TOOL["read_report"]("convnext", ["ptq"], 12.3, report, gate)
    return row, TOOL["find_faults"](row, network or Network("any", "random", list))


def test_a_line_says_what_the_report_says(report):
    row, faults = read(report)
    assert row.num_unknown == 1
    assert row.sqnr_db == {"all int8": 21.0, "mixed": 30.0}
    assert row.scores == {"mAP": [0.5, 0.46]}
    assert (row.margin_db, row.margin_output) == (-3.5, "scores")  # boxes are 10 dB above
    assert row.rules == ["QDQ112 n: no pair"]
    assert [fault.split()[0] for fault in faults] == ["parity", "1", "QDQ112"]
    table = TOOL["format_table"]([row])
    for text in (
        "unknown (90.0% of what is known)",
        "21.0 / 30.0",
        "mAP 0.500 -> 0.460",
        "-3.5 dB",
        "6 / 7",
        "finding: stem: not int8",
        "1 finished, 0 stopped with an error, 0 not installed; 1 with faults",
    ):
        assert text in table


def test_float_rounding_is_no_fault(report):
    report["summary"]["parity"] = parity(120.0, 140.0, exact=1.0)
    report["summary"]["census_missing_int8"] = []
    report["check"]["findings"].pop()
    row, faults = read(report)
    assert (row.margin_db, faults) == (None, [])


def test_hand_counts_and_the_gate(report):
    report["summary"] |= {"parity": parity(50.0, 50.5), "census_missing_int8": []}
    report["check"]["findings"] = []
    network = Network("any", "random", list, share=0.46, gate=("--min-int8-macs", "0.9"))
    _, faults = read(report, network, "pass  min-int8-macs: 0.9")
    assert faults[0] == "90.0% of all MACs in int8; 46.0% by hand"
    assert "the gate passes" in faults[1]
    report["summary"]["int8_macs"] = 0.462
    _, faults = read(report, network, "FAIL  min-int8-macs: 0.46")
    assert not faults


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("== float\nWARNING x\n", ("", "")),
        ("== float\nerror: no data.\n  fix: pass it.\n", ("no data.", "pass it.")),
        (
            "Traceback (most recent call last):\n  a\nValueError: x\n",
            ("TRACEBACK: ValueError: x", ""),
        ),
        (
            "Traceback (most recent call last):\nerror: x\n  fix: report it.\n",
            ("TRACEBACK: x", "report it."),
        ),
    ],
)
def test_the_error_of_a_log(log, error):
    assert TOOL["find_error"](log) == error


def test_an_expected_error_needs_its_words_and_a_fix():
    network = Network("any", "random", list, refusal="TorchScript")
    row = Row("silero_vad", "stopped", [], error="it is scripted (TorchScript).", fix="use Python.")
    assert TOOL["find_faults"](row, network) == []
    assert TOOL["find_faults"](replace(row, fix=""), network)
    assert TOOL["find_faults"](replace(row, error="no memory"), network)
    assert TOOL["find_faults"](replace(row, state="finished", error=""), network)


def test_a_missing_package_is_listed_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setitem(TOOL["PACKAGES"], "absent_package", "pip install absent")
    network = Network("any", "random", list, ("absent_package",))
    row = TOOL["read_or_run"]("convnext", network, tmp_path, 1)
    assert (row.state, row.fix) == ("missing", "pip install absent")
    assert TOOL["find_faults"](row, network) == []
    assert "convnext  pip install absent" in TOOL["format_table"]([row])


def test_patterns_select_networks():
    assert list(TOOL["select_networks"](("yolo*", "gru"))) == [
        "yolo11n",
        "yolov8n",
        "yolo12n",
        "gru",
    ]
    with pytest.raises(ArgumentError, match="no network is named absent"):
        TOOL["select_networks"](("gru", "absent"))


def test_every_function_that_a_network_names_exists(tmp_path):
    """The functions of network_builders.py; those of recipes have tests of their own."""
    defined = set()
    for node in ast.parse((FOLDER / "network_builders.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets}
    named = set()
    for network in TOOL["NETWORKS"].values():
        assert set(network.needs) <= set(TOOL["PACKAGES"])
        if network.arguments.__qualname__.startswith("_built"):
            named |= {text.rpartition(":")[2] for text in network.arguments(tmp_path)[1:4:2]}
    assert len(named) > 30
    assert named <= defined


def test_a_finished_network_is_kept_and_a_fault_is_run_again(tmp_path, monkeypatch):
    logs = []

    def stop(_command, log, _timeout):
        logs.append(log)
        log.write_text("error: it is scripted (TorchScript).\n  fix: use Python.\n")
        return 2

    monkeypatch.setitem(TOOL["read_or_run"].__globals__, "_start", stop)
    network = Network("any", "random", lambda _: ["--model", "a"], refusal="TorchScript")
    row = TOOL["read_or_run"]("convnext", network, tmp_path, 60)
    assert (row.state, row.fix) == ("stopped", "use Python.")
    assert TOOL["read_or_run"]("convnext", network, tmp_path, 60) == row
    assert logs == [tmp_path / "convnext.log"]

    TOOL["read_or_run"]("convnext", replace(network, refusal=""), tmp_path, 60)  # now a fault
    TOOL["read_or_run"]("convnext", replace(network, arguments=lambda _: []), tmp_path, 60)
    assert len(logs) == 3


def test_qdq_runs_in_a_process_with_a_log(tmp_path):
    log = tmp_path / "log"
    assert TOOL["_start"](["--version"], log, 60) == 0
    assert log.read_text().strip() == qdq.__version__
    assert TOOL["_start"](["--version"], log, 0) is None  # ended, because it takes longer
