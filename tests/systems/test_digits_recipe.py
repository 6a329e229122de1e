"""The recipe runs to its end and writes its figures; its accuracy is measured by hand, see docs/systems-low-bits.md."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs the extra 'demo'")
RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_recipe_prints_a_table_and_writes_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    recipe = runpy.run_path(str(RECIPES / "binary_ternary_digits.py"))
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
