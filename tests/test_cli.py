"""`qdq` as it is called: output, files, exit codes, one line for what is wrong."""

import json
import logging
import os
import re
import signal
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qdq import Statistics, collect_statistics, disable_quantization, export_onnx, solve_ranges
from qdq.cli import main as cli
from qdq.errors import ArgumentError

FLOAT = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N,3,8,8] x) => (float[N,4,8,8] y)
<float[4,3,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}>
{
    y = Conv(x, w)
}
"""


@pytest.fixture(autouse=True)
def _log():
    """The handlers of the log as they were."""
    logger = logging.getLogger("qdq")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def qdq(capsys, request):
    """Call it; exit code, stdout and stderr, which a failing test also shows."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        request.node.add_report_section(
            "call", f"qdq {arguments[0] if arguments else ''}", captured.out + captured.err
        )
        return exit.value.code, captured.out, captured.err

    return call


@pytest.fixture
def model(quantized, images, tmp_path):
    return export_onnx(quantized, images, tmp_path / "model.onnx").path


@pytest.fixture
def float_model(tmp_path):
    ir.save(ir.from_onnx_text(FLOAT), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


class TestHelp:
    def test_of_all(self, qdq):
        code, out, _ = qdq("--help")
        assert code == 0
        for words in (
            "ptq",
            "calibrate",
            "check",
            "build",
            "eval",
            "env",
            "qdq check runs",
            "Exit codes: 0 clean, 1 findings",
        ):
            assert words in out
        assert qdq()[:2] == (0, out)

    @pytest.mark.parametrize(
        "verb",
        [
            "ptq",
            "qat",
            "check",
            "build",
            "eval",
            "diverge",
            "bisect",
            "report",
            "explain",
            "gate",
            "env",
            "calibrate show",
            "calibrate merge",
            "calibrate solve",
        ],
    )
    def test_of_each_verb_explains_every_flag(self, qdq, verb):
        code, out, _ = qdq(*verb.split(), "--help")
        assert code == 0
        assert "Exit codes" in out
        assert "[default: ()]" not in out
        # A flag that is on by default with some options can be taken back; no other has a negative.
        assert set(re.findall(r"--no-[a-z-]+", out)) <= {"--no-center"}
        assert "--empty-" not in out
        rows = [line.strip("│* ") for line in out.splitlines() if re.match(r"│ (\*  )?--", line)]
        assert rows
        for row in rows:
            assert len(row.split("  ", 1)) == 2, row  # the flag, then words

    def test_version(self, qdq):
        import qdq as package

        assert qdq("--version") == (0, f"{package.__version__}\n", "")

    def test_as_module(self):
        output = subprocess.run(
            [sys.executable, "-m", "qdq", "--version"], capture_output=True, text=True, check=True
        )
        assert output.stdout.strip()


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("arguments", "message", "fix"),
        [
            (["nonsense"], 'unknown command "nonsense"', "see qdq --help"),
            (["check"], "ONNX requires an argument", "see qdq check --help"),
            (["check", "a.onnx", "b.onnx"], "b.onnx", "see qdq check --help"),
            (
                ["build", "a.onnx", "--sm", "old"],
                'unable to convert "old" into int',
                "see qdq build --help",
            ),
            (
                ["build", "a.onnx", "--backend", "cuda"],
                'invalid value "cuda" for --backend',
                "see qdq build --help",
            ),
            (
                ["eval", "--device", "gpu"],
                "device is 'gpu'; expected cpu, cuda or cuda:N.",
                "name one of those.",
            ),
            (
                ["ptq", "--device", "cuda:77"],
                "device is cuda:77; torch finds GPUs:",
                "choose another one, or device cpu; nvidia-smi lists the GPUs, and torch needs a build for CUDA.",
            ),
            (
                ["qat", "--device", "cuda:x"],
                "device is 'cuda:x'; expected cpu, cuda or cuda:N.",
                "name one of those.",
            ),
            (
                ["eval", "--batch-size", "0"],
                'invalid value "0" for --batch-size',
                "see qdq eval --help",
            ),
            (
                ["eval", "--eval-images", "-3"],
                'invalid value "-3" for --eval-images',
                "see qdq eval --help",
            ),
            (
                ["eval", "--eval-images", "1.5"],
                'unable to convert "1.5" into int',
                "see qdq eval --help",
            ),
            (
                ["eval", "--eval-images", "1e3"],
                'unable to convert "1e3" into int',
                "see qdq eval --help",
            ),
            (
                ["eval", "--batch-size", "inf"],
                'unable to convert "inf" into int',
                "see qdq eval --help",
            ),
            (
                ["eval", "--batch-size", "nan"],
                'unable to convert "nan" into int',
                "see qdq eval --help",
            ),
            (["eval", "--seed", "2.0"], 'unable to convert "2.0" into int', "see qdq eval --help"),
            (
                ["eval", "--batch-size", "99999999999"],
                "99999999999 is more than 4294967295",
                "see qdq eval --help",
            ),
            (["eval", "--batch-size", "9" * 5000], "unable to convert", "see qdq eval --help"),
            (
                ["build", "a.onnx", "--sm", "8.9"],
                'unable to convert "8.9" into int',
                "see qdq build --help",
            ),
            (["qat", "--steps", "1.5"], 'unable to convert "1.5" into int', "see qdq qat --help"),
            (["qat", "--epochs", "1.5"], 'unable to convert "1.5" into int', "see qdq qat --help"),
            (["ptq", "--confirm", "0.5"], 'unable to convert "0.5" into int', "see qdq ptq --help"),
            (
                ["ptq", "--max-float-layers", "0.5"],
                'unable to convert "0.5" into int',
                "see qdq ptq --help",
            ),
            (["calibrate", "nonsense"], 'unknown command "nonsense"', "see qdq calibrate --help"),
            (["calibrate", "show"], "FILE", "see qdq calibrate show --help"),
            (["calibrate", "merge", "a"], "--output", "see qdq calibrate merge --help"),
            (
                ["calibrate", "solve", "a", "--method", "best"],
                'invalid value "best"',
                "see qdq calibrate solve --help",
            ),
            (["env", "--nonsense"], "unknown option: --nonsense", "see qdq env --help"),
        ],
    )
    def test_is_one_line_and_the_help_to_see(self, qdq, arguments, message, fix):
        code, out, err = qdq(*arguments)
        error, hint = err.splitlines()
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert message in error
        assert hint == f"  fix: {fix}"

    def test_list_takes_several_at_once_or_one_by_one(self, monkeypatch):
        seen = []

        def recipe(*, exclude: tuple[str, ...] = ()) -> int:
            seen.append(exclude)
            return 1

        for argv in (["--exclude", "a", "b"], ["--exclude", "a", "--exclude", "b"]):
            monkeypatch.setattr(sys, "argv", ["recipe.py", *argv])
            with pytest.raises(SystemExit) as exit:
                cli.run_command(recipe)
            assert exit.value.code == 1
        assert seen == [("a", "b"), ("a", "b")]


