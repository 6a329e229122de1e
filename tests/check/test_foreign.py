"""Files of onnx's own tests: none is refused, as they are and as onnx-graphsurgeon writes them, without shapes."""

from pathlib import Path

import onnx
import pytest

from qdq import check_onnx
from qdq.check.rules import FILE_RULES

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FILES = sorted(DATA.rglob("*.onnx"))[::4]  # tools/check_foreign.py takes all, and builds them


def drop_shapes(model):
    for output in model.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")


@pytest.mark.skipif(not FILES, reason="this onnx comes without the models of its tests")
def test_none_is_refused_and_none_is_blamed(tmp_path):
    """Where ONNX Runtime has no kernel for an old opset, or no locale, the file is not at fault: an info."""
    blamed = []
    for index, path in enumerate(FILES):
        report = check_onnx(path)
        if rules := {finding.rule for finding in report.problems} & FILE_RULES:
            blamed.append((path.parent.name, rules))
        model = onnx.load(path)
        drop_shapes(model)
        onnx.save(model, tmp_path / f"{index}.onnx")
        bare = check_onnx(tmp_path / f"{index}.onnx")
        assert "QDQ209" in {finding.rule for finding in bare.findings} or not any(
            output.type.HasField("tensor_type") for output in model.graph.output
        )
        assert bare.validity.is_valid == report.validity.is_valid
    assert blamed == []
