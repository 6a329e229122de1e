"""Optimization profiles: their syntax, their defaults, and the requests that are refused."""

import pytest

from qdq.errors import ArgumentError
from qdq.trt.profiles import choose_profiles, parse_shapes


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


def _choose(inputs, **requests):
    return choose_profiles(inputs, {"min": {}, "opt": {}, "max": {}, **requests})


def test_default_profile_is_for_the_batch_alone():
    assert _choose({"x": (None, 3), "s": (4, 4)}) == {
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
def test_missing_shapes_follow_the_requested_ones(requests, expected):
    profile = _choose(
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
def test_invalid_shapes_are_refused(requests, message):
    with pytest.raises(ArgumentError, match=message):
        _choose({"x": (None, 3, None, 8)}, **requests)


def test_a_static_input_takes_its_shape_only():
    assert _choose({"x": (1, 3)}, opt={"x": (1, 3)}) == {}
    with pytest.raises(ArgumentError, match="does not fit input x of shape 1x3"):
        _choose({"x": (1, 3)}, opt={"x": (2, 3)})
