"""Damaged files: a verdict, findings or one clear error, and nothing worse; `--fix` leaves no file where it fails."""

import json
import subprocess
import sys
import textwrap

import pytest
from mutants import make_mutants, write_data

from qdq import CheckError, check_onnx
from qdq.check.fix import fix_onnx

COUNT, SEED = 310, 0
LOADER = """
    import json, sys
    import onnxruntime
    answers, sys.stdout = sys.stdout, sys.stderr  # onnxruntime prints
    onnxruntime.set_default_logger_severity(4)
    for line in sys.stdin:
        try:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            onnxruntime.InferenceSession(line.strip(), options, providers=["CPUExecutionProvider"])
            loads = True
        except Exception:
            loads = False
        print(json.dumps(loads), file=answers, flush=True)
"""


class Loader:
    """ONNX Runtime in a process of its own, started again where a file ends it."""

    def __init__(self):
        self.process = None

    def can_load(self, path):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(LOADER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return bool(answer) and json.loads(answer)

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def loader():
    loader = Loader()
    yield loader
    loader.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants") / "models"
    folder.mkdir()
    write_data(folder)
    paths = {}
    for index, mutant in enumerate(make_mutants(COUNT, SEED)):
        paths[mutant.name] = folder / f"{index}.onnx"
        paths[mutant.name].write_bytes(mutant.content)
    return paths


def test_no_verdict_of_a_mutant_is_wrong(files, loader):
    """What is called valid loads, and what does not load is a problem; a rule that fails would be a finding."""
    wrong = []
    for name, path in files.items():
        loads = loader.can_load(path)
        try:
            report = check_onnx(path)
        except CheckError:
            continue
        text = report.format_table()
        failed = [finding for finding in report.findings if "cannot be applied" in finding.message]
        if failed or (
            not loads and (report.validity.is_valid or "valid ONNX" in text or not report.problems)
        ):
            wrong.append((name, loads, failed))
    assert wrong == []


def test_a_fix_that_fails_writes_nothing_and_one_that_works_breaks_nothing(files, loader, tmp_path):
    wrong = []
    # Each loads the file three times.
    for index, (name, path) in enumerate(list(files.items())[::2]):
        output = tmp_path / "models" / f"{index}.onnx"
        try:
            fix_onnx(path, output)
        except CheckError:
            if output.exists():
                wrong.append((name, "a file is left"))
            continue
        if not loader.can_load(output) and loader.can_load(path):
            wrong.append((name, "it loaded, and the copy does not"))
    assert wrong == []


def test_mutants_are_the_same_every_time():
    first, second = (make_mutants(COUNT, SEED) for _ in range(2))
    assert first == second
    assert len({mutant.content for mutant in first}) > 0.8 * COUNT
