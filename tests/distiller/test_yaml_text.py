"""YAML is written in order, without aliases, and read back equal."""

import pytest
import yaml

from qdq.distiller.files.yaml_text import write_yaml
from qdq.schema import parse_yaml


@pytest.mark.parametrize("flow", [False, True])
def test_what_is_written_is_read(flow):
    shared = {"min": -1e-05, "max": 0.1, "text": "(2, 3)", "none": None, "flag": True}
    content = {"b": shared, "a": [shared, 1, "1", "yes", "é"]}
    text = write_yaml(content, flow=flow)
    assert yaml.safe_load(text) == content
    assert parse_yaml(text, "the text", "mend it") == content  # without aliases
    assert text.index("b:") < text.index("a:")


def test_flow_puts_the_innermost_values_on_one_line():
    assert write_yaml({"a": {"b": [1, 2]}, "c": 3}, flow=True) == "a:\n  b: [1, 2]\nc: 3\n"
    assert write_yaml({"a": {"b": [1, 2]}}) == "a:\n  b:\n  - 1\n  - 2\n"
