import shlex
from pathlib import Path

from qdq.trt.trtexec import trtexec_lines

PROFILES = {
    "x": {"min": (1, 3, 8, 8), "opt": (8, 3, 8, 8), "max": (16, 3, 8, 8)},
    "m": {"min": (1, 7), "opt": (8, 7), "max": (16, 7)},
}
# `--int8`, `--fp16` ... were removed from trtexec 11, the benchmark flags became its defaults
GONE_IN_11 = {"--int8", "--fp16", "--bf16", "--fp8", "--best", "--stronglyTyped"}


def _flags(command):
    return shlex.split(command)


def test_flags_of_each_version():
    lines = trtexec_lines(Path("m.onnx"), Path("m.plan"), {})
    ten, eleven = _flags(lines["tensorrt10"]), _flags(lines["tensorrt11"])
    parity = {"--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun"}
    assert set(ten) - set(eleven) == {"--int8", "--fp16"} | parity
    assert not GONE_IN_11 & set(eleven)
    assert ten[0] == eleven[0] == "trtexec"
    assert {"--onnx=m.onnx", "--saveEngine=m.plan", "--timingCacheFile=m.timing.cache"} <= set(
        eleven
    )
    assert {"--profilingVerbosity=detailed", "--exportLayerInfo=m.layers.json"} <= set(eleven)
    assert not any("Shapes" in flag for flag in eleven)


def test_a_float16_graph_is_strongly_typed_in_10():
    lines = trtexec_lines(Path("m.onnx"), Path("m.plan"), {}, half=True)
    assert "--stronglyTyped" in _flags(lines["tensorrt10"])
    assert "--int8" not in _flags(lines["tensorrt10"])
    assert not GONE_IN_11 & set(_flags(lines["tensorrt11"]))


def test_shapes_of_dynamic_inputs():
    for command in trtexec_lines(Path("m.onnx"), Path("m.plan"), PROFILES).values():
        flags = _flags(command)
        assert "--minShapes=x:1x3x8x8,m:1x7" in flags
        assert "--optShapes=x:8x3x8x8,m:8x7" in flags
        assert "--maxShapes=x:16x3x8x8,m:16x7" in flags


def test_a_shell_reads_paths_back_unchanged():
    onnx, engine = Path("my models/it's $HOME.onnx"), Path("my models/e;rm.plan")
    for command in trtexec_lines(onnx, engine, {}).values():
        assert _flags(command)[1:3] == [f"--onnx={onnx}", f"--saveEngine={engine}"]
