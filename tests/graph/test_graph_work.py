"""MACs of operators besides Conv, Gemm and MatMul. The truth: definitions written out as loops, and torch's counter."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graph_text import read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qdq.graph.coverage import list_work_nodes, measure_coverage
from qdq.graph.work import count_macs
from qdq.trt.census import take_census
from qdq.trt.kernels import Kernel


def layer_of(text, opset=19):
    (layer,) = measure_coverage(read(text, opset)).layers
    return layer


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_multiply_in_each_step(kind, gates):
    layer = layer_of(
        f"g (float[5,1,6] x, float[2,{gates * 8},6] w, float[2,{gates * 8},8] r) => (y)"
        f'{{ y = {kind} <hidden_size = 8, direction = "bidirectional"> (x, w, r) }}'
    )
    steps, directions = 5, 2
    assert layer.macs == steps * directions * gates * 8 * (6 + 8)
    assert not layer.int8
    assert "R-RNN" in layer.reason


def test_the_width_of_a_recurrent_input_is_that_of_the_weights():
    """torch's exporter joins the layers of an LSTM by a reshape to a computed shape."""
    layer = layer_of(
        "g (float[5,1,width] x, float[1,32,6] w, float[1,32,8] r) => (y)"
        "{ y = LSTM <hidden_size = 8> (x, w, r) }"
    )
    assert layer.macs == 5 * 4 * 8 * (6 + 8)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("bij,jk", [(2, 3, 4), (4, 5)]),
        ("...ij,jk->...ik", [(2, 2, 3, 4), (4, 5)]),
        ("ij,kl->", [(2, 3), (4, 5)]),
        ("i,j->ij", [(2,), (3,)]),
    ],
)
def test_einsum_multiplies_once_for_each_combination_of_labels(equation, shapes):
    operands = ", ".join(
        f"float[{','.join(map(str, shape))}] x{number}" for number, shape in enumerate(shapes)
    )
    layer = layer_of(f'g ({operands}) => (y) {{ y = Einsum <equation = "{equation}"> (x0, x1) }}')
    sizes = {}
    batch = 1
    for labels, shape in zip(equation.split("->")[0].split(","), shapes, strict=True):
        if labels.startswith("..."):
            labels = labels[3:]
            batch *= int(np.prod(shape[: len(shape) - len(labels)]))
        sizes.update(zip(labels, shape[len(shape) - len(labels) :], strict=True))
    combinations = itertools.product(*map(range, sizes.values()))
    assert layer.macs == batch * sum(1 for _ in combinations)


@pytest.mark.parametrize(
    ("equation", "axis", "int8"),
    [("btd,dh->bth", 1, True), ("btd,hd->bth", 0, True), ("btd,dh->bth", 0, False)],
)
def test_an_einsum_of_quantized_operands_is_int8_if_each_output_has_a_scale(equation, axis, int8):
    dequantized = f"c = DequantizeLinear <axis = {axis}> (w, v, z)"
    layer = layer_of(
        "g (float[N,3,2] x) => (y) <float s = {0.1}, int8 o = {0}, float[2] v = {1, 1}, int8[2] z = {0, 0},"
        " int8[2,2] w = {1, 2, 3, 4}> { a = QuantizeLinear (x, s, o) b = DequantizeLinear (a, s, o) "
        f'{dequantized} y = Einsum <equation = "{equation}"> (b, c) }}'
    )
    assert layer.int8 == int8
    assert int8 or "R-AXIS" in layer.reason


def test_a_transposition_by_einsum_is_no_work():
    model = read('g (float[2,3] x) => (y) { y = Einsum <equation = "ij->ji"> (x) }')
    assert measure_coverage(model).layers == ()


