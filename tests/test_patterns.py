"""Patterns, against a table of names written by hand."""

import pytest
from torch import nn

from qdq import ArgumentError, ArgumentTypeError
from qdq.patterns import Patterns

CONV = nn.Conv2d(1, 1, 1)

# pattern, dotted name, does it match
NAMES = [
    ("layer1", "layer1", True),
    ("layer1", "layer1.0.conv", True),
    ("layer1", "layer10", False),
    ("layer1", "net.layer1", False),
    ("conv", "layer1.conv", False),
    ("layer1.*", "layer1.0", True),
    ("layer1.*", "layer1", False),
    ("*.conv", "layer1.0.conv", True),
    ("*.conv", "layer1.0.conv.parametrizations.weight", True),
    ("*.conv?", "layer1.0.conv2", True),
    ("layer[12].*", "layer3.0", False),
    ("Layer1", "layer1", False),
    ("re:layer[12]", "layer2.0.conv", True),
    ("re:layer[12]", "layer12", False),
    ("re:.*conv\\d", "layer1.conv2", True),
    ("re:conv", "layer1.conv", False),
    ("", "", True),
    ("*", "", True),
    ("*", "layer1.0", True),
]


@pytest.mark.parametrize(("pattern", "name", "is_match"), NAMES)
def test_a_name(pattern, name, is_match):
    assert Patterns([pattern], "include").match([name], CONV) == (repr(pattern) if is_match else "")


def test_any_name_of_a_module_counts():
    assert Patterns(["head"], "include").match(["stem", "head"], CONV) == "'head'"


def test_a_class_matches_its_subclasses():
    class Padded(nn.Conv2d):
        pass

    patterns = Patterns(nn.Conv2d, "include")
    assert patterns.match(["a"], Padded(1, 1, 1)) == "Conv2d"
    assert patterns.match(["a"], nn.Linear(1, 1)) == ""


def test_a_callable_sees_name_and_module():
    def is_pointwise(name, module):
        return name.startswith("layer") and module.kernel_size == (1, 1)

    patterns = Patterns([is_pointwise], "include")
    assert patterns.match(["layer1"], CONV) == "is_pointwise"
    assert patterns.match(["stem"], CONV) == ""
    assert patterns.match(["layer1"], nn.Conv2d(1, 1, 3)) == ""


def test_the_first_match_is_described_and_every_match_is_used(caplog):
    patterns = Patterns(["*", "layer1", "layer2"], "exclude")
    assert patterns.match(["layer1"], CONV) == "'*'"
    patterns.warn_unused("module")
    assert [record.message for record in caplog.records] == [
        "exclude pattern 'layer2' matches no module"
    ]


@pytest.mark.parametrize("pattern", ["layer1", nn.Conv2d])
def test_one_pattern_needs_no_list(pattern):
    assert Patterns(pattern, "include").match(["layer1"], CONV)


def test_no_pattern_matches_nothing(caplog):
    patterns = Patterns((), "include")
    assert patterns.match(["layer1"], CONV) == ""
    patterns.warn_unused("module")
    assert not caplog.records


@pytest.mark.parametrize("pattern", [3, [None], [["layer1"]]])
def test_a_pattern_of_another_kind(pattern):
    with pytest.raises(ArgumentTypeError, match=r"is of type .*module class"):
        Patterns(pattern, "include")


def test_a_broken_regular_expression():
    with pytest.raises(ArgumentError, match=r"'re:\(' is not a regular expression.*for a glob"):
        Patterns(["re:("], "include")
