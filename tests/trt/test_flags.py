import json
import re
from pathlib import Path

import pytest

from qdq.trt.flags import FLAGS, STRONG_TYPES, select_flags, takes_flag

ROOT = Path(__file__).parents[2]
FACTS = json.loads((ROOT / "tests/data/trtexec_flags.json").read_text())


def versions_with(flag):
    """The versions of the facts that take a flag."""
    versions = FACTS["flags"].get(flag, [])
    return FACTS["versions"] if versions == "all" else versions


@pytest.mark.parametrize("version", FACTS["versions"])
def test_the_table_agrees_with_the_lists_of_trtexec(version):
    number = tuple(map(int, version.split(".")))
    wrong = []
    for flag in FLAGS:
        if takes_flag(flag, number) != (version in versions_with(flag)):
            wrong.append(flag)
    assert wrong == []


def test_idle_flags_are_left_out():
    flags = ["--int8", "--useCudaGraph", "--warmUp=5", "--includeDataTransfers"]
    assert select_flags(flags, (10, 3)) == ["--int8", "--useCudaGraph", "--warmUp=5"]
    assert select_flags(flags, STRONG_TYPES) == ["--warmUp=5", "--includeDataTransfers"]


def test_a_flag_that_is_not_in_the_table_is_an_error():
    with pytest.raises(KeyError, match="--workspace"):
        select_flags(["--workspace=4096"], (8, 6))


@pytest.mark.parametrize("page", ["build.md"])
def test_the_lines_of_the_docs_use_flags_of_the_table(page):
    text = (ROOT / "docs" / page).read_text()
    lines = re.findall(r"^trtexec .*(?:\\\n.*)*", text, re.MULTILINE)
    flags = {flag for line in lines for flag in re.findall(r"--\w+", line)}
    assert lines
    assert flags <= FLAGS.keys()