class TestErrors:
    @staticmethod
    def run(monkeypatch, capsys, error, *arguments):
        def recipe() -> int:
            """Fails."""
            raise error

        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.run_command(recipe)
        return exit.value.code, capsys.readouterr().err

    def test_of_qdq_is_two_lines(self, monkeypatch, capsys):
        code, err = self.run(
            monkeypatch, capsys, ArgumentError("found this\nand that.", "do this.")
        )
        assert (code, err) == (2, "error: found this and that.\n  fix: do this.\n")

    def test_of_qdq_with_its_traceback(self, monkeypatch, capsys):
        code, err = self.run(monkeypatch, capsys, ArgumentError("found.", "do."), "-v")
        assert code == 2
        assert "Traceback" in err
        assert err.endswith("error: found.\n  fix: do.\n")

    def test_that_nobody_foresaw_shows_where_and_is_no_finding(self, monkeypatch, capsys):
        code, err = self.run(monkeypatch, capsys, ZeroDivisionError("oops"))
        assert code == 2
        assert "Traceback" in err
        assert "error: ZeroDivisionError: oops\n  fix: this is a bug in qdq" in err

    def test_interrupt(self, monkeypatch, capsys):
        code, err = self.run(monkeypatch, capsys, KeyboardInterrupt())
        assert code == 130
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "shown"), [([], "wl"), (["-v"], "iwl"), (["-q"], ""), (["--quiet"], "")]
)
def test_how_much_of_the_log_is_shown(monkeypatch, capsys, flags, shown):
    def recipe() -> int:
        logger = logging.getLogger("qdq.somewhere")
        logger.info("info-line")
        logger.warning("warning-line")
        return 0

    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    with pytest.raises(SystemExit):
        cli.run_command(recipe)
    err = capsys.readouterr().err
    assert ("info-line" in err, "warning-line" in err) == ("i" in shown, "w" in shown)


