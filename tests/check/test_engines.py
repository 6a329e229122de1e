"""What the rules call an error or float, asked of TensorRT-RTX: it refuses the file, or the census shows float."""

import onnx_ir as ir
import pytest
from small_graphs import AVGPOOL, MAXPOOL, PRODUCT, RESIDUAL, SOUND, load
from test_rules import BROKEN, SOUND_TWINS

from qdq import check_onnx
from qdq.check.fix import fix_onnx

pytestmark = pytest.mark.trt

FLOAT = {
    "QDQ103",
    "QDQ104",
    "QDQ105 other axis",
    "QDQ105 other axis of a matrix",
    "QDQ110 only the weight",
    "QDQ105 not written",
    "QDQ110 only the input",
    "QDQ117 transposed",
}
REFUSED = {
    "QDQ101 zero",
    "QDQ101 negative",
    "QDQ102 not zero",
    "QDQ107 weight",
    "QDQ107 bias",
    "QDQ108 bias",
    "QDQ108 operator",
    "QDQ105 other length",
    "QDQ129",
    "QDQ131 operator",
    "QDQ131 plugin",
    "QDQ131 option",
    "QDQ132 constant",
    "QDQ132 cast",
    "QDQ132 input",
}


NO_ZERO_POINT = {
    "weight": (SOUND.replace("(w, ws, wz)", "(w, ws)"), {"c_w"}),
    "activation": (SOUND.replace("(xd_q, s, z)", "(xd_q, s)"), {"xd"}),
    "both": (
        SOUND.replace("(w, ws, wz)", "(w, ws)").replace("(xd_q, s, z)", "(xd_q, s)"),
        {"c_w", "xd"},
    ),
    "type as attribute": (
        SOUND.replace("QuantizeLinear(x, s, z)", "QuantizeLinear<output_dtype=3>(x, s)")
        .replace("(xd_q, s, z)", "(xd_q, s)")
        .replace('"": 19', '"": 21'),
        {"xd"},
    ),
    "behind a copy": (
        SOUND.replace("DequantizeLinear(xd_q, s, z)", "DequantizeLinear(moved, s)").replace(
            "    [xd] xd", "    moved = Identity(xd_q)\n    [xd] xd"
        ),
        {"xd"},
    ),
}


@pytest.fixture
def build(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from qdq.build import build_engine

    def call(text):
        path = tmp_path / "model.onnx"
        ir.save(load(text), path)
        return build_engine(path, tmp_path / "engine", backend="rtx")

    return call


@pytest.mark.parametrize(
    "text", [SOUND, PRODUCT, RESIDUAL, MAXPOOL, AVGPOOL, SOUND_TWINS["transposed weight"]]
)
def test_sound_graphs_run_in_int8(build, text):
    layers = build(text).layers
    assert layers
    assert all(layer.int8 for layer in layers)


@pytest.mark.parametrize("case", sorted(FLOAT))
def test_runs_in_float(build, case):
    assert not any(layer.int8 for layer in build(BROKEN[case][0]).layers)


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_is_refused(build, case):
    from qdq.errors import BuildError

    with pytest.raises(BuildError):
        build(BROKEN[case][0])


def test_109_crashes_the_builder(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from qdq.errors import BuildError
    from qdq.trt.backend import find_backend
    from qdq.trt.builder import build_plan

    ir.save(load(BROKEN["QDQ109"][0]), tmp_path / "m.onnx")
    shapes = {"x": dict.fromkeys(("min", "opt", "max"), (1, 16, 4, 4))}
    with pytest.raises(BuildError, match=r"TensorRT crashed .*SIGSEGV"):
        build_plan(find_backend("rtx"), tmp_path / "m.onnx", shapes, 89)


@pytest.mark.parametrize("case", NO_ZERO_POINT)
def test_without_zero_points_linter_coverage_and_engine_say_the_same(tmp_path, build, case):
    """int8 codes say that the zero point is 0; `--fix` writes it down and the engine stays as it is."""
    text, missing = NO_ZERO_POINT[case]
    report = build(text)
    assert [layer.int8 for layer in report.layers] == [True]
    assert [layer.int8 for layer in report.coverage.layers] == [True]
    path = tmp_path / "model.onnx"
    findings = {(f.node, f.severity) for f in check_onnx(path).findings if f.rule == "QDQ102"}
    assert findings == {(node, "info") for node in missing}
    assert fix_onnx(path, tmp_path / "fixed.onnx") == {"QDQ102": len(missing)}
    fixed = check_onnx(tmp_path / "fixed.onnx")
    assert "QDQ102" not in {finding.rule for finding in fixed.findings}
    assert [layer.int8 for layer in fixed.coverage.layers] == [True]
