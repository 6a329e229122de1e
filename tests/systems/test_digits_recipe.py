"""The recipe runs to its end and writes its figures; its accuracy is measured by hand, see docs/systems-low-bits.md."""

import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from qdq.systems.rounds import Rounds

pytest.importorskip("sklearn", reason="needs the extra 'demo'")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    return runpy.run_path(str(RECIPES / "binary_ternary_digits.py"))


def test_the_recipe_prints_a_table_and_writes_figures(recipe, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert recipe["binary_ternary_digits"](seeds=1, epochs=1, validate=True, json=file) == 0
    printed = capsys.readouterr().out
    assert "7 of 9 layers are quantized" in printed
    for name in ("BWN", "ADMM ternary", "INQ 4 bits"):
        assert re.search(rf"^{name} .*7 weights exact$", printed, re.M)
    assert re.search(r"^UINT8 .*9 weights convert, 9 inputs convert$", printed, re.M)
    assert re.search(r"^BNN .*7 weights exact, 7 inputs convert$", printed, re.M)
    figures = json.loads(file.read_text())
    assert len(figures["accuracies"]["float"]) == 1
    assert [len(log[0]) for log in figures["rounds"].values()] == [0, 0, 0, 6, 4]


def test_a_recipe_that_was_stopped_resumes(recipe, tmp_path, monkeypatch):
    """It is stopped in a round of ADMM; what was trained before is not trained again."""
    start = recipe["binary_ternary_digits"]
    for name in ("UINT8", "BNN", "INQ 4 bits"):
        monkeypatch.setitem(recipe["SYSTEMS"], name, lambda net, task: ())
    files = tmp_path / "resumed.json", tmp_path / "whole.json"
    tune = Rounds.tune
    names = []

    def tune_until(rounds, name, penalty=None):
        names.append(name)
        if len(names) == 4:
            raise KeyboardInterrupt
        return tune(rounds, name, penalty)

    monkeypatch.setattr(Rounds, "tune", tune_until)
    options = {"seeds": 1, "epochs": 1, "output": tmp_path / "runs"}
    with pytest.raises(KeyboardInterrupt):
        start(**options)
    start(**options, json=files[0])
    assert names[:5] == ["round-0", "round-1", "round-2", "round-3", "round-3"]
    start(seeds=1, epochs=1, json=files[1])
    assert files[0].read_text() == files[1].read_text()


def test_the_distance_of_admm_falls_in_every_round(recipe):
    images, labels, test_images, test_labels = recipe["load_data"](None)
    torch.manual_seed(0)
    batches = DataLoader(TensorDataset(images, labels), 64, shuffle=True)
    net = recipe["make_network"]("resnet")
    recipe["train"](net, batches, 5)
    rounds = recipe["make_ternary"](net, recipe["Task"](batches, images[:32], 10, 0, None))
    distances = [row.distance for row in rounds]
    assert len(distances) == 6
    assert all(after < before for before, after in itertools.pairwise(distances))
    assert recipe["measure_accuracy"](net, test_images, test_labels) > 90
