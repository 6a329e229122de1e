import shlex
from pathlib import Path

import pytest

from qdq.errors import ArgumentError
from qdq.trt.profiles import choose_profiles, parse_shapes
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


def test_parse_shapes():
    assert parse_shapes("x:1x3x224x224, input:0:2x5") == {"x": (1, 3, 224, 224), "input:0": (2, 5)}
    assert parse_shapes("x:7") == {"x": (7,)}


@pytest.mark.parametrize(
    "text", ["", "x", "x:", ":1x2", "1x3x224x224", "x:1x-3", "x:0x3", "x:1,5", "x:1xa", "x:1*3"]
)
def test_parse_shapes_teaches_its_syntax(text):
    with pytest.raises(ArgumentError, match="INPUT:DIMxDIM") as caught:
        parse_shapes(text)
    assert "x:1x3x224x224" in caught.value.fix


def test_parse_shapes_refuses_an_input_twice():
    with pytest.raises(ArgumentError, match="two shapes"):
        parse_shapes("x:1x3,x:2x3")


def _solve(inputs, **requests):
    return choose_profiles(inputs, {"min": {}, "opt": {}, "max": {}, **requests})


def test_default_profile_is_for_the_batch_alone():
    assert _solve({"x": (None, 3), "s": (4, 4)}) == {
        "x": {"min": (1, 3), "opt": (8, 3), "max": (16, 3)}
    }


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ({"opt": 5}, (5, 5, 5)),
        ({"max": 5}, (5, 5, 5)),
        ({"min": 5}, (5, 5, 5)),
        ({"min": 2, "max": 5}, (2, 5, 5)),
        ({"min": 2, "opt": 3}, (2, 3, 3)),
        ({"min": 2, "opt": 3, "max": 5}, (2, 3, 5)),
    ],
)
def test_missing_shapes_follow_the_given(requests, expected):
    profile = _solve(
        {"x": (None, 3)}, **{kind: {"x": (size, 3)} for kind, size in requests.items()}
    )["x"]
    assert tuple(profile[kind][0] for kind in ("min", "opt", "max")) == expected


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ({}, r"input x of shape \?x3x\?x8 .*no shapes \(L26\)"),
        ({"opt": {"y": (1, 3, 8, 8)}}, "--opt-shapes names y"),
        ({"opt": {"x": (1, 3, 8)}}, "does not fit input x"),
        ({"max": {"x": (1, 4, 8, 8)}}, "--max-shapes x:1x4x8x8 does not fit"),
        ({"min": {"x": (0, 3, 8, 8)}}, "does not fit"),
        ({"min": {"x": (4, 3, 8, 8)}, "max": {"x": (2, 3, 8, 8)}}, "not in order"),
        ({"min": {"x": (1, 3, 9, 8)}, "opt": {"x": (2, 3, 8, 8)}}, "not in order"),
    ],
)
def test_shapes_that_cannot_be_meant(requests, message):
    with pytest.raises(ArgumentError, match=message):
        _solve({"x": (None, 3, None, 8)}, **requests)


def test_a_static_input_may_be_given_its_own_shape_only():
    assert _solve({"x": (1, 3)}, opt={"x": (1, 3)}) == {}
    with pytest.raises(ArgumentError, match="does not fit input x of shape 1x3"):
        _solve({"x": (1, 3)}, opt={"x": (2, 3)})
