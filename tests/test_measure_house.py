"""tools/measure_house.py counts what it says it counts."""

import json
import runpy
from pathlib import Path

import pytest

from qdq.errors import ArgumentError

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "measure_house.py"))

SOURCE = '''
def public(values, found):
    """Has a docstring, a loop, a condition of two terms and a filtered comprehension."""
    for value in values:
        if value and found:
            return [item for item in values if item]
    return 1 if found else 2


class Layer:
    def method(self):  # no docstring
        own = 1
        return own

    def _private(self):
        return None


class _Private:
    def method(self):
        return None
'''


@pytest.fixture
def row(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    return TOOL["measure_folder"](tmp_path)


def test_lengths(row):
    assert (row.files, row.functions) == (1, 4)
    assert (row.length_median, row.length_max) == (2.5, 6)


def test_complexity_counts_decisions(row):
    # 4 functions, a loop, a branch, an `and`, a comprehension with one filter, a conditional expression
    assert row.complexity_per_line == pytest.approx((4 + 1 + 1 + 1 + 2 + 1) / (6 + 3 + 2 + 2))


def test_expressions_and_names(row):
    definitions, docstrings, other_statements = 6, 1, 8
    assert row.comprehensions == pytest.approx(100 / (definitions + docstrings + other_statements))
    assert row.conditionals == row.comprehensions
    # values, found, value, item; self, own; self; self
    assert row.pronoun_percent == pytest.approx(100 * 2 / 8)


def test_docstrings_of_public_functions(row):
    assert row.docstring_percent == 50  # `public` and `Layer.method`


def test_rows_stand_side_by_side_and_in_a_file(row, tmp_path, monkeypatch, capsys):
    target = tmp_path / "house.json"
    assert TOOL["measure_house"](tmp_path, tmp_path, json=target) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["files", "1", "1"]
    (first, second) = json.loads(target.read_text())["rows"]
    assert first == second
    assert first["functions"] == 4


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="contains no function in Python"):
        TOOL["measure_folder"](tmp_path)
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(ArgumentError, match=r"broken\.py is not Python"):
        TOOL["measure_folder"](tmp_path)
