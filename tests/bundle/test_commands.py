import json
import re
import shlex
from pathlib import Path

import pytest

from qdq.bundle.commands import BundleFacts, write_commands
from qdq.trt.trtexec import Pair

FACTS = json.loads((Path(__file__).parents[1] / "data" / "trtexec_flags.json").read_text())
OLDEST = {"8.6": (8, 6), "10": (10, 0), "11.0": (11, 0), "11.1": (11, 1)}


def make_facts(opsets, lengths=(4, 4), **changes):
    pairs = []
    for number, length in enumerate(lengths):
        inputs = {"x:0": Path(f"inputs/{number}.bin")}
        pairs.append(Pair(inputs, {"y": Path(f"refs/{number}.bin")}, {"x:0": (1, length)}))
    profile = {"min": (1, min(lengths)), "opt": (1, max(lengths)), "max": (1, max(lengths))}
    facts = {"profiles": {"x:0": profile}, "most_l2": {"y": 0.5}, "has_long_inputs": False}
    facts |= {"output_types": {"y": "float32"}}
    return BundleFacts(**{"opsets": opsets, "pairs": pairs, **facts, **changes})


def read_steps(text):
    """(release, step) -> flags."""
    steps = {}
    line = r"^ +'(\S+ \S+)'\) \"\$trtexec\" (.*) ;;$"
    for name, command in re.findall(line, text, re.MULTILINE):
        release, step = name.split()
        steps[release, step] = shlex.split(command)
    return steps


@pytest.mark.parametrize("version", FACTS["versions"])
@pytest.mark.parametrize(
    "opsets", [{"model.onnx": 17, "float.onnx": 17, "model.fp16.onnx": 19}, {"model.fp16.onnx": 19}]
)
def test_each_version_takes_all_flags_of_its_release(version, opsets):
    number = tuple(map(int, version.split(".")))
    release = max((name for name in OLDEST if OLDEST[name] <= number), key=OLDEST.__getitem__)
    for (name, _), flags in read_steps(write_commands(make_facts(opsets))).items():
        if name != release:
            continue
        for flag in flags:
            versions = FACTS["flags"].get(flag.partition("=")[0], [])
            assert versions == "all" or version in versions, flag


def test_the_file_and_the_types_for_each_release():
    opsets = {"model.onnx": 17, "model.fp16.onnx": 19, "float.onnx": 17, "float.fp16.onnx": 19}
    steps = read_steps(write_commands(make_facts(opsets)))
    files = {name: flags[0] for name, flags in steps.items() if name[1] in ("int8", "float")}
    assert files == {
        **dict.fromkeys([("8.6", "int8"), ("10", "int8")], "--onnx=model.onnx"),
        **dict.fromkeys([("8.6", "float"), ("10", "float")], "--onnx=float.onnx"),
        **dict.fromkeys([("11.0", "int8"), ("11.1", "int8")], "--onnx=model.fp16.onnx"),
        **dict.fromkeys([("11.0", "float"), ("11.1", "float")], "--onnx=float.fp16.onnx"),
    }
    assert {"--int8", "--fp16"} <= set(steps["10", "int8"])
    half = read_steps(write_commands(make_facts({"model.fp16.onnx": 19})))
    assert "--stronglyTyped" in half["10", "int8"]
    assert not {"--int8", "--stronglyTyped"} & set(half["11.0", "int8"])


def test_pairs_of_different_shapes_are_checked_apart():
    steps = read_steps(write_commands(make_facts({"model.onnx": 17}, lengths=(4, 7, 4))))
    groups = [flags for (_, step), flags in steps.items() if step.startswith("references.")]
    assert [sum("refPair" in flag for flag in flags) for flags in groups] == [2, 0]
    assert "--shapes='x:0':1x7" in groups[1]
    assert "--minShapes='x:0':1x4" in steps["10", "int8"]
    assert "--maxShapes='x:0':1x7" in steps["10", "int8"]
    assert {release for release, step in steps if step.startswith("references.")} == {"11.1"}


@pytest.mark.parametrize(("output_type", "count"), [("int32", 1), ("int64", 0), ("bool", 0)])
def test_trtexec_compares_outputs_of_some_types(output_type, count):
    facts = make_facts({"model.onnx": 17}, output_types={"y": output_type})
    steps = read_steps(write_commands(facts))
    assert sum(step.startswith("references.") for _, step in steps) == count


@pytest.mark.parametrize("opsets", [{"model.onnx": 19, "model.fp16.onnx": 19}, {"model.onnx": 19}])
def test_the_types_of_the_file_decide_about_fp8(opsets):
    """`--int8 --fp16` allow no FP8, so TensorRT 10 builds a strongly typed network; TensorRT 11 builds no other."""
    text = write_commands(make_facts(opsets, types=("Int8", "FP8"), least_sm=89))
    assert "\nengine=int8-FP8\nleast_sm=89\n" in text
    steps = read_steps(text)
    for release in ("10", "11.0", "11.1"):
        flags = steps[release, "int8-FP8"]
        assert flags[0] == f"--onnx={list(opsets)[-1]}"
        assert flags[1] == "--saveEngine=results/int8-FP8.plan"
        assert ("--stronglyTyped" in flags) == (release == "10")
        assert not {"--int8", "--fp16"} & set(flags)
        assert steps[release, "outputs.0"][0] == "--loadEngine=results/int8-FP8.plan"


@pytest.mark.parametrize(
    ("opsets", "changes", "reason"),
    [
        ({"model.onnx": 19}, {"types": ("FP8",)}, "TensorRT before 10 has no FP8"),
        ({"model.fp16.onnx": 19}, {}, "has no float16 scales"),
        ({"model.onnx": 18}, {}, "up to opset 17, and model.onnx has opset 18"),
        ({"model.onnx": 17}, {"has_long_inputs": True}, "takes int64 inputs as int32"),
    ],
)
def test_why_8_6_cannot_build(opsets, changes, reason):
    text = write_commands(make_facts(opsets, **changes))
    assert reason in text
    assert {release for release, _ in read_steps(text)} == {"10", "11.0", "11.1"}