class TestStreams:
    """Wherever the shell sends what is printed."""

    @staticmethod
    def run(redirection, *arguments):
        command = [
            "bash",
            "-c",
            f'"$@" {redirection}',
            "bash",
            sys.executable,
            "-m",
            "qdq",
            *arguments,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.returncode, result.stderr

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [(["env"], 0), (["--help"], 0), (["plan", "diff", "a", "b"], 2), (["nonsense"], 2)],
    )
    @pytest.mark.parametrize(
        "redirection", [">&-", ">&- 2>&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"]
    )
    def test_closed_or_full_where_nothing_is_lost(self, redirection, arguments, code):
        exit_code, errors = self.run(redirection, *arguments)
        assert exit_code == code
        assert "Traceback" not in errors

    @pytest.mark.parametrize("arguments", [["env"], ["--help"]])
    def test_full(self, arguments):
        code, errors = self.run(">/dev/full", *arguments)
        assert code == 2
        assert errors == (
            "error: cannot write or print the result: No space left on device.\n"
            "  fix: free some space, or write the result elsewhere.\n"
        )

    @pytest.mark.parametrize("arguments", [["env"], ["--help"]])
    def test_who_reads_has_enough(self, arguments):
        code, errors = self.run("| true; exit ${PIPESTATUS[0]}", *arguments)
        assert (code, errors) == (141, "")

    def test_a_closed_output_takes_no_number_of_a_file_that_is_written(self, tmp_path):
        assert self.run(f">&- 2>&- --json {tmp_path / 'env.json'}", "env")[0] == 0
        assert json.loads((tmp_path / "env.json").read_text())["numpy"] == np.__version__

    def test_letters_that_the_output_does_not_have(self, tmp_path):
        command = [sys.executable, "-m", "qdq", "plan", "diff", tmp_path / "größe", tmp_path / "b"]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
        assert result.returncode == 2
        assert "gr\\xf6\\xdfe" in result.stderr
        assert len(result.stderr.splitlines()) == 2


