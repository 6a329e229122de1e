"""The recipe runs to its end and writes its figures; its accuracies are measured by hand."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from qdq import distiller

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("scheme", ["ema", "dorefa", "pact", "wrpn"])
def test_the_files_of_the_recipe_can_be_read(scheme):
    plan = distiller.read_compress_file(RECIPES / "distiller" / f"{scheme}.yaml")
    assert plan.find_start(30) == 0
    rates = plan.find_rates(0.1, 30)
    assert rates[0] == 1
    assert list(rates) == sorted(rates, reverse=True)


def test_the_recipe_prints_a_table_and_writes_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="needs the extra 'demo'")
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    recipe = runpy.run_path(str(RECIPES / "train_digits.py"))
    file = tmp_path / "figures.json"
    schemes = ("ema", "pact", "wrpn")
    run = recipe["train_digits"]
    assert run(schemes=schemes, bits=(8,), seeds=1, epochs=1, validate=True, json=file) == 0
    printed = capsys.readouterr().out
    exports = {
        "ema": "9 weights exact, 8 inputs exact",
        "pact": "7 weights convert, 7 inputs convert",
        "wrpn": "7 weights exact, 7 inputs convert",
    }
    for scheme, verdicts in exports.items():
        assert re.search(rf"^{scheme} W8A8 .*{verdicts}$", printed, re.M), printed
    figures = json.loads(file.read_text())
    assert {len(values) for values in figures["accuracies"].values()} == {1}
