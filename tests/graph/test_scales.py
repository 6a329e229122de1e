"""Scales of activations are found by the names that the export gives them, and can be changed."""

import numpy as np
import pytest
from graph_text import read

from qdq.graph.scales import list_scales, number_of, reason_against, set_scale


@pytest.fixture
def graph():
    """An activation with a scale in float and its copy in half (0x2e66 is 0.1), and a weight."""
    model = read("""
    g (float[2,2] x) => (y)
    <float s = {0.1}, float16 h = {11878}, float t = {0.2}, float[2,2] w = {1, 2, 3, 4}, int8 o = {0}>
    {
        q = QuantizeLinear (x, s, o)
        d = DequantizeLinear (q, h, o)
        p = QuantizeLinear (w, t, o)
        e = DequantizeLinear (p, t, o)
        f = Cast <to = 10> (e)
        y = MatMul (d, f)
    }
    """)
    names = {"s": "fc.input.scale", "h": "fc.input.scale.fp16", "t": "fc.weight.scale"}
    for value in list(model.graph.initializers.values()):
        value.name = names.get(value.name, value.name)
    return model.graph


def test_only_activations_are_listed(graph):
    scales = list_scales(graph)
    assert list(scales) == ["fc.input"]
    assert [value.name for value in scales["fc.input"]] == ["fc.input.scale", "fc.input.scale.fp16"]


def test_each_is_set_in_its_type(graph):
    values = list_scales(graph)["fc.input"]
    scale = np.array(0.3, np.float32)
    assert set_scale(values, scale)
    assert [number_of(value) for value in values] == [np.float32(0.3), np.float16(0.3)]
    assert not set_scale(values, scale)


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (0.3, ""),
        (1e6, "its scale 1e+06 does not fit float16, the type in the file"),
        (0.0, "its scale 0 does not fit float32, the type in the file"),
    ],
)
def test_a_scale_must_fit_each_type(graph, scale, reason):
    values = list_scales(graph)["fc.input"]
    assert reason_against(values, np.array(scale, np.float32)) == reason
