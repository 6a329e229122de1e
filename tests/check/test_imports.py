"""The operators that a rule calls refused, asked of the parser of TensorRT-RTX, with the examples that onnx has."""

import json
import subprocess
import sys

import onnx
import pytest

from qdq.check.rules.imports import _NOT_IMPORTED, _PLUGINS

pytestmark = pytest.mark.trt

# In a process of its own, because the parser may crash.
PARSE = """
import json, sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
for path in sys.argv[1:]:
    network = trt.Builder(logger).create_network(0)
    with open(path, "rb") as file:
        print(json.dumps([path, trt.OnnxParser(network, logger).parse(file.read())]))
"""
READ = {"Relu", "GridSample", "Einsum"}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Operator -> whether the parser reads one of its examples."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from onnx.backend.test.case.node import collect_testcases

    folder = tmp_path_factory.mktemp("examples")
    asked = _NOT_IMPORTED | _PLUGINS | READ
    operators = {}
    for case in collect_testcases(None):
        nodes = () if case.model is None else case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in asked and nodes[0].domain == "":
            path = folder / f"{case.name}.onnx"
            onnx.save(case.model, path)
            operators[str(path)] = nodes[0].op_type
    command = [sys.executable, "-c", PARSE, *operators]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parsed: dict[str, bool] = {}
    for line in output.splitlines():
        path, is_read = json.loads(line)
        parsed[operators[path]] = parsed.get(operators[path], False) or is_read
    return parsed


def test_none_of_them_is_read(verdicts):
    read = {operator for operator, is_read in verdicts.items() if is_read}
    assert read == READ


def test_nearly_all_of_them_were_asked(verdicts):
    without_example = (_NOT_IMPORTED | _PLUGINS) - verdicts.keys()
    assert all(name.startswith(("Sequence", "Optional", "Concat")) for name in without_example)
