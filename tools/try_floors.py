"""Run the tests with every dependency at the oldest version that pyproject.toml allows.

python tools/try_floors.py [--json FILE] [--environment FOLDER] [-- PYTEST-ARGUMENTS ...]

Needs about 6 GB of disk; the installation takes as long as that of `make test` in a fresh clone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from qdq.cli.main import run_command
from qdq.errors import DependencyError
from qdq.files import write_json

_ROOT = Path(__file__).resolve().parents[1]
# With `dev`, whose tools are the newest, because users do not install them.
_EXTRAS = (
    "demo",
    "rtx",
)


@dataclass(frozen=True)
class FloorRun:
    """The result of the tests at the lowest versions.

    Args:
        floors: Package -> its version.
        exit_code: Of pytest.
        summary: pytest's last line.
    """

    floors: dict[str, str]
    exit_code: int
    summary: str


def try_floors(
    *tests: str,
    environment: Path | None = None,
    json: Path | None = None,
) -> int:
    """Make an environment of the oldest versions and run the tests in it.

    Args:
        tests: For pytest: files, folders, options; all tests if left out.
        environment: Folder of the environment, which is kept; a temporary one if left out.
        json: Also write versions and result to this file.
    """
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = read_floors(project)
    with tempfile.TemporaryDirectory() as temporary:
        folder = environment or Path(temporary) / "environment"
        python = _install(folder, floors)
        summary, exit_code = _run_tests(python, tests)
    if json:
        write_json(json, asdict(FloorRun(floors, exit_code, summary)))
    return exit_code


def read_floors(project: dict[str, Any]) -> dict[str, str]:
    """The oldest version of each package that the dependencies and extras of a project allow.

    Args:
        project: The table `project` of a pyproject.toml.

    Raises:
        DependencyError: A package without a lowest version.
    """
    optional = project["optional-dependencies"]
    requirements = list(project["dependencies"])
    for extra in _EXTRAS:
        requirements += optional[extra]
    floors = {}
    for text in requirements:
        requirement = Requirement(text)
        versions = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        if not versions:
            raise DependencyError(
                f"{text!r} in pyproject.toml has no lowest version.", "write NAME>=VERSION."
            )
        floors[requirement.name] = versions[0]
    return floors


def _install(folder: Path, floors: dict[str, str]) -> Path:
    """Create an environment with the project at these versions, and return its Python.

    Raises:
        DependencyError: The versions cannot be installed together.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    constraints = folder / "floors.txt"
    constraints.write_text(
        "".join(f"{name}=={version}\n" for name, version in floors.items()), encoding="utf-8"
    )
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    project = f".[{','.join(_EXTRAS)},dev]"
    command = [*install, "--constraint", str(constraints), "--editable", project]
    if subprocess.run(command, check=False, cwd=_ROOT).returncode:
        raise DependencyError(
            "pip cannot install all lowest versions of pyproject.toml together.",
            "raise the one that the conflict above names.",
        )
    return python


def _run_tests(python: Path, tests: tuple[str, ...]) -> tuple[str, int]:
    """Return pytest's last line and its exit code; its output is shown."""
    command = [str(python), "-m", "pytest", *tests]
    last = ""
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return last, process.returncode


if __name__ == "__main__":
    run_command(try_floors)