class TestNames:
    """Names that cannot be of a file."""

    COMMANDS = (
        ["check", "NAME"],
        ["build", "NAME"],
        ["eval", "NAME"],
        ["eval", "--weights", "NAME", "--model", "squeezenet1_1"],
        ["report", "NAME"],
        ["report", "NAME", "NAME"],
        ["explain", "NAME", "layer"],
        ["gate", "NAME", "--max-drop", "1"],
        ["plan", "diff", "NAME", "NAME"],
        ["calibrate", "show", "NAME"],
        ["calibrate", "solve", "NAME"],
        ["calibrate", "merge", "NAME", "NAME", "-o", "new.safetensors"],
        ["env", "--json", "NAME"],
    )

    @pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments[:2]))
    @pytest.mark.parametrize("kind", ["long", "loop", "FIFO", "not UTF-8", "new\nline"])
    def test_are_one_line(self, qdq, tmp_path, monkeypatch, kind, arguments):
        if "eval" in arguments:
            pytest.importorskip("torchvision", reason="needs the extra 'demo'")
        monkeypatch.chdir(tmp_path)
        name = {
            "long": "x" * 5000,
            "not UTF-8": "missing/\udcff",
            "new\nline": "missing\nerror: faked/x",
        }.get(kind, kind)
        if kind == "loop":
            (tmp_path / "loop").symlink_to("loop")
        elif kind == "FIFO":
            os.mkfifo(tmp_path / "FIFO")
        if arguments[0] == "env" and kind not in ("long", "loop"):
            pytest.skip("can be written")
        code, out, err = qdq(*[name if argument == "NAME" else argument for argument in arguments])
        error, fix = err.splitlines()
        assert (code, out) == (2, "")
        assert error.startswith("error: ") and fix.startswith("  fix: ")
        assert err.replace("\n", "").isprintable()
        assert len(error) < 500


class TestEnv:
    def test_names_versions(self, qdq, tmp_path):
        code, out, _ = qdq("env", "--json", tmp_path / "env.json")
        assert code == 0
        written = json.loads((tmp_path / "env.json").read_text())
        assert written["numpy"] == np.__version__
        assert all(name in out and version in out for name, version in written.items())
        assert "builds: " in out


class TestCheck:
    def test_clean(self, qdq, model, tmp_path):
        code, out, _ = qdq(
            "check", model, "--ignore", "QDQ112", "--json", tmp_path / "new" / "check.json"
        )
        assert code == 0
        assert "int8 expected: 3 of 3 nodes that multiply" in out
        findings = json.loads((tmp_path / "new" / "check.json").read_text())["findings"]
        assert {finding["severity"] for finding in findings} == {"info"}

    def test_nothing_quantized_is_said(self, qdq, float_model):
        code, out, _ = qdq("check", float_model)
        assert code == 0
        assert "nothing is quantized" in out

    def test_finding(self, qdq, tmp_path, model):
        broken = ir.load(model)
        broken.graph.initializers["conv._input_quantizer.scale"].const_value = ir.tensor(
            np.float32(0)
        )
        ir.save(broken, tmp_path / "broken.onnx")
        code, out, _ = qdq("check", tmp_path / "broken.onnx")
        assert code == 1
        assert "QDQ101 error conv._input_quantizer/QuantizeLinear: a scale is zero" in out

    def test_no_file_and_no_onnx(self, qdq, tmp_path):
        (tmp_path / "text.onnx").write_text("text")
        for path, message in (
            (tmp_path / "missing.onnx", "does not exist"),
            (tmp_path / "text.onnx", "not a valid ONNX"),
        ):
            code, out, err = qdq("check", path)
            assert (code, out) == (2, "")
            assert message in err

    def test_report_that_cannot_be_written_is_refused_first(self, qdq, model, tmp_path):
        code, out, err = qdq("check", model, "--json", tmp_path)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: cannot write {tmp_path}: Is a directory.")


