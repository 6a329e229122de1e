import json
import shlex
from pathlib import Path

import pytest

from qdq.errors import ArgumentError
from qdq.trt.trtexec import Pair, build_flags, reference_flags, run_flags, trtexec_lines

FACTS = json.loads((Path(__file__).parents[1] / "data/trtexec_flags.json").read_text())
PROFILES = {
    "x": {"min": (1, 3, 8, 8), "opt": (8, 3, 8, 8), "max": (16, 3, 8, 8)},
    "m": {"min": (1, 7), "opt": (8, 7), "max": (16, 7)},
}
# `--int8`, `--fp16` ... were removed from trtexec 11, the benchmark flags became its defaults
GONE_IN_11 = {"--int8", "--fp16", "--bf16", "--fp8", "--best", "--stronglyTyped"}
PAIRS = [
    Pair({"x:0": Path(f"inputs/{number}.bin")}, {"y": Path(f"refs/{number}.bin")}, {"x:0": (1, 3)})
    for number in range(2)
]


def _flags(command):
    return shlex.split(command)


def _is_taken(flag, version):
    versions = FACTS["flags"].get(flag.partition("=")[0], [])
    return versions == "all" or version in versions


def test_flags_of_each_version():
    lines = trtexec_lines(Path("m.onnx"), Path("m.plan"), {})
    eight, ten, eleven = (_flags(lines[f"tensorrt{version}"]) for version in ("8.6", "10", "11"))
    parity = {"--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun"}
    assert eight == ten
    assert set(ten) - set(eleven) == {"--int8", "--fp16"} | parity
    assert not GONE_IN_11 & set(eleven)
    assert ten[0] == eleven[0] == "trtexec"
    assert {"--onnx=m.onnx", "--saveEngine=m.plan", "--timingCacheFile=m.timing.cache"} <= set(
        eleven
    )
    assert {"--profilingVerbosity=detailed", "--exportLayerInfo=m.layers.json"} <= set(eleven)
    assert not any("Shapes" in flag for flag in eleven)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("version", FACTS["versions"])
def test_every_version_takes_all_flags_of_its_lines(version, half):
    number = tuple(map(int, version.split(".")))
    engine = Path("m.plan")
    flags = run_flags(engine, PAIRS[0], Path("o.json"), number)
    if number >= (10, 0) or not half:
        flags += build_flags(Path("m.onnx"), engine, PROFILES, number, half=half)
    if number >= (11, 1):
        flags += reference_flags(engine, PAIRS, "y", 0.5, number)
    assert [flag for flag in flags if not _is_taken(flag, version)] == []


def test_a_float16_graph_is_strongly_typed_in_10():
    lines = trtexec_lines(Path("m.onnx"), Path("m.plan"), {}, half=True)
    assert list(lines) == ["tensorrt10", "tensorrt11"]
    assert "--stronglyTyped" in _flags(lines["tensorrt10"])
    assert "--int8" not in _flags(lines["tensorrt10"])
    assert not GONE_IN_11 & set(_flags(lines["tensorrt11"]))
    with pytest.raises(ArgumentError, match=r"8\.6 has no float16 scales"):
        build_flags(Path("m.onnx"), Path("m.plan"), {}, (8, 6), half=True)


def test_no_line_for_an_opset_that_8_6_cannot_read():
    assert "tensorrt8.6" in trtexec_lines(Path("m.onnx"), Path("m.plan"), {}, opset=17)
    assert "tensorrt8.6" not in trtexec_lines(Path("m.onnx"), Path("m.plan"), {}, opset=18)


def test_shapes_of_dynamic_inputs():
    for command in trtexec_lines(Path("m.onnx"), Path("m.plan"), PROFILES).values():
        flags = _flags(command)
        assert "--minShapes=x:1x3x8x8,m:1x7" in flags
        assert "--optShapes=x:8x3x8x8,m:8x7" in flags
        assert "--maxShapes=x:16x3x8x8,m:16x7" in flags


def test_references_in_pairs():
    flags = reference_flags(Path("m.plan"), PAIRS, "y", 0.25, (11, 1))
    first = flags.index("--refPair=0")
    assert flags[first : first + 3] == [
        "--refPair=0",
        "--loadInputs='x:0':inputs/0.bin",
        "--loadRefOutputs=y:refs/0.bin",
    ]
    assert "--accuracyThreshold=2.500000e-01" in flags
    # trtexec refuses --refPair for a single pair
    assert not any(
        "refPair" in flag for flag in reference_flags(Path("m"), PAIRS[:1], "y", 1, (11, 1))
    )


def test_a_shell_reads_paths_back_unchanged():
    onnx, engine = Path("my models/it's $HOME.onnx"), Path("my models/e;rm.plan")
    for command in trtexec_lines(onnx, engine, {}).values():
        assert _flags(command)[1:3] == [f"--onnx={onnx}", f"--saveEngine={engine}"]
