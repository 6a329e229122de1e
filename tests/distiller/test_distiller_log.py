"""Lines of the log against Distiller's formats and its published line; scores against numpy; portions of data."""

import io
import json
import logging
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from qdq.distiller.command import log
from qdq.distiller.command.scores import Scores
from qdq.distiller.statistics.portion import choose_portion
from qdq.errors import QdqError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "distiller_logs_files.json").read_text())["cases"]
FORMATS = [
    case["format"].replace("\\n", "\n").replace("\\t", "\t") for case in CASES if "format" in case
]
NOON = datetime(2026, 1, 2, 12, 30, 45)


def test_formats_are_those_of_the_source():
    assert {log.TEST, log.VALIDATE, log.SAMPLES, log.SCORES, log.SAVING_CHECKPOINT} <= set(FORMATS)
    assert {log.DATASET_SIZES, *log.PASSES} <= set(FORMATS)
    with_paths = {
        log.LOG_FILE,
        log.STATS_SAVED,
        log.UPDATED_STATS_SAVED,
        log.PARAMETERS_SAVED,
        log.LOADING_STATS,
    }
    assert {line.replace("%s", "<path>") for line in with_paths} <= set(FORMATS)
    quantizer = log.PREPARING % "PostTrainLinearQuantizer"
    assert quantizer in FORMATS
    collecting = log.COLLECTING % ("{:.1%}", "test")
    assert collecting in FORMATS


def test_progress_to_the_letter():
    scores = {"Loss": 1.417802, "Top1": 68.242188, "Top5": 87.656250}
    line = "Test: [   10/  195]    Loss 1.417802    Top1 68.242188    Top5 87.656250"
    assert log.format_progress(scores, 10, 195) == line
    assert (
        log.format_progress({"Loss": 2}, 3, 5, epoch=7)
        == "Epoch: [7][    3/    5]    Loss 2.000000"
    )
    assert log.format_portion(0.05) == "5.0%"


def test_lines_go_to_console_and_file(tmp_path, capsys):
    logger = logging.getLogger("qdq.distiller")
    root = logging.getLogger("qdq")
    former = (root.level, list(root.handlers))
    with log.logging_run("trial", tmp_path, NOON) as folder:
        logger.info(log.TEST)
        logger.info(log.SAMPLES, 50000, 256)
        logger.info(log.DATASET_SIZES, 50000)
        logger.info(log.SCORES, 67.828, 87.372, 1.436)
        logger.info(log.STATS_SAVED, Path("a\x1b[31m\nb"))
        logger.warning("foreign \x1b[31m\ntext")
    assert (root.level, root.handlers) == former
    assert folder == tmp_path / "trial___2026.01.02-123045"
    path = folder / "trial___2026.01.02-123045.log"
    expected = [
        f"Log file for this run: {path.resolve()}",
        "--- test ---------------------",
        "50000 samples (256 per mini-batch)",
        "Dataset sizes:",
        "\ttest=50000",
        "==> Top1: 67.828    Top5: 87.372    Loss: 1.436",
        "",
        r"Stats saved to a\x1b[31m\nb",
        r"foreign \x1b[31m\ntext",
        "",
    ]
    assert path.read_text().split("\n") == expected
    assert capsys.readouterr().out.split("\n") == expected


def test_a_second_run_in_a_second_has_a_folder_of_its_own(tmp_path):
    names = []
    for _ in range(3):
        with log.logging_run("trial", tmp_path, NOON) as folder:
            names.append(folder.name)
            assert (folder / f"{folder.name}.log").exists()
    name = "trial___2026.01.02-123045"
    assert names == [name, f"{name}-2", f"{name}-3"]


def test_warnings_are_shown_once_where_the_command_line_shows_them(tmp_path, capsys, monkeypatch):
    root = logging.getLogger("qdq")
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(io.StringIO())])
    with log.logging_run(None, tmp_path, NOON) as folder:
        root.warning("careful")
    assert "careful" not in capsys.readouterr().out
    assert "careful" in (folder / f"{folder.name}.log").read_text()


def test_a_traceback_follows_its_line(tmp_path, capsys):
    with log.logging_run(None, tmp_path, NOON) as folder:
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("qdq").exception("it broke")
    assert folder.name == "2026.01.02-123045"
    assert "it broke\nTraceback (most recent call last):" in capsys.readouterr().out


def test_names_of_runs_are_no_folders(tmp_path):
    with pytest.raises(QdqError, match="it names a folder"), log.logging_run("../up", tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(QdqError, match="cannot write"), log.logging_run("a", tmp_path / "file"):
        pass


def test_each_sample_counts_once():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(10, 8)).astype(np.float32), rng.integers(0, 8, 10)
    scores = Scores()
    assert scores.read() == {}
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        scores.add(torch.from_numpy(outputs[part]), torch.from_numpy(labels[part]))
    wide = outputs.astype(np.float64)
    losses = np.log(np.exp(wide).sum(1)) - wide[np.arange(10), labels]
    ranks = (wide > wide[np.arange(10), labels][:, None]).sum(1)
    assert scores.num_samples == 10
    assert scores.read() == pytest.approx(
        {"Loss": losses.mean(), "Top1": 100 * (ranks == 0).mean(), "Top5": 100 * (ranks < 5).mean()}
    )


def test_five_best_of_three_classes():
    scores = Scores()
    scores.add(torch.eye(3), torch.tensor([0, 1, 0]))
    assert scores.read()["Top1"] == pytest.approx(200 / 3)
    assert scores.read()["Top5"] == pytest.approx(100)


@pytest.mark.gpu
def test_scores_wait_for_a_gpu_when_they_are_read(gpu):
    import pretended_device

    scores = Scores()
    outputs, labels = torch.eye(6, device=gpu), torch.arange(6, device=gpu)
    with pretended_device.watch(gpu) as events:
        for _ in range(3):
            scores.add(outputs, labels)
    assert not [event for event in events if event.waits]
    assert scores.read()["Top1"] == pytest.approx(100)


def test_a_portion_is_fixed_and_grows():
    small, large = choose_portion(1000, 0.05), choose_portion(1000, 0.5)
    assert len(small) == 50
    assert len(large) == 500
    assert small == choose_portion(1000, 0.05)
    assert set(small) < set(large)
    assert small == sorted(small)
    assert small != choose_portion(1000, 0.05, seed=1)
    assert choose_portion(1000, 1) == list(range(1000))
    assert len(choose_portion(3, 0.05)) == 1


@pytest.mark.parametrize("portion", [0, -0.1, 1.1, float("nan")])
def test_portions_that_are_none(portion):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        choose_portion(10, portion)
    with pytest.raises(ValueError, match="empty"):
        choose_portion(0, 0.5)
