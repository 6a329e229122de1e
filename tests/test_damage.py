"""Damaged files of qdq end every command in a result or in one line, never in a traceback."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from damage import damage_json, damage_statistics, damage_yaml

from qdq.cli.main import main
from qdq.formats import Format
from qdq.observers.collector import TensorCollector
from qdq.plan import Plan, PlanEntry, save_plan
from qdq.statistics import Statistics

sys.path.append(str(Path(__file__).parent / "report"))
from made_report import TUNING, make_report

SEED, COUNT = 0, 100  # files of each of the three formats
NAMES = ["stem", "block.conv"]


@pytest.fixture
def run_folder(tmp_path):
    """A folder with one sound file of each format."""
    import torch

    norm = {"name": "norm", "type": "LayerNorm", "action": "float", "reason": "no int8 counterpart"}
    report = make_report(NAMES, float_layers=NAMES[:1], swap={"modules": [norm]}, tuning=TUNING)
    for layer in report["layers"]:
        for tensor in layer["tensors"]:
            tensor["histogram"] = tensor["histogram"][:4]
    folder = tmp_path / "run_folder"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    save_plan(
        Plan({"stem": PlanEntry("float", "worst", 1.5), "block.conv": PlanEntry("int8")}),
        folder / "plan.yaml",
    )
    tensors = {}
    for name in ("0._input_quantizer", "2._input_quantizer"):
        collector = TensorCollector()
        for batch in np.random.default_rng(1).standard_normal((2, 4, 3)).astype(np.float32):
            collector.collect(torch.from_numpy(batch))
        tensors[name] = collector.statistics()
    shared = {"1._add_quantizer": "2._input_quantizer"}
    Statistics(tensors, dict.fromkeys(tensors, Format()), 2, "model", "data", shared=shared).save(
        folder / "calibration.safetensors"
    )
    return folder


@pytest.fixture
def run(capsys):
    """Run a command in this process: its exit code, after a look at what it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert caught.value.code in (0, 1, 2)
        assert "Traceback" not in err
        assert "bug in qdq" not in err
        assert not re.search(r"\bnan\b", out)
        if caught.value.code == 2:
            assert re.fullmatch(r"(WARNING .*\n)*error: .*\n  fix: .+\n", err) and len(err) < 8000
            assert all(line.isprintable() for line in err.splitlines())
        return caught.value.code

    return run


def replace_file(command, damaged, sound):
    return [sound if part is damaged else part for part in command]


def test_reports(run_folder, tmp_path, run):
    source = random.Random(SEED)  # noqa: S311
    codes = Counter()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    limits = ["--max-drop", 5, "--max-sqnr-drop", 1, "--min-int8-macs", 0.5]
    limits += ["--max-size", 100, "--min-agreement", 0.5]
    commands = [
        ["report", damaged, "-o", tmp_path / "page.html", "--json", tmp_path / "page.json"],
        ["report", run_folder, damaged, "-o", tmp_path / "compare.html"],
        ["explain", damaged, "stem"],
        ["gate", damaged, "--baseline", run_folder, *limits, "--junit", tmp_path / "gate.xml"],
        ["gate", run_folder, "--baseline", damaged, *limits],
    ]
    for command in commands:
        assert run(*replace_file(command, damaged, run_folder)) == 0
    for _ in range(COUNT):
        (damaged / "report.json").write_bytes(
            damage_json((run_folder / "report.json").read_bytes(), source)
        )
        for command in commands:
            codes[run(*command)] += 1
    assert codes[2] > COUNT


def test_runs_without_a_report(tmp_path, run):
    source = random.Random(SEED)  # noqa: S311
    for _ in range(20):
        (tmp_path / "run.json").write_bytes(
            damage_json(b'{"status": "running", "stage": "analyze"}', source)
        )
        assert run("report", tmp_path) == run("explain", tmp_path, "a") == 2


def test_plans(run_folder, tmp_path, run):
    source = random.Random(SEED)  # noqa: S311
    codes = Counter()
    damaged = tmp_path / "damaged.yaml"
    assert run("plan", "diff", run_folder / "plan.yaml", run_folder / "plan.yaml") == 0
    for _ in range(COUNT):
        damaged.write_bytes(damage_yaml((run_folder / "plan.yaml").read_bytes(), source))
        codes[run("plan", "diff", run_folder / "plan.yaml", damaged)] += 1
        codes[run("plan", "diff", damaged, damaged)] += 1
    assert codes[2] > COUNT


def test_statistics(run_folder, tmp_path, run):
    source = random.Random(SEED)  # noqa: S311
    codes = Counter()
    sound, damaged = run_folder / "calibration.safetensors", tmp_path / "damaged.safetensors"
    commands = [
        [
            "calibrate",
            "show",
            damaged,
            "--json",
            tmp_path / "show.json",
            "--plots",
            tmp_path / "show.html",
        ],
        ["calibrate", "merge", sound, damaged, "-o", tmp_path / "merged.safetensors"],
        ["calibrate", "solve", damaged, "--method", "entropy", "--json", tmp_path / "solve.json"],
    ]
    for command in commands:
        assert run(*replace_file(command, damaged, sound)) == 0
    for _ in range(COUNT):
        damaged.write_bytes(damage_statistics(sound.read_bytes(), source))
        for command in commands:
            codes[run(*command)] += 1
    assert codes[2] > COUNT


@pytest.mark.parametrize("kind", ["folder", "empty", "absent", "loop", "long"])
def test_paths_that_are_not_files(run_folder, tmp_path, run, kind):
    place = tmp_path / ("x" * 5000 if kind == "long" else "place")
    if kind == "folder":
        place.mkdir()
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "loop":
        place.symlink_to(place)
    statistics = run_folder / "calibration.safetensors"
    for command in (
        ["report", place],
        ["report", run_folder, place],
        ["explain", place, "stem"],
        ["gate", place, "--max-drop", 1],
        ["gate", run_folder, "--baseline", place, "--max-drop", 1],
        ["plan", "diff", place, place],
        ["calibrate", "show", place],
        ["calibrate", "solve", place],
        ["calibrate", "merge", statistics, place, "-o", tmp_path / "m.safetensors"],
    ):
        assert run(*command) == 2
