import json
import logging
import sys

import numpy as np
import pytest

from qdq import ArgumentError, start_run
from qdq.files import write_atomic
from qdq.run import describe_command, describe_environment, find_announced


def test_run_folder_is_emptied_of_an_earlier_run(tmp_path):
    run = start_run(tmp_path / "run", seed=3, settings={"model": "x"})
    run.stage("load")
    write_atomic(run.folder / "model.onnx", "stale")
    state = json.loads((run.folder / "run.json").read_text())
    assert (state["status"], state["stage"], state["seed"]) == ("running", "load", 3)
    again = start_run(tmp_path / "run")
    assert sorted(p.name for p in again.folder.iterdir()) == ["run.json", "run.log"]
    again.finish()
    assert json.loads((again.folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "kept"), [({}, True), ({"seed": 4}, False), ({"settings": {"model": "y"}}, False)], ids=str
)
def test_what_was_collected_is_kept_for_the_same_run_only(tmp_path, change, kept):
    options = {"seed": 3, "settings": {"model": "x", "output": tmp_path}}
    run = start_run(tmp_path / "run", **options)
    write_atomic(run.folder / "calibration.safetensors", "half")
    write_atomic(run.folder / "tuning" / "state.safetensors", "half")
    write_atomic(run.folder / "model.onnx", "stale")
    again = start_run(tmp_path / "run", **(options | change))
    assert (again.folder / "calibration.safetensors").exists() == kept
    assert (again.folder / "tuning").exists() == kept
    assert not (again.folder / "model.onnx").exists()
    again.finish()
    start_run(tmp_path / "run", **(options | change))
    assert not (again.folder / "calibration.safetensors").exists()


def test_a_damaged_state_is_no_begun_run(tmp_path):
    run = start_run(tmp_path / "run")
    write_atomic(run.folder / "calibration.safetensors", "half")
    for damaged in ("{", "[]", "null"):
        (run.folder / "run.json").write_text(damaged)
        assert not run.is_begun()


def test_foreign_folder_is_not_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ArgumentError, match="not a run folder"):
        start_run(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot use"):
        start_run(tmp_path / "file")


def test_log_goes_to_the_run_folder(tmp_path):
    import logging

    run = start_run(tmp_path / "run")
    logging.getLogger("qdq.somewhere").warning("look here")
    assert "look here" in (run.folder / "run.log").read_text()


def test_environment_names_versions_and_no_place():
    environment = describe_environment()
    assert environment["torch"].startswith("2.")
    assert not any("/" in value for value in environment.values())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/some/where/bin/qdq", "ptq", "--model", "a b"], "qdq ptq --model 'a b'"),
        (["recipes/mine.py", "--seed", "1"], "python recipes/mine.py --seed 1"),
        ([""], "''"),
        ([], "''"),
    ],
)
def test_command_for_a_shell(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert describe_command() == expected


def test_of_the_processes_of_torchrun_only_the_first_has_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")  # the first process refuses it
    before = logging.getLogger("qdq").level
    run = start_run(tmp_path / "run", seed=3)
    drawn = np.random.rand()
    run.stage("calibrate")
    run.finish()
    logging.getLogger("qdq").setLevel(before)
    assert not run.is_first
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "thesis.tex"]
    assert [path.name for path in run.folder.iterdir()] == ["run.json"]
    monkeypatch.setenv("RANK", "0")
    first = start_run(tmp_path / "first", seed=3)
    assert first.is_first
    assert drawn == np.random.rand()
    first.stage("calibrate")
    assert capsys.readouterr().out == "== calibrate\n"


def test_ranks_that_nobody_announces_are_none(monkeypatch):
    for variables in ({}, {"RANK": "3"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "4"}):
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert find_announced() == (0, 1)