class TestCalibrate:
    @pytest.fixture
    def file(self, quantized, images, tmp_path):
        return collect_statistics(quantized, [images, 2 * images]).save(
            tmp_path / "calibration.safetensors"
        )

    def test_show(self, qdq, file, tmp_path):
        code, out, _ = qdq(
            "calibrate", "show", file, "--plots", tmp_path / "p.html", "--json", tmp_path / "s.json"
        )
        assert code == 0
        summary = json.loads((tmp_path / "s.json").read_text())
        assert summary == json.loads(file.with_suffix(".json").read_text())
        page = (tmp_path / "p.html").read_text()
        for name, entry in summary["tensors"].items():
            assert f"{entry['amax']['entropy']:.4g}" in out
            assert name in out and name in page

    def test_no_input_is_overwritten(self, qdq, file, tmp_path):
        content = file.read_bytes()
        for arguments in (
            ("show", file, "--plots", file),
            ("show", file, "--json", file),
            ("solve", file, "--json", file),
        ):
            code, _, err = qdq("calibrate", *arguments)
            assert code == 2
            assert "is also an input of this command and would be overwritten" in err
        assert file.read_bytes() == content

    def test_show_of_some(self, qdq, file):
        _, out, _ = qdq("calibrate", "show", file, "--tensor", "conv.*")
        assert "1 tensors, 2 batches" in out
        assert "head" not in out
        code, out, err = qdq("calibrate", "show", file, "--tensor", "nothing")
        assert (code, out) == (2, "")
        assert "no tensor matches 'nothing'" in err

    def test_merge(self, qdq, file, quantized, images, tmp_path):
        second = collect_statistics(quantized, [3 * images]).save(tmp_path / "second.safetensors")
        merged = tmp_path / "new" / "merged.safetensors"
        code, out, _ = qdq("calibrate", "merge", file, second, "-o", merged)
        assert (code, out) == (0, f"{merged}: 3 tensors, 3 batches of 2 files\n")
        expected = collect_statistics(quantized, [images, 2 * images, 3 * images])
        assert merged.read_bytes() == expected.to_bytes()

    def test_merge_with_another_model(self, qdq, file, quantized, images, tmp_path):
        disable_quantization(quantized.head)
        second = collect_statistics(quantized, [images]).save(tmp_path / "second.safetensors")
        merged = tmp_path / "merged.safetensors"
        code, _, err = qdq("calibrate", "merge", file, second, "-o", merged)
        assert code == 2
        assert (
            f"{second} does not fit {file}: the statistics are of different models: only one has head"
            in err
        )
        assert not merged.exists()

    def test_solve(self, qdq, file, quantized, tmp_path):
        code, out, _ = qdq(
            "calibrate", "solve", file, "--method", "entropy", "--json", tmp_path / "r.json"
        )
        assert code == 0
        ranges = solve_ranges(quantized, Statistics.load(file), method="entropy")
        expected = {entry.name: entry.amax for entry in ranges if entry.batches}
        written = json.loads((tmp_path / "r.json").read_text())
        assert {name: np.float32(amax) for name, amax in written["amax"].items()} == expected
        assert written["method"] == "entropy"
        assert all(f"{amax:.6g}" in out for amax in expected.values())

    def test_solve_into_a_file(self, qdq, file, model, tmp_path):
        code, out, _ = qdq(
            "calibrate",
            "solve",
            file,
            "--method",
            "percentile",
            "--percentile",
            90,
            "--onnx",
            model,
            "-o",
            tmp_path / "new.onnx",
            "--json",
            tmp_path / "r.json",
        )
        assert code == 0
        assert "new.onnx: 3 scales changed, 0 were the same (percentile)" in out
        written = json.loads((tmp_path / "r.json").read_text())
        scales = ir.load(tmp_path / "new.onnx").graph.initializers
        for name, amax in written["amax"].items():
            assert scales[f"{name}.scale"].const_value.numpy() == np.float32(amax) / np.float32(127)
        assert written["onnx"]["changed"].keys() == written["amax"].keys()
        assert qdq("check", tmp_path / "new.onnx", "--ignore", "QDQ112")[0] == 0

    def test_solve_into_a_file_with_a_pair_that_has_no_statistics(self, qdq, file, model, tmp_path):
        part = Statistics.load(file).select("conv.*").save(tmp_path / "part.safetensors")
        code, out, _ = qdq(
            "calibrate",
            "solve",
            part,
            "--method",
            "gauss",
            "--onnx",
            model,
            "-o",
            tmp_path / "n.onnx",
        )
        assert code == 1
        assert "not changed: head._input_quantizer: the statistics do not have it" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--onnx", "model.onnx"], "--onnx and --output go together"),
            (["-o", "new.onnx"], "--onnx and --output go together"),
            (["--percentile", "50"], "method 'mse' has no option percentile"),
            (["--method", "percentile", "--percentile", "101"], "found 101"),
            (["--percentile", "nan"], 'invalid value "nan" for --percentile'),
            (["--json", "/dev/null/e"], "cannot write /dev/null/e"),
            (["--onnx", "missing.onnx", "-o", "new.onnx"], "missing.onnx does not exist"),
        ],
    )
    def test_bad_input(self, qdq, file, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        code, _, err = qdq("calibrate", "solve", file, *arguments)
        assert code == 2
        assert message in err.splitlines()[0]
        assert not (tmp_path / "new.onnx").exists()

    @pytest.mark.parametrize("content", [None, b"", b"text", b"\x08" + b"\0" * 15])
    def test_no_statistics(self, qdq, tmp_path, content):
        path = tmp_path / "bad.safetensors"
        if content is not None:
            path.write_bytes(content)
        for arguments in (
            ["show", path],
            ["solve", path],
            ["merge", path, path, "-o", tmp_path / "m.safetensors"],
        ):
            code, out, err = qdq("calibrate", *arguments)
            assert (code, out) == (2, "")
            assert "bad.safetensors" in err.splitlines()[0]
            assert len(err.splitlines()) == 2

    def test_needs_no_torch(self, file, model, tmp_path):
        script = (
            "import sys; sys.modules['torch'] = None; from qdq.cli.calibrate import merge, show, solve\n"
            "from pathlib import Path; path, folder = Path(sys.argv[1]), Path(sys.argv[2])\n"
            "assert show(path, plots=folder / 'p.html') == 0\n"
            "assert solve(path, onnx=folder / 'model.onnx', output=folder / 'new.onnx') == 0\n"
            "assert merge(path, path, output=folder / 'm.safetensors') == 0\n"
        )
        assert model == tmp_path / "model.onnx"
        subprocess.run([sys.executable, "-c", script, str(file), str(tmp_path)], check=True)
        assert (tmp_path / "p.html").exists() and (tmp_path / "new.onnx").exists()


@pytest.mark.trt
class TestBuild:
    @pytest.fixture(autouse=True)
    def _rtx(self):
        pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")

    def test_engine_census_and_lines(self, qdq, model, tmp_path):
        shapes = ["--min-shapes", "images:1x3x12x12", "--max-shapes", "images:4x3x12x12"]
        code, out, _ = qdq(
            "build", model, "-o", tmp_path / "e", *shapes, "--sm", 86, "--json", tmp_path / "b.json"
        )
        assert code == 0
        assert (tmp_path / "e").stat().st_size > 0
        assert "int8: 3 of 3 expected" in out
        assert "# on the target, TensorRT 10\ntrtexec --onnx=" in out
        written = json.loads((tmp_path / "b.json").read_text())
        assert written["sm"] == 86
        assert written["profiles"]["images"]["max"] == [4, 3, 12, 12]

    def test_nothing_quantized_is_said(self, qdq, float_model):
        code, out, _ = qdq("build", float_model)
        assert code == 0
        assert "nothing in the file is quantized" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--sm", "77"], "cannot build for SM 77"),
            (["-o", "/dev/null/e"], "cannot write /dev/null/e"),
            (["--json", "/dev/null/e"], "cannot write /dev/null/e"),
            (["--min-shapes", "x"], "'x' is not a shape"),
            (["--min-shapes", "y:1x3x12x12"], "names y"),
        ],
    )
    def test_bad_input(self, qdq, model, arguments, message):
        code, out, err = qdq("build", model, *arguments)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[0]
        assert not model.with_suffix(".rtx.engine").exists()

    @pytest.mark.parametrize("content", [None, b"", b"text"])
    def test_no_onnx(self, qdq, tmp_path, content):
        if content is not None:
            (tmp_path / "bad.onnx").write_bytes(content)
        code, _, err = qdq("build", tmp_path / "bad.onnx")
        assert code == 2
        assert len(err.splitlines()) == 2

    def test_interrupt_is_not_lost_in_the_builder(self, qdq, model, monkeypatch):
        """It reaches the process that waits for the build, and ends the build."""
        from qdq.trt import builder

        children = []

        class Interrupted(builder.Child):
            def _exchange(self, *arguments):
                children.append(self)
                signal.raise_signal(signal.SIGINT)
                return super()._exchange(*arguments)

        monkeypatch.setattr(builder, "Child", Interrupted)
        assert qdq("build", model)[0] == 130
        assert not model.with_suffix(".rtx.engine").exists()
        assert [child.is_running for child in children] == [False]


