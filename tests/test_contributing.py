"""CONTRIBUTING.md against the project: its layout is complete, its names exist, its answers hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
LAYOUT = PAGE.partition("```text\n")[2].partition("```")[0]
QUESTIONS = re.findall(r"^\| (.+\?) \| (.+) \|$", PAGE, re.MULTILINE)


def list_rooms():
    """The modules and packages right under qdq/."""
    rooms = [path.name for path in (ROOT / "qdq").glob("*.py")]
    rooms += [f"{path.parent.name}/" for path in (ROOT / "qdq").glob("*/__init__.py")]
    return sorted(room for room in rooms if not room.startswith("__"))


def names_of(path):
    """Names that a module defines: functions, classes, their methods, constants and fields."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


@pytest.mark.parametrize("room", list_rooms())
def test_the_layout_names_every_module(room):
    assert re.search(rf"(?<![\w/]){re.escape(room)}", LAYOUT), f"add {room} to the layout"


def test_the_layout_names_nothing_else():
    named = re.findall(r"(?<![\w/.])(\w+(?:\.py|/))", LAYOUT)
    folders = [ROOT / "", ROOT / "qdq", ROOT / "qdq" / "cli", ROOT / "qdq" / "workloads"]
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert missing == []


@pytest.mark.parametrize("room", list_rooms())
def test_every_module_has_a_test_file_of_its_name(room):
    name = room.removesuffix(".py").removesuffix("/")
    tests = ROOT / "tests"
    assert (tests / f"test_{name}.py").is_file() or list((tests / name).glob("**/test_*.py"))


@pytest.mark.parametrize("question", [question for question, _ in QUESTIONS])
def test_where_is(question):
    """An answer is a file, or a file and names that it defines: `qdq/units.py`: `name_block`."""
    answer = dict(QUESTIONS)[question]
    files, names = [], []
    for word in re.findall(r"`([^`]+)`", answer):
        (files if "/" in word else names).append(word)
    assert files, answer
    paths = [ROOT / file for file in files]
    assert [str(path) for path in paths if not path.exists()] == []
    defined = set().union(*(names_of(path) for path in paths if path.suffix == ".py"))
    assert [name for name in names if name not in defined] == []


def test_fifteen_questions_are_answered():
    assert len(QUESTIONS) >= 15


def test_names_in_backticks_exist():
    """A word with an underscore is a function, class, constant or field of the project, or a file."""
    defined = set()
    for folder in ("qdq", "tests", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            defined |= names_of(path) | {path.stem}
    words = {word for word in re.findall(r"`@?(\w+)(?:\(.*\))?`", PAGE) if "_" in word}
    assert sorted(words - defined) == []
