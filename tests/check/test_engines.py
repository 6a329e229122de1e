"""What the rules call an error or float, asked of TensorRT-RTX: it refuses the file, or the census shows float."""

import subprocess
import sys

import onnx_ir as ir
import pytest
from small_graphs import AVGPOOL, MAXPOOL, PRODUCT, RESIDUAL, SOUND, load
from test_rules import BROKEN, SOUND_TWINS

pytestmark = pytest.mark.trt

FLOAT = {
    "QDQ103", "QDQ104", "QDQ105 other axis", "QDQ105 other axis of a matrix", "QDQ110 only the weight",
    "QDQ105 not written", "QDQ110 only the input", "QDQ117 transposed",
}  # fmt: skip
REFUSED = {
    "QDQ101 zero", "QDQ101 negative", "QDQ102 not zero", "QDQ107 weight", "QDQ107 bias", "QDQ108 bias",
    "QDQ108 operator", "QDQ105 other length", "QDQ129",
}  # fmt: skip


@pytest.fixture
def build(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from qdq.build import build_engine

    def call(text):
        path = tmp_path / "model.onnx"
        ir.save(load(text), path)
        return build_engine(path, tmp_path / "engine", backend="rtx")

    return call


@pytest.mark.parametrize("text", [SOUND, PRODUCT, RESIDUAL, MAXPOOL, AVGPOOL, SOUND_TWINS["transposed weight"]])
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
    ir.save(load(BROKEN["QDQ109"][0]), tmp_path / "m.onnx")
    script = "import sys, qdq.build; qdq.build.build_engine(sys.argv[1], sys.argv[2], backend='rtx')"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "m.onnx", tmp_path / "e"], capture_output=True)
    assert done.returncode != 0
