"""README and docs are true: what they name exists, and their code runs and prints what they show."""

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
DOCS = ROOT / "docs"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.glob("*.md")),
]
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
CODE_AND_OUTPUT = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", re.M | re.S)
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def _fences(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def _section(page, title):
    return page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _run(code, namespace):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102
    return printed.getvalue()


def _shape(text):
    """Lines without numbers and columns, sorted: another torch may swap two similar layers."""
    shapes = []
    for line in text.splitlines():
        if ".engine: " in line:
            continue
        without_numbers = re.sub(r"s?\d+(\.\d+)?(e[+-]\d+)?|\binf\b", "#", line)
        shapes.append(re.sub(r"[\s-]+", " ", without_numbers))
    return sorted(shapes)


# Code


def test_tour_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = CODE_AND_OUTPUT.findall((DOCS / "tour.md").read_text())
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
    (code,) = _fences(_section(README, "Your own model"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    if kind == "convolutions":
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 16),
        )
        batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    else:
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        batches = [torch.randn(4, 32) for _ in range(3)]
    namespace = {"__name__": "__main__", "model": model.eval(), "batches": iter(batches)}
    printed = _run(code, namespace)
    assert "valid ONNX" in printed
    assert Path("model.onnx").is_file()
    assert Path("model.rtx.engine").is_file() or Path("model.engine").is_file()


# The README


def test_readme_is_short():
    assert len(README.read_bytes()) <= 12_000


def test_readme_shows_lines_of_the_report_on_its_page():
    """The report of the demo stands on one page; the README has some lines of it, in their order."""
    (excerpt,) = _fences(_section(README, "First result"), "text")
    (report,) = _fences(_section(DOCS / "report.md", "The report of the demo"), "text")
    lines = report.splitlines()
    for line in excerpt.splitlines():
        assert line in lines, line
        lines = lines[lines.index(line) + 1 :]


def test_readme_links_to_every_page():
    text = README.read_text()
    paths = [page.relative_to(ROOT).as_posix() for page in PAGES[1:]]
    assert [path for path in paths if f"]({path})" not in text] == []


# The command line


def _list_commands(app, parents=()):
    """The words behind `qdq` of each command that does something: `ptq`, `calibrate show`."""
    names = [name for name in app if not name.startswith("-")]
    if not names:
        return [" ".join(parents)]
    commands = []
    for name in names:
        commands += _list_commands(app[name], (*parents, name))
    return commands


COMMANDS = _list_commands(make_app())


def _read_help(capsys, monkeypatch, command):
    """What `qdq COMMAND --help` prints, with each parameter on one line."""
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def _read_flags_of_help(text):
    """Names of each parameter -> its default, "required" or None."""
    defaults = {}
    for line in text.splitlines():
        words = line.strip("│ *").split()
        if not words or not words[0].startswith("--"):
            continue
        names = tuple(word for word in words[:2] if word.startswith("-"))
        default = re.search(r"\[default: (.*?)\]", line)
        if default is not None:
            defaults[names] = default[1]
        elif "[required]" in line:
            defaults[names] = "required"
        else:
            defaults[names] = None
    return defaults


def _read_flags_of_page(section):
    """Names of each parameter in the table of a section -> the cell with its default."""
    defaults = {}
    for line in section.splitlines():
        if line.startswith("| `-"):
            cells = line.split(" | ")
            names = tuple(re.findall(r"`(-[^`]*)`", cells[0]))
            defaults[names] = cells[1]
    return defaults


def test_cli_page_has_a_section_for_each_command():
    titles = re.findall(r"^## qdq (.*)$", (DOCS / "cli.md").read_text(), re.M)
    assert sorted(titles) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_page_has_the_flags_of_the_help(capsys, monkeypatch, command):
    of_help = _read_flags_of_help(_read_help(capsys, monkeypatch, command))
    of_page = _read_flags_of_page(_section(DOCS / "cli.md", f"qdq {command}"))
    assert list(of_page) == list(of_help)
    for names, default in of_help.items():
        cell = of_page[names]
        if default is None:
            assert "`" not in cell, f"{names} has no default"
        elif default == "required":
            assert cell == "required", names
        elif default == "False":
            assert cell == "off", names
        else:
            assert cell == f"`{default}`", names


@pytest.mark.parametrize("flag", ["-v", "--verbose", "-q", "--quiet", "-h", "--help", "--version"])
def test_flags_of_every_command(capsys, flag):
    assert f"`{flag}`" in _section(DOCS / "cli.md", "Every command")
    with pytest.raises(SystemExit) as stop:
        main(["env", flag])
    assert stop.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    lines = [line for block in _fences(text, "bash") for line in block.splitlines()]
    verbs = set(re.findall(r"`qdq ([a-z]+)", text))
    targets = set(re.findall(r"`make ([a-z]+)`", text))
    for line in lines:
        if match := re.match(r"qdq ([a-z]+)", line):
            verbs.add(match[1])
        if match := re.match(r"make ([a-z]+)", line):
            targets.add(match[1])
    assert verbs <= set(make_app()), verbs
    makefile = (ROOT / "Makefile").read_text()
    assert targets <= set(re.findall(r"^([a-z]+):", makefile, re.M)), targets


def test_flags_exist(capsys, monkeypatch):
    """In the examples of every page, and in the text of the page about the command line."""
    helps = {command: _read_help(capsys, monkeypatch, command) for command in COMMANDS}
    blocks = [block for page in PAGES for block in _fences(page.read_text(), "bash")]
    checked = set()
    for line in "".join(blocks).splitlines():
        example = line.partition("#")[0]
        for command in COMMANDS:
            if not re.match(rf"qdq {command}\b", example):
                continue
            for flag in re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", example):
                assert re.search(rf"{flag}\b", helps[command]), line
            checked.add(command)
    assert checked == set(COMMANDS), "a command without an example"
    everything = "".join(helps.values()) + _read_help(capsys, monkeypatch, "")
    common = _section(DOCS / "cli.md", "Every command")
    for flag in re.findall(r"`(--[a-z][a-z-]+)`", (DOCS / "cli.md").read_text()):
        assert re.search(rf"{flag}\b", everything + common), flag


# All pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    prose = FENCE.sub("", text)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:qdq|recipes|tools|docs|tests)/[\w./]+\.\w+)`", text):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


def _list_anchors(page):
    """The names that links into a page can have: its headings, written as GitHub writes them."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        anchors.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_that_are_linked_exist(page):
    prose = FENCE.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", prose):
        linked = page.parent / target if target else page
        assert anchor in _list_anchors(linked), f"{target}#{anchor}"


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


def test_rules_and_errors_are_documented():
    rules = (DOCS / "rules.md").read_text()
    raised = set()
    for path in [*(ROOT / "qdq" / "check").rglob("*.py"), ROOT / "qdq" / "float_rules.py"]:
        source = path.read_text()
        raised.update(re.findall(r'"(QDQ\d+)"', source))
        raised.update(re.findall(r"\((R-[A-Z0-9-]+)", source))
    assert {rule for rule in raised if rule not in rules} == set()
    listed = set(re.findall(r"\| (QDQ\d+) \|", rules))
    assert listed == {rule for rule in raised if rule.startswith("QDQ")}
    documented = (DOCS / "errors.md").read_text()
    errors = [name for name in dir(importlib.import_module("qdq.errors")) if name.endswith("Error")]
    assert [name for name in errors if name not in documented] == []


def test_no_machine_path_stands_in_the_docs():
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"(?<![\w.])/(?:work|tmp|root|home|usr)/", text), page.name
