"""Reports that are missing, old or damaged end in one line that says what to do."""

import contextlib
import copy
import json

import pytest
from made_report import make_report

from qdq import ArgumentError, DataError
from qdq.report.load import load_report
from qdq.report.page import render_report


def test_what_is_no_run(tmp_path):
    with pytest.raises(ArgumentError, match=r"there is no .*nowhere.*qdq ptq --output"):
        load_report(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="is no run folder"):
        load_report(tmp_path)
    (tmp_path / "run.json").write_text('{"stage": "analyze", "status": "running"}')
    with pytest.raises(ArgumentError, match=r"has written no report: it got as far as 'analyze'.*same command again"):
        load_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"summary": 3}', "\x00", '{"a": NaN'])
def test_what_is_no_report(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match="report"):
        load_report(tmp_path)


def test_a_report_of_an_earlier_qdq(store):
    report = make_report(["a"])
    del report["format"]
    with pytest.raises(DataError, match=r"of another qdq.*run the same command again"):
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


def damage(report, path, change):
    """A copy with one place removed, or replaced by something else."""
    copied = copy.deepcopy(report)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    if change == "removed":
        del parent[path[-1]]
    else:
        parent[path[-1]] = {"text": "x", "number": 7, "nothing": None, "list": [None], "mapping": {"x": None}}[change]
    return copied


@pytest.mark.parametrize("change", ["removed", "text", "number", "nothing", "list", "mapping"])
def test_damage_anywhere_never_ends_in_a_traceback(store, change):
    report = make_report(["a", "b"], float_layers=["a"])
    errors = 0
    folder = store(report)
    for path in places(report):
        (folder / "report.json").write_text(json.dumps(damage(report, path, change)))
        with contextlib.suppress(DataError):  # what no one reads may be anything
            render_report(load_report(folder))
            continue
        errors += 1
    assert errors > 40
