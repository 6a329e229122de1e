import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qdq import ArgumentError, DataError, start_run
from qdq.files import write_atomic
from qdq.run import (
    check_run_folder,
    describe_command,
    describe_environment,
    find_announced,
    list_run_files,
    list_targets,
    require_one_target,
)


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


def test_the_device_is_printed_and_part_of_the_environment(tmp_path, capsys):
    run = start_run(tmp_path, device="cuda:0 (NVIDIA L4)")
    assert run.environment["device"] == "cuda:0 (NVIDIA L4)"
    assert capsys.readouterr().out == "device: cuda:0 (NVIDIA L4)\n"


@pytest.mark.parametrize(
    ("change", "is_continued"),
    [
        ({}, True),
        ({"seed": 4}, False),
        ({"settings": {"model": "y"}}, False),
        ({"device": "cuda:0"}, False),
    ],
    ids=str,
)
def test_what_was_collected_is_kept_for_the_same_run_only(tmp_path, change, is_continued):
    options = {"seed": 3, "settings": {"model": "x", "output": tmp_path}}
    run = start_run(tmp_path / "run", **options)
    write_atomic(run.folder / "calibration.safetensors", "half")
    write_atomic(run.folder / "tuning" / "state.safetensors", "half")
    write_atomic(run.folder / "model.onnx", "stale")
    again = start_run(tmp_path / "run", **(options | change))
    assert (again.folder / "calibration.safetensors").exists() == is_continued
    assert (again.folder / "tuning").exists() == is_continued
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "precious"),
        ("run.json", '{"wandb": 1}'),
        ("run.json", '{"format": "qdq run 999"}'),
        (
            "run.json",
            '{"status": "running", "stage": "", "seed": 0, "settings": {}, "environment": {}, "seconds": {}}',
        ),
        ("run.json", "["),
        ("run.json", "[" * 10**5),
        ("run.log", "of another program"),
    ],
)
def test_foreign_folder_is_not_emptied(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "model.onnx").write_text("precious")
    with pytest.raises(ArgumentError, match="not a run folder"):
        start_run(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: content,
        "model.onnx": "precious",
    }


def test_folder_of_the_former_version_is_a_run_folder(tmp_path):
    state = {
        "status": "running",
        "stage": "float",
        "seed": 0,
        "settings": {},
        "environment": {"qdq": "0.1.0"},
    }
    (tmp_path / "run.json").write_text(json.dumps({**state, "seconds": {}}))
    (tmp_path / "model.onnx").write_text("stale")
    start_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.log"]


def test_a_run_that_was_killed_before_its_state_was_written_can_be_started_again(tmp_path):
    (tmp_path / "run.log").write_text("")
    start_run(tmp_path).finish()


def test_only_what_a_run_writes_is_removed(tmp_path):
    run = start_run(tmp_path)
    stale = ["model.onnx", "model.onnx.data", "model.rtx.engine", "report.html"]
    stale += ["tuning/best.safetensors", "tuning/tensorboard/events.out.tfevents.1"]
    stale += [".qdq-1234.partial", ".model.onnx.data.partial", "tuning/.qdq-1234.partial"]
    unrelated = [
        "notes.txt",
        "mine.onnx",
        "images/0/a.png",
        "tuning/notes.txt",
        "analysis.jsonl",
        "analysis.1.jsonl",
    ]
    unrelated += [".download.partial", ".other.data.partial", "tuning/.download.partial"]
    for name in (*stale, *unrelated):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    run.finish()
    start_run(tmp_path, seed=1)
    remaining = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert remaining == {*unrelated, "run.json", "run.log"}


