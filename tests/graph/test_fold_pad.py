import numpy as np
import pytest
from graph_text import apply, compute, ops, read

from qdq.graph.fold_pad import FoldPad
from qdq.graph.move_quantize import MoveQuantizeBeforeCopies

GRAPH = """
g (float[2,3,9,9] x) => (y)
<float[4,3,3,3] w = {%s}, float[4] b = {1, 2, 3, 4}, int64[8] p = {%s}, float v = {%s}, int64[2] axes = {-1, 2},
 int64[4] few = {1, 2, 0, 3}, float s = {0.1}, int8 o = {0}>
{
    a = Neg (x)
    %s
    c = Conv <kernel_shape = [3, 3] %s> (%s, w, b)
    y = Neg (c)
}
"""
WEIGHTS = ", ".join(f"{number:.4f}" for number in np.random.default_rng(0).normal(size=108))


def pad_conv(pad="d = Pad (a, p)", pads="0, 0, 1, 2, 0, 0, 0, 3", value="0", conv="", reads="d"):
    return read(GRAPH % (WEIGHTS, pads, value, pad, conv, reads))


def pads_of(model):
    return list(next(n for n in model.graph if n.op_type == "Conv").attributes.get_ints("pads", ()))


@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ({}, [1, 2, 0, 3]),
        ({"conv": ", pads = [1, 1, 1, 1], strides = [2, 2]"}, [2, 3, 1, 4]),
        ({"conv": ', auto_pad = "VALID"'}, [1, 2, 0, 3]),
        ({"pad": "d = Pad (a, p, v)"}, [1, 2, 0, 3]),
        ({"pad": "d = Pad (a, few, v, axes)"}, [2, 1, 3, 0]),
        ({"pad": "e = Pad (a, p) d = Pad (e, p)"}, [2, 4, 0, 6]),
    ],
)
def test_padding_goes_into_the_convolution(options, pads):
    model = apply(pad_conv(**options), FoldPad())
    assert ops(model) == ["Neg", "Conv", "Neg"]
    assert pads_of(model) == pads


@pytest.mark.parametrize(
    "options",
    [
        {"pad": 'd = Pad <mode = "reflect"> (a, p)'},
        {"pad": "d = Pad (a, p, v)", "value": "1"},
        {"pads": "0, 0, -1, 0, 0, 0, 0, 0"},  # cuts
        {"pads": "1, 0, 0, 0, 0, 0, 0, 0"},  # adds to the batch
        {"conv": ', auto_pad = "SAME_UPPER"'},
    ],
)
def test_what_is_not_zero_padding_of_the_image_stays(options):
    assert "Pad" in ops(apply(pad_conv(**options), FoldPad()))


def test_a_pair_between_the_two():
    pair = "e = Pad (a, p) q = QuantizeLinear (e, s, o) d = DequantizeLinear (q, s, o)"
    model = apply(pad_conv(pair), MoveQuantizeBeforeCopies(), FoldPad())
    assert ops(model) == ["Neg", "QuantizeLinear", "DequantizeLinear", "Conv", "Neg"]


def test_other_readers_keep_the_pad():
    model = pad_conv("d = Pad (a, p) e = Sin (d)")
    model.graph.outputs.append(next(n for n in model.graph if n.op_type == "Sin").outputs[0])
    outputs = compute(model)
    apply(model, FoldPad())
    assert ops(model) == ["Neg", "Pad", "Sin", "Conv", "Neg"]
    assert outputs.keys() == compute(model).keys()
