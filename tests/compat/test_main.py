"""`python -m qdq.compat`: the same script under plain `python` says what must come out."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qdq
from qdq.compat.__main__ import main

FACTS = """
import inspect, os, sys
class Here: pass
def main():
    print(__name__, __file__, __package__, __spec__ and __spec__.name, __builtins__)
    print(sys.argv, sys.path[0], sys.modules["__main__"].Here is Here, inspect.getsource(Here))
main()
"""
ALIAS = """
import pkgutil, sys, types
import pytorch_quantization
from pytorch_quantization.nn.functional import ClipFunction
import qdq.compat, qdq.compat.nn.functional
assert pytorch_quantization is qdq.compat
assert ClipFunction is qdq.compat.nn.functional.ClipFunction
names = [info.name for info in pkgutil.walk_packages(qdq.compat.__path__, "qdq.compat.")]
assert "qdq.compat.utils.quant_logging" in names
for name in names:
    if name not in ("qdq.compat.__main__", "qdq.compat.alias"):
        assert sys.modules[name.replace("qdq.compat", "pytorch_quantization")] is sys.modules[name], name
from pytorch_quantization import quant_modules, calib, tensor_quant
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from pytorch_quantization.nn.modules import _utils
import pytorch_quantization.cuda_ext as extension
assert issubclass(quant_nn.modules.quant_linear.QuantLinear, _utils.QuantMixin)
assert quant_nn.TensorQuantizer is qdq.compat.nn.TensorQuantizer
print("answered")
"""
FORK = """
import multiprocessing
def double(x):
    from pytorch_quantization.utils import reduce_amax
    return 2 * x
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map(double, [1, 2]))
"""
FAULT = """
def fail():
    raise KeyError("of the script")
try:
    import pytorch_quantization.not_there
except ModuleNotFoundError as error:
    print(error)
fail()
"""


@pytest.fixture
def launch(tmp_path):
    """Run `python ARGUMENTS` in the test's folder."""

    def run(*arguments, flags=("-m", "qdq.compat"), **environment):
        path = os.pathsep.join(
            [str(Path(qdq.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        )
        return subprocess.run(
            [sys.executable, *flags, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path} | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The same within this process, which is faster; for what runs no script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = dict(sys.modules)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qdq.compat", *arguments])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    yield run
    for name in sys.modules.keys() - modules.keys():
        if name.partition(".")[0] in ("pytorch_quantization", "folder"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    """Write a script below the test's folder."""

    def script(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)

    return script


def test_script_sees_what_it_would_under_python(launch, write, tmp_path):
    write("sub/facts.py", FACTS)
    (tmp_path / "link.py").symlink_to("sub/facts.py")
    for script in ("sub/facts.py", "link.py", str(tmp_path / "sub" / "facts.py")):
        arguments = (script, "--help", "-m", "x y", "")
        plain = launch(*arguments, flags=())
        result = launch(*arguments)
        assert (result.returncode, result.stdout, result.stderr) == (0, plain.stdout, "")
        assert "['" + script + "', '--help', '-m', 'x y', '']" in result.stdout


def test_module_sees_what_it_would_under_python(launch, write):
    write("tools/facts.py", FACTS)
    write("tools/__main__.py", FACTS)
    for module in ("tools.facts", "tools"):
        plain = launch("-m", module, "-m", "--batches", "4", flags=())
        result = launch("-m", module, "-m", "--batches", "4")
        assert (result.returncode, result.stdout, result.stderr) == (0, plain.stdout, "")


def test_safe_path_is_left_alone(launch, write):
    write("facts.py", FACTS)
    plain, result = (
        launch("facts.py", flags=flags, PYTHONSAFEPATH="1") for flags in ((), ("-m", "qdq.compat"))
    )
    assert (result.returncode, result.stdout) == (0, plain.stdout)


def test_every_module_has_both_names_even_beside_the_real_package(launch, write):
    write(
        "pytorch_quantization/__init__.py", "raise SystemExit('the installed package was imported')"
    )
    write("script.py", ALIAS)
    result = launch("script.py")
    assert (result.returncode, result.stdout, result.stderr) == (0, "answered\n", "")


def test_forked_processes_have_the_alias(launch, write):
    write("script.py", FORK)
    result = launch("script.py")
    assert (result.returncode, result.stdout) == (0, "[2, 4]\n"), result.stderr


def test_exception_of_the_script_is_shown_as_python_shows_it(launch, write):
    write("script.py", FAULT)
    plain = launch("script.py", flags=())
    for arguments in (["script.py"], ["-m", "script"]):
        result = launch(*arguments)
        assert (result.returncode, result.stderr) == (1, plain.stderr)
        assert result.stdout == "No module named 'pytorch_quantization.not_there'\n"


def test_excepthook_of_the_script_is_called(launch, write):
    write(
        "script.py",
        "import sys\nsys.excepthook = lambda kind, error, trace: print(kind.__name__)\n1 / 0\n",
    )
    result = launch("script.py")
    assert (result.returncode, result.stdout, result.stderr) == (1, "ZeroDivisionError\n", "")


@pytest.mark.parametrize(
    "text", ["def f(:\n", "import sys; sys.exit(7)", "import sys; sys.exit('bye')", "exit()"]
)
def test_syntax_errors_and_exits(launch, write, text):
    write("script.py", text)
    plain = launch("script.py", flags=())
    result = launch("script.py")
    assert (result.returncode, result.stderr) == (plain.returncode, plain.stderr)


def test_missing_import_of_a_package_on_the_way_is_its_own_error(launch, write):
    write("tools/__init__.py", "import nothing_of_that_name")
    result = launch("-m", "tools.run")
    assert result.returncode == 1
    assert result.stderr.endswith("ModuleNotFoundError: No module named 'nothing_of_that_name'\n")
    assert "qdq" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupt_ends_it_as_it_ends_python(launch, write):
    write(
        "script.py",
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n",
    )
    # A shell's 130.
    assert (
        launch("script.py").returncode == launch("script.py", flags=()).returncode == -signal.SIGINT
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no script was given"),
        (["missing.py"], "cannot read the script 'missing.py': No such file"),
        (["folder"], "cannot read the script 'folder': Is a directory"),
        (["--verbose", "script.py"], "unknown option --verbose"),
        (["-m"], "-m needs the name of a module"),
        (["-m", "missing"], "no module named 'missing'"),
        (["-m", "missing.module"], "no module named 'missing.module'"),
        (["-m", "folder"], "no module named 'folder.__main__'"),
        (["-m", ".folder"], "no module named '.folder'"),
        (["-m", ""], "no module named ''"),
        (["-m", "math"], "module 'math' is not written in Python"),
    ],
)
def test_nothing_to_run(call, write, arguments, words):
    write("folder/__init__.py", "")
    code, out, err = call(*arguments)
    message, fix = err.splitlines()
    assert (code, out) == (2, "")
    assert message.startswith(f"error: {words}")
    assert fix.startswith("  fix: ")


def test_nothing_to_run_as_a_process(launch):
    result = launch("missing.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: cannot read the script 'missing.py': No such file")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(call, option):
    code, out, err = call(option, "script.py")
    assert (code, err) == (0, "")
    assert "python -m qdq.compat ptq.py --data-dir" in out