@pytest.mark.parametrize(
    ("node", "macs"),
    [
        ('Resize <mode = "linear"> (x, , , sizes)', 4 * 3 * 16 * 16),
        ('Resize <mode = "cubic"> (x, , , sizes)', 16 * 3 * 16 * 16),
        ('Resize <mode = "nearest"> (x, , , sizes)', None),
        ("GridSample (x, grid)", 4 * 3 * 5 * 6),
        ("DeformConv (x, w, offset)", 4 * 8 * 8 * 3 * 9),
        ("Attention <q_num_heads = 1, kv_num_heads = 1> (q, q, q)", 2 * 7 * 7 * 8),
    ],
)
def test_other_operators(node, macs):
    text = (
        "g (float[1,3,8,8] x, float[1,5,6,2] grid, float[4,3,3,3] w, float[1,18,8,8] offset, float[1,7,8] q)"
        " => (y) <int64[4] sizes = {1, 3, 16, 16}> { y = %s }"
    )
    if "DeformConv" in node:
        node = node.replace("DeformConv", "DeformConv <pads = [1, 1, 1, 1]>")
    coverage = measure_coverage(read(text % node, 23))
    if macs is None:
        assert coverage.layers == ()
        return
    (layer,) = coverage.layers
    assert layer.macs == macs
    assert not layer.int8


def test_a_fourier_transform_counts_the_products_of_its_butterflies():
    def count_products(n):  # of complex numbers, by recursion
        return 0 if n == 1 else 2 * count_products(n // 2) + n // 2

    layer = layer_of("g (float[3,64,2] x) => (y) { y = DFT <axis = 1> (x) }")
    assert layer.macs == 3 * 4 * count_products(64)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[2,8] x) => (y) { y = other.domain.Thing (x) }", "Thing is no operator of ONNX"),
        (
            "g (float[8,8] x, int64 n, bool b) => (y) { y = Loop (n, b, x) <body = body (int64 i, bool c, float[8,8] s)"
            " => (bool d, float[8,8] t) { d = Identity (c) t = MatMul (s, s) }> }",
            "its body multiplies, and how often it runs is not known",
        ),
        (
            "g (float[N,1,9,9] x, float[K,4] boxes, int64[K] i) => (y) { y = RoiAlign (x, boxes, i) }",
            "interpolation",
        ),
    ],
)
def test_unknown_work_is_listed_as_unknown(text, reason):
    header = '<ir_version: 8, opset_import: ["" : 18, "other.domain" : 1]>'
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    coverage = measure_coverage(model)
    (layer,) = coverage.layers
    assert layer.macs is None
    assert reason in layer.reason
    assert coverage.num_unknown == 1
    assert coverage.int8_share is None
    table = coverage.format_table()
    assert "1 of unknown work not counted" in table
    assert "  unknown  1 " in table


def test_a_body_without_products_is_no_work():
    model = read(
        "g (float[8] x, bool b) => (y) { y = If (b) <then_branch = t () => (float[8] u) { u = Relu (x) },"
        " else_branch = e () => (float[8] v) { v = Identity (x) }> }"
    )
    assert measure_coverage(model).layers == ()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.gru(x)[0])


def test_a_recurrent_net_is_not_all_int8():
    model = Recurrent().eval()
    x = torch.randn(1, 12, 16)
    program = torch.onnx.export(model, (x,), dynamo=True, opset_version=18, verbose=False)
    coverage = measure_coverage(program.model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(x)
    head = counter.get_total_flops() // 2
    assert coverage.macs == head + 12 * 3 * 16 * (16 + 16)


def test_the_census_holds_recurrent_layers():
    (node,) = list_work_nodes(
        read(
            "g (float[5,1,6] x, float[1,24,6] w, float[1,24,8] r) => (y) { y = GRU <hidden_size = 8> (x, w, r) }"
        )
    )
    kernel = Kernel("k", "gemm", ("Int8", "Int8"), (), ("Int8",), (node.name,))
    (layer,) = take_census([node], [kernel])
    assert not layer.int8
    assert not layer.expected_int8
    assert "R-RNN" in layer.reason


def test_the_work_of_a_node_with_an_attribute_of_a_function_is_unknown():
    product = "g (float[2,3] a, float[3,4] b) => (y) { y = Gemm <transA = 0> (a, b) }"
    (node,) = read(product).graph
    assert count_macs(node) == 2 * 3 * 4
    node.attributes["transA"] = ir.RefAttr("transA", "of_a_function", ir.AttributeType.INT)
    assert count_macs(node) is None
