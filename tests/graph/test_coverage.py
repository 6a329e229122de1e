"""Predicted precision and MACs; the truth for MACs is torch's own flop counter."""

from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch
from graph_text import read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qdq.graph.coverage import compare_coverage, measure_coverage

GRAPH = """
g (float[N,4,8,8] x) => (y)
<float s = {0.1}, float[1] t = {0.1}, int8 o = {0}, int8 p = {3}, float[4] v = {1, 1, 1, 1},
 int8[4] zeros = {0, 0, 0, 0},
 int8[4,4,1,1] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
 float[4,4,1,1] f = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
{
    q = QuantizeLinear (x, %s)
    d = DequantizeLinear (q, %s)
    e = DequantizeLinear <axis = %s> (w, v, zeros)
    y = %s
}
"""


def coverage_of(activation="s, o", axis=0, node="Conv (d, e)"):
    (layer,) = measure_coverage(read(GRAPH % (activation, activation, axis, node))).layers
    return layer


def test_int8():
    layer = coverage_of()
    assert layer.int8
    assert layer.reason == ""
    assert layer.macs == 4 * 4 * 8 * 8  # one sample
    assert layer.share == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"node": "Conv (x, f)"}, "no Q/DQ on its inputs"),
        ({"node": "Conv (x, e)"}, "Q/DQ on its weight only (R-CONV-2)"),
        ({"node": "Conv (d, f)"}, "Q/DQ on its input only (R-CONV-2)"),
        ({"node": "ConvTranspose (d, e)", "axis": 1}, "(R-CT-3)"),
        ({"activation": "s, p"}, "(R-SYM)"),
        ({"activation": "t, o"}, "(R-SHAPE)"),
        ({"activation": "v, zeros"}, "its input has 4 scales (R-ACT-PC)"),
        ({"axis": 1}, "not along its output channels (R-AXIS)"),
    ],
)
def test_why_not(options, reason):
    layer = coverage_of(**options)
    assert not layer.int8
    assert layer.reason.endswith(reason)
    assert layer.macs == 4 * 4 * 8 * 8


def test_the_graph_stays_as_it_is():
    model = read(GRAPH % ("s, o", "s, o", 0, "Conv (d, e)"))
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    measure_coverage(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == content


def test_unknown_sizes_are_said_to_be_unknown():
    model = read("g (float[N,L,8] x, float[8,4] w) => (y) { y = MatMul (x, w) }")
    coverage = measure_coverage(model)
    assert coverage.layers[0].macs is None
    assert coverage.int8_share is None
    assert "1 of unknown work" in coverage.format_table()


def test_table():
    model = read("""
    g (float[N,8] x, float[8,30] w, float[8,10] v) => (y, z)
    <float s = {0.1}, int8 o = {0}>
    {
        a = QuantizeLinear (x, s, o)
        b = DequantizeLinear (a, s, o)
        c = QuantizeLinear (w, s, o)
        d = DequantizeLinear (c, s, o)
        y = MatMul (b, d)
        z = MatMul (b, v)
    }
    """)
    for node in model.graph:
        node.name = f"layer.{node.outputs[0].name}/{node.op_type}"
    coverage = measure_coverage(model)
    assert coverage.macs == 320
    assert coverage.int8_share == 0.75
    assert coverage.format_table().splitlines() == [
        "int8 expected: 1 of 2 nodes that multiply, 75.0 % of all 0.0 million MACs",
        "   25.0 %  1 MatMul (layer.z): Q/DQ on its input only (R-CONV-2)",
    ]


def test_against_the_engine():
    model = read(
        "g (float[2,8] x, float[8,8] w) => (d)"
        "{ a = MatMul (x, w) b = MatMul (a, w) c = MatMul (b, w) d = MatMul (c, w) }"
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    coverage = measure_coverage(model)
    expected = [SimpleNamespace(**vars(layer)) for layer in coverage.layers]
    for layer, type_name in zip(expected, ("Int8", "FP8", "Float", "Float"), strict=True):
        layer.expected = type_name
    built = [
        SimpleNamespace(node=name, built=type_name)
        for name, type_name in [("a", "Int8"), ("b", "Int8"), ("c", "FP8"), ("e", "Int8")]
    ]
    difference = compare_coverage(SimpleNamespace(layers=expected), built)
    assert difference.missing == ("b",)
    assert difference.extra == ("c",)
    assert difference.unknown == ("d", "e")


class Transformer(nn.Module):
    """Patches, one encoder layer written out, a classifier: the kinds of products of a vision transformer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.qkv, self.project = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.project((weights @ v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm(x))).mean(1))


class Upsampler(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, groups=1),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
            nn.Conv1d(1, 1, 1),
        )

    def forward(self, x):
        return self[1](self[0](x))


@pytest.mark.parametrize(
    ("kind", "dynamic"),
    [
        ("resnet18", True),
        ("mobilenet_v2", False),
        (Transformer, True),
        (Transformer, False),
        (Upsampler, True),
    ],
)
def test_macs_are_those_that_torch_counts(kind, dynamic):
    torchvision = pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    network = getattr(torchvision.models, kind) if isinstance(kind, str) else kind
    model = network().eval()
    x = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    shapes = ({0: "batch"},) if dynamic else None
    batch = torch.cat([x, x]) if dynamic else x
    program = torch.onnx.export(
        model, (batch,), dynamo=True, dynamic_shapes=shapes, opset_version=18, verbose=False
    )
    coverage = measure_coverage(program.model)
    assert all(layer.macs for layer in coverage.layers)
    assert 2 * coverage.macs == counter.get_total_flops()
