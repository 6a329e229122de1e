"""What an installed package tells its users, and the tools that they point at it."""

import re
import runpy
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from qdq.errors import DependencyError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def read_floors():
    return runpy.run_path(str(ROOT / "tools" / "try_floors.py"))["read_floors"]


def test_every_dependency_has_a_lowest_version(read_floors):
    floors = read_floors(PROJECT)
    assert floors["torch"] == "2.11"
    assert floors["foolbox"] == "3.3.4"
    assert len(floors) >= len(PROJECT["dependencies"])
    with pytest.raises(
        DependencyError, match=r"'numpy<3' in pyproject\.toml has no lowest version"
    ):
        read_floors({"dependencies": ["numpy<3"], "optional-dependencies": {"demo": [], "rtx": []}})


def test_the_page_of_a_package_index_links_to_nothing_that_is_not_there():
    """An index shows this text alone: what lies beside it in the repository is not there."""
    text = (ROOT / PROJECT["readme"]).read_text()
    assert [
        target for target in re.findall(r"\]\(([^)]*)\)", text) if not target.startswith("https://")
    ] == []


def test_metadata_names_authors_and_the_versions_of_python():
    assert PROJECT["authors"]
    oldest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1]
    minors = [
        int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))
    ]
    assert min(minors) == int(oldest)
    assert f"Python >= 3.{oldest}" in (ROOT / "README.md").read_text()
    assert f"Python >= 3.{oldest}" in (ROOT / "Makefile").read_text()


SCRIPT = """
from qdq import Schedule
from qdq.metrics import sqnr_db

reveal_type(sqnr_db)
Schedule(stepz=1)
"""


def test_a_type_checker_sees_the_types_of_an_installed_qdq(tmp_path):
    """mypy reads the types of an installed package only if it has the marker `py.typed`."""
    venv.create(tmp_path / "environment", with_pip=False)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (site / "qdq.pth").write_text(str(ROOT))
    script = tmp_path / "script.py"
    script.write_text(
        "from qdq.metrics import sqnr_db\nreveal_type(sqnr_db)\nfrom qdq import Schedule\nSchedule(stepz=1)\n"
    )
    options = [
        "--python-executable",
        tmp_path / "environment" / "bin" / "python",
        "--ignore-missing-imports",
    ]
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", *options, script]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert re.search(r'note: Revealed type is "def \(.*\) -> (builtins\.)?float"', output), output
    assert 'Unexpected keyword argument "stepz" for "Schedule"' in output