def test_what_a_setting_names_is_not_removed(tmp_path):
    run = start_run(tmp_path)
    names = [
        "plan.yaml",
        "model.profile.json",
        "tuning/best.safetensors",
        "images/0/a.png",
        "model.onnx",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    run.finish()
    settings = {
        "plan": tmp_path / "plan.yaml",
        "analysis": {
            "profile": str(tmp_path / "." / "model.profile.json"),
            "groups": ["", "DEFAULT", "a\0b"],
        },
        "weights": str(tmp_path / "tuning" / "best.safetensors"),
        "data_dir": tmp_path / "images",
    }
    start_run(tmp_path, settings=settings)
    assert not (tmp_path / "model.onnx").exists()
    assert all((tmp_path / name).read_text() == name for name in names[:-1])
    assert (tmp_path / "tuning" / "best.input.safetensors").read_text() == "tuning/best.safetensors"


def test_a_plan_that_the_run_replaces_is_kept_beside_it(tmp_path):
    start_run(tmp_path).finish()
    plan = tmp_path / "plan.yaml"
    plan.write_text("of the user")
    for _ in range(2):  # the second time the run begins again, and reads what it wrote itself
        run = start_run(tmp_path, settings={"plan": plan})
        write_atomic(plan, "of the run")
    assert (tmp_path / "plan.input.yaml").read_text() == "of the user"
    run.finish()


@pytest.mark.parametrize(
    "name", ["model.onnx", "report.json", "tuning", "run.log", "calibration.safetensors"]
)
def test_a_link_where_a_run_writes_is_refused(tmp_path, name):
    start_run(tmp_path / "run").finish()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ArgumentError, match="is a link"):
        start_run(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


HOLD = """
import sys, time
from qdq.run import start_run
run = start_run(sys.argv[1])
(run.folder / "model.onnx").write_text("half")
print("started", flush=True)
time.sleep(600)
"""


def test_of_two_runs_in_one_folder_the_second_is_refused_until_the_first_has_ended(
    tmp_path, processes
):
    process = processes.start("-c", HOLD, tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    for start in (start_run, check_run_folder):
        with pytest.raises(ArgumentError, match="another run is writing to"):
            start(tmp_path)
    assert (tmp_path / "model.onnx").read_text() == "half"
    process.kill()
    process.communicate()
    start_run(tmp_path).finish()
    assert (
        processes.start("-c", HOLD.replace("600", "0"), tmp_path, stdout=subprocess.DEVNULL).wait()
        == 0
    )


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_who_looks_whether_a_folder_is_in_use_does_not_have_it(tmp_path):
    import fcntl

    start_run(tmp_path).finish()
    with (tmp_path / "run.log").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        check_run_folder(tmp_path)
        ending = threading.Timer(0.3, fcntl.flock, (looking, fcntl.LOCK_UN))
        ending.start()
        start_run(tmp_path).finish()
        ending.join()


def test_only_settings_that_are_paths_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("resnet50")
    check_run_folder(
        "run", {"model": "resnet50", "exclude": ("resnet50",), "options": {"mode": "resnet50"}}
    )
    options = Options(Path("resnet50"))
    for settings in (
        {"plan": Path("resnet50")},
        {"weights": "resnet50"},
        {"options": options},
        {"options": [options]},
    ):
        with pytest.raises(DataError, match="it is a FIFO"):
            check_run_folder("run", settings)


@dataclass
class Options:
    profile: Path


FORK = """
import os, sys, time
from qdq.run import start_run
run = start_run(sys.argv[1])
if not os.fork():
    print("started", flush=True)  # the child has let go of what it inherited
time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_is_left_over_does_not_hold_the_folder(tmp_path, processes):
    process = processes.start("-c", FORK, tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    with pytest.raises(ArgumentError, match="another run is writing to"):
        start_run(tmp_path)
    process.kill()
    process.wait()
    start_run(tmp_path).finish()
    process.stdout.close()


def test_a_folder_that_no_run_can_use_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "run",
        tmp_path / ("x" * 256),
        tmp_path / ("x/" * 2500),
    ):
        with pytest.raises(ArgumentError, match="cannot use"):
            check_run_folder(folder)
    check_run_folder(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_run_wrote_can_be_listed(tmp_path):
    run = start_run(tmp_path / "run")
    for name in ("report.json", "report.html", "notes.txt", "tuning/best.safetensors"):
        write_atomic(run.folder / name, "")
    expected = {"run.json", "run.log", "report.json", "best.safetensors"}
    assert {path.name for path in list_run_files(run.folder)} == expected
    assert {path.name for path in list_run_files(run.folder / "report.json")} == expected
    assert list_run_files(tmp_path / "missing" / "report.json") == [
        tmp_path / "missing" / "report.json"
    ]
    run.finish()


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
    level = logging.getLogger("qdq").level
    run = start_run(tmp_path / "run", seed=3)
    drawn = np.random.rand()
    run.stage("calibrate")
    run.finish()
    logging.getLogger("qdq").setLevel(level)
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


SEVERAL = {"seed": 3, "settings": {"model": "x"}, "targets": ("l4", "orin")}


def list_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_each_of_several_targets_has_its_folder(tmp_path):
    run = start_run(tmp_path, **SEVERAL)
    assert list_targets(tmp_path) == run.targets == ("l4", "orin")
    target = run.start_target("l4")
    assert target.model_file == tmp_path / "l4" / "model.onnx"
    assert target.statistics_file == run.statistics_file == tmp_path / "calibration.safetensors"
    assert target.journal_file == run.journal_file == tmp_path / "analysis.jsonl"
    assert json.loads((tmp_path / "run.json").read_text())["stage"] == "l4"
    target.stage("build")
    state = json.loads((tmp_path / "l4" / "run.json").read_text())
    assert (state["target"], state["stage"], state["seed"]) == ("l4", "build", 3)
    logging.getLogger("qdq.somewhere").warning("of l4")
    target.finish()
    run.start_target("orin").finish()
    logging.getLogger("qdq.somewhere").warning("of both")
    logs = [(tmp_path / name / "run.log").read_text() for name in ("", "l4", "orin")]
    assert ["of l4" in text for text in logs] == [True, True, False]
    assert ["of both" in text for text in logs] == [True, False, False]
    with pytest.raises(ArgumentError, match="for several targets: l4, orin") as refusal:
        require_one_target(tmp_path)
    assert str(tmp_path / "l4") in refusal.value.fix
    require_one_target(tmp_path / "l4")
    expected = list_files(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in list_run_files(tmp_path)} == expected
    run.finish()


@pytest.mark.parametrize("targets", [(), ("l4",)])
def test_one_target_has_no_folder_of_its_own(tmp_path, targets):
    run = start_run(tmp_path, targets=targets)
    assert run.start_target("l4") is run
    assert list_files(tmp_path) == {"run.json", "run.log"}
    assert list_targets(tmp_path) == ()
    require_one_target(tmp_path)
    run.finish()


@pytest.mark.parametrize(("seed", "is_continued"), [(3, True), (4, False)])
def test_a_run_that_continues_continues_each_target(tmp_path, seed, is_continued):
    """Also a target that is finished: until the run is, its state of the accuracy passes is kept."""
    run = start_run(tmp_path, **SEVERAL)
    for target in SEVERAL["targets"]:
        part = run.start_target(target)
        for name in ("recovery.safetensors", "model.onnx"):
            write_atomic(part.folder / name, "stale")
        part.finish()
    again = start_run(tmp_path, **(SEVERAL | {"seed": seed}))
    remaining = again.start_target("l4")
    files = {"run.json", "run.log"} | ({"recovery.safetensors"} if is_continued else set())
    assert list_files(remaining.folder) == files
    remaining.finish()
    again.start_target("orin").finish()
    again.finish()
    assert not list(tmp_path.glob("*/recovery.safetensors"))


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "", ".", "..", "x\0", "tuning", "model.onnx"]
)
def test_a_target_is_the_name_of_a_folder(tmp_path, name):
    folder = tmp_path / "run"
    with pytest.raises(ArgumentError, match="cannot be the name of a folder"):
        start_run(folder, targets=("l4", name))
    assert not folder.exists()
    with pytest.raises(ArgumentError, match="targets has l4 twice"):
        start_run(folder, targets=("l4", "l4"))


def test_targets_of_an_earlier_run_are_removed_and_nothing_else(tmp_path):
    run = start_run(tmp_path, **SEVERAL)
    for target in SEVERAL["targets"]:
        part = run.start_target(target)
        write_atomic(part.folder / "model.onnx", "stale")
        part.finish()
    run.finish()
    write_atomic(tmp_path / "orin" / "notes.txt", "of the user")
    start_run(tmp_path / "mine").finish()
    write_atomic(tmp_path / "mine" / "model.onnx", "of another run")
    start_run(tmp_path, targets=("t4",)).finish()
    files_of_runs = {"mine/run.json", "mine/run.log", "mine/model.onnx", "run.json", "run.log"}
    # What is left of orin is still known as a folder of a run, which may use it again.
    assert list_files(tmp_path) == {"orin/notes.txt", "orin/run.json", *files_of_runs}
    check_run_folder(tmp_path, targets=("l4", "orin"))


def test_a_folder_of_a_target_that_no_run_can_use_is_refused(tmp_path):
    write_atomic(tmp_path / "run" / "orin" / "notes.txt", "of the user")
    start_run(tmp_path / "empty").finish()
    (tmp_path / "empty" / "orin").write_text("a file")
    (tmp_path / "run" / "run.json").write_text((tmp_path / "empty" / "run.json").read_text())
    for folder, message in (("run", "orin holds files"), ("empty", "cannot use .*orin")):
        check_run_folder(tmp_path / folder, targets=("orin",))
        with pytest.raises(ArgumentError, match=message):
            start_run(tmp_path / folder, targets=("l4", "orin"))


def test_a_link_in_place_of_the_folder_of_a_target_is_refused(tmp_path):
    """It may lead to a finished run, whose files a run would remove."""
    start_run(tmp_path / "other").finish()
    write_atomic(tmp_path / "other" / "model.onnx", "of another run")
    start_run(tmp_path / "both").finish()
    (tmp_path / "both" / "l4").symlink_to(tmp_path / "other")
    check_run_folder(tmp_path / "both" / "l4")  # to name it as the run folder is fine
    with pytest.raises(ArgumentError, match="l4 is a link"):
        start_run(tmp_path / "both", targets=("l4", "orin")).start_target("l4")
    assert (tmp_path / "other" / "model.onnx").read_text() == "of another run"


HOLD_TARGET = HOLD.replace(
    "start_run(sys.argv[1])", "start_run(sys.argv[1], targets=('l4', 'orin')).start_target('orin')"
)


def test_the_folder_of_a_target_is_in_use_while_it_is_written(tmp_path, processes):
    process = processes.start("-c", HOLD_TARGET, tmp_path, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines == ["== orin\n", "started\n"]
    for folder in (tmp_path, tmp_path / "orin"):
        with pytest.raises(ArgumentError, match="another run is writing to"):
            start_run(folder)
    process.kill()
    process.communicate()
    start_run(tmp_path / "orin").finish()
