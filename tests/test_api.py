"""The public surface, and what importing it costs."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import qdq

STUB = Path(qdq.__file__).with_suffix(".pyi")


def test_stub_and_lazy_table_say_the_same():
    names = {
        alias.asname
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == {*qdq._HOME_OF, *qdq._PACKAGES}


@pytest.mark.parametrize("package", ["qdq", "qdq.systems", "qdq.distiller"])
def test_every_name_loads_and_hides_no_module(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        assert value is not None
        if inspect.ismodule(value):
            continue
        assert not (Path(module.__file__).parent / f"{name}.py").exists()
        assert not (Path(module.__file__).parent / name).exists()


@pytest.mark.parametrize("package", ["systems", "distiller"])
def test_packages_are_imported_on_first_use(package):
    script = f"import qdq; assert {package!r} in dir(qdq); print(qdq.{package}.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"qdq.{package}"


def test_unknown_name():
    with pytest.raises(AttributeError, match="quantise"):
        qdq.quantise  # noqa: B018


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import qdq"],
        ["-c", "import qdq; qdq.systems.__all__; qdq.distiller.__all__"],
        ["-m", "qdq.cli.main", "--help"],
        [
            "-c",
            "import qdq.check, qdq.build, qdq.gate, qdq.statistics, qdq.cli.check, qdq.cli.build, qdq.cli.env",
        ],
    ],
)
def test_light_imports(command):
    script = "import sys, runpy\n"
    if command[0] == "-c":
        script += command[1]
    else:
        script += "from qdq.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    script += "\nheavy = ('torch', 'torchvision', 'tensorrt_rtx', 'matplotlib')"
    script += "\nprint('heavy:', [module for module in heavy if module in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip().endswith("heavy: []")
