"""What the README and the docs say exists, and the README's code runs and prints what stands below it."""

import contextlib
import importlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qdq
from qdq.cli.main import main, make_app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def _fences(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _section(title):
    return README.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _run(code, namespace):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102
    return printed.getvalue()


def _shape(text):
    """Lines without numbers and columns, sorted: with another torch two close layers may change places."""
    lines = [line for line in text.splitlines() if ".engine: " not in line]
    return sorted(
        re.sub(r"[\s-]+", " ", re.sub(r"s?\d+(\.\d+)?(e[+-]\d+)?|\binf\b", "#", line))
        for line in lines
    )


def test_tour_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?",
        _section("A tour"),
        re.MULTILINE | re.DOTALL,
    )
    assert len(blocks) >= 9
    namespace = {"__name__": "__main__"}
    for code, expected in blocks:
        if "build_engine" in code and not HAS_RTX:
            continue  # the test below says so
        assert _shape(_run(code, namespace)) == _shape(expected), code


@pytest.mark.skipif(not HAS_RTX, reason="needs the extra 'rtx'")
@pytest.mark.parametrize("kind", ["convolutions", "linear layers"])
def test_your_own_model(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (code,) = _fences(_section("Your own model"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    if kind == "convolutions":
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)),
        )
        batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    else:
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        batches = [torch.randn(4, 32) for _ in range(3)]
    printed = _run(code, {"__name__": "__main__", "model": model.eval(), "batches": iter(batches)})
    assert "valid ONNX" in printed
    assert Path("model.onnx").is_file()
    assert Path("model.rtx.engine").is_file() or Path("model.engine").is_file()


def _help(capsys, monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    lines = [line for block in _fences(text, "bash") for line in block.splitlines()]
    verbs = set(re.findall(r"`qdq ([a-z]+)", text))
    verbs |= {match[1] for line in lines if (match := re.match(r"qdq ([a-z]+)", line))}
    assert verbs <= set(make_app()), verbs
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`", text))
    named |= {match[1] for line in lines if (match := re.match(r"make ([a-z]+)", line))}
    assert named <= targets, named


def test_flags_exist(capsys, monkeypatch):
    pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    verbs = ("ptq", "qat", "check", "build", "eval", "report", "explain", "gate", "env")
    known = {verb: _help(capsys, monkeypatch, verb) for verb in verbs}
    parts = ("show", "merge", "solve")
    known["calibrate"] = "".join(_help(capsys, monkeypatch, "calibrate", part) for part in parts)
    lines = [
        line
        for page in PAGES
        for block in _fences(page.read_text(), "bash")
        for line in block.splitlines()
    ]
    for line in lines:
        if match := re.match(r"qdq ([a-z]+)(.*)", line):
            for flag in re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", match[2].partition("#")[0]):
                assert re.search(rf"{flag}\b", known[match[1]]), line
    everything = "".join(known.values()) + _help(capsys, monkeypatch)
    for flag in re.findall(r"`(--[a-z][a-z-]+)`", _section("The command line")):
        assert re.search(rf"{flag}\b", everything), flag
    for flag in re.findall(r"--[a-z-]+[a-z]", known["ptq"]):
        if flag not in ("--help", "--version", "--empty-exclude"):
            assert flag in _section("The command line"), f"README does not name {flag} of qdq ptq"
    for flag in ("--loss", "--ranges", "--steps", "--epochs", "--lr"):
        assert flag in known["qat"], flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:qdq|recipes|tools|docs|tests)/[\w./]+\.\w+)`", text):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    for name in set(re.findall(r"\bqdq\.([A-Za-z_][\w.]*\w)", page.read_text())):
        value = qdq
        path = "qdq"
        for part in name.split("."):
            path = f"{path}.{part}"
            if not hasattr(value, part):
                importlib.import_module(path)
            value = getattr(value, part)


def test_all_pages_are_linked_from_the_readme():
    text = README.read_text()
    assert [page.name for page in PAGES[1:] if page.name not in text] == []


def test_rules_and_errors_are_documented():
    rules = (ROOT / "docs" / "rules.md").read_text()
    sources = [*(ROOT / "qdq" / "check").rglob("*.py"), ROOT / "qdq" / "swap.py"]
    raised = {rule for path in sources for rule in re.findall(r'"(QDQ\d+)"', path.read_text())}
    raised |= {
        rule for path in sources for rule in re.findall(r"\((R-[A-Z0-9-]+)", path.read_text())
    }
    assert {rule for rule in raised if rule not in rules} == set()
    named = set(re.findall(r"\| (QDQ\d+) \|", rules))
    assert named == {rule for rule in raised if rule.startswith("QDQ")}
    errors = (ROOT / "docs" / "errors.md").read_text()
    raised = {name for name in dir(importlib.import_module("qdq.errors")) if name.endswith("Error")}
    assert {name for name in raised if name not in errors} == set()


def test_no_machine_path_stands_in_the_docs():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:work|tmp|root|home|usr)/", page.read_text()), page.name
