"""Reports that are missing, old or damaged end in one line that says what to do."""

import copy
import json
from collections import defaultdict

import pytest
from made_report import TUNING, make_report

from qdq import ArgumentError, DataError, compare_runs, explain_layer, gate_run
from qdq.gate import format_junit
from qdq.report.compare import render_comparison
from qdq.report.load import load_report
from qdq.report.page import render_report


def test_what_is_no_run(tmp_path):
    with pytest.raises(ArgumentError, match=r"there is no .*nowhere.*qdq ptq --output"):
        load_report(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="is not a run folder"):
        load_report(tmp_path)
    (tmp_path / "run.json").write_text('{"stage": "analyze", "status": "running"}')
    with pytest.raises(
        ArgumentError,
        match=r"has not written a report: it got as far as 'analyze'.*same command again",
    ):
        load_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"summary": 3}', "\x00", '{"a": NaN'])
def test_what_is_no_report(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match="report"):
        load_report(tmp_path)


def test_a_report_of_an_earlier_qdq(store):
    report = make_report(["a"])
    del report["format"]
    with pytest.raises(
        DataError, match=r"written by another version of qdq.*run the same command again"
    ):
        load_report(store(report))


def test_the_file_itself_may_be_named(store):
    folder = store(make_report(["a", "b"]))
    assert load_report(folder / "report.json") == load_report(folder)
    assert [layer.name for layer in load_report(folder).layers] == ["a", "b"]
    assert load_report(folder).name == "made"


def places(value, path=()):
    """Every place in a tree of JSON, shallow lists only in part."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:1]):
            yield from places(item, (*path, number))


WRONG = {
    "text": "x",
    "number": 7,
    "nothing": None,
    "numbers": [1],
    "mapping": {"x": None},
    "huge": 10**400,
    "half a character": "\ud800",
}


def damage(report, path, change):
    """A copy with one place removed, or replaced by something else."""
    copied = copy.deepcopy(report)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    if change == "removed":
        del parent[path[-1]]
    else:
        parent[path[-1]] = WRONG[change]
    return copied


@pytest.mark.parametrize("change", ["removed", *WRONG])
def test_damage_anywhere_never_ends_in_a_traceback(store, change):
    """Of the page, of `explain` for a name that is there and one that is not, of a comparison and of the gate."""
    norm = {"name": "norm", "type": "LayerNorm", "action": "float", "reason": "no int8 counterpart"}
    report = make_report(["a"], float_layers=["a"], swap={"modules": [norm]}, tuning=TUNING)
    tensor = report["layers"][0]["tensors"][0]
    tensor["methods"] = {"mse": tensor["methods"]["mse"]}
    good, folder = store(report, "good"), store(report)
    limits = {
        "max_drop": 5,
        "max_sqnr_drop": 1,
        "min_int8_macs": 0.5,
        "max_size": 1,
        "min_agreement": 0.5,
    }
    readers = {
        "page": lambda: render_report(load_report(folder)),
        "explain": lambda: explain_layer(folder, "a").text,
        "suggest": lambda: explain_layer(folder, "zzz").text,
        "compare": lambda: render_comparison(compare_runs([good, folder])),
        "gate": lambda: format_junit(gate_run(folder, baseline=good, **limits)).decode(),
    }
    errors = defaultdict(list)
    for path in places(report):
        (folder / "report.json").write_text(json.dumps(damage(report, path, change)))
        for name, read in readers.items():
            try:
                read().encode()  # as it is written and printed
            except ArgumentError:
                assert name in ("explain", "suggest")  # no such layer
            except DataError as error:
                errors[name].append(error.message)
    for name, messages in errors.items():
        assert all(str(folder) in message for message in messages)
        assert name == "gate" or not [message for message in messages if str(good) in message]
    if change != "half a character":
        assert (
            all(len(errors[name]) > 20 for name in ("page", "explain", "suggest", "compare"))
            and errors["gate"]
        )


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000])
def test_numbers_that_no_report_has(store, number):
    folder = store(make_report(["a"]))
    path = folder / "report.json"
    path.write_text(
        path.read_text().replace('"onnx_megabytes": 10.0', f'"onnx_megabytes": {number}')
    )
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        load_report(folder)


def test_what_is_wrong_is_named(store):
    report = make_report(["a"])
    report["layers"][0]["tensors"][0]["methods"]["mse"]["amax"] = "x"
    with pytest.raises(
        DataError,
        match=r"report\.json is damaged: layers\[0\]\.tensors\[0\]\.methods\.mse\.amax is 'x', expected: ",
    ):
        load_report(store(report))


def test_a_file_of_a_run_that_is_no_report(tmp_path):
    for name, fix in {
        "model.onnx": "give the folder",
        "report.json": "run the same command again",
    }.items():
        (tmp_path / name).write_bytes(b"\x08\x0a\xff")
        with pytest.raises(DataError) as caught:
            load_report(tmp_path / name)
        assert caught.value.fix.startswith(fix)