class TestEval:
    @pytest.fixture
    def data(self, tmp_path):
        """Eight random images of two classes."""
        image = pytest.importorskip("PIL.Image", reason="needs the extra 'demo'")
        pytest.importorskip("torchvision", reason="needs the extra 'demo'")
        random = np.random.default_rng(0)
        for index in range(8):
            path = tmp_path / "data" / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        return ["--model", "squeezenet1_1", "--weights", "random", "--data-dir", tmp_path / "data"]

    def test_two_files_of_one_name(self, qdq, data, tmp_path):
        from qdq import load_model

        net = load_model("squeezenet1_1", "random")
        paths = [tmp_path / name / "model.onnx" for name in ("a", "b")]
        for path in paths:
            path.parent.mkdir()
            program = torch.onnx.export(
                net.module,
                (torch.randn(2, 3, 224, 224),),
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )
            program.save(path)
        code, out, _ = qdq("eval", *paths, *data, "--json", tmp_path / "eval.json")
        assert code == 0
        rows = json.loads((tmp_path / "eval.json").read_text())["candidates"]
        assert [row["name"] for row in rows] == ["float", *map(str, paths)]
        assert all(row["agreement"] == 1 for row in rows)
        assert all(row["sqnr_db"] > 100 for row in rows[1:])
        assert rows[1]["megabytes"] == pytest.approx(paths[0].stat().st_size / 1e6)
        assert all(row["name"] in out for row in rows)

    def test_file_of_other_images(self, qdq, data, float_model):
        code, _, err = qdq("eval", float_model, *data)
        assert code == 2
        assert "given [6, 3, 224, 224] float32, its inputs are x ['N', 3, 8, 8]" in err

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "does not exist"), (b"", "is empty"), (b"text", "ONNX Runtime cannot load")],
    )
    def test_bad_file_is_refused_before_any_work(self, qdq, tmp_path, content, message):
        if content is not None:
            (tmp_path / "bad.onnx").write_bytes(content)
        code, _, err = qdq("eval", tmp_path / "bad.onnx", "--model", "no such model")
        assert code == 2
        assert message in err


def test_interrupt_that_native_code_turned_into_another_error(monkeypatch, capsys):
    from qdq.cli import main

    def command() -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(main, "_keep_freed_memory", lambda: None)
    monkeypatch.setattr(main, "_log_to_console", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(SystemExit) as exit:
        main.run_command(command)
    assert exit.value.code == 130
    assert capsys.readouterr().err.strip().startswith("interrupted")


def test_interrupt_while_the_libraries_of_the_command_line_load(tmp_path):
    (tmp_path / "cyclopts.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-m", "qdq", "env"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.strip().startswith("interrupted")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["eval"], ["env"]])
def test_working_directory_that_was_deleted(tmp_path, arguments):
    script = (
        "import os, sys; os.mkdir('deleted'); os.chdir('deleted'); os.rmdir(os.getcwd())\n"
        f"from qdq.__main__ import main; sys.argv = ['qdq', *{arguments}]; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    error, fix = result.stderr.splitlines()
    assert error.startswith("error: the working directory cannot be used: No such file")
    assert fix == "  fix: change to a folder that exists, and run the command again."
