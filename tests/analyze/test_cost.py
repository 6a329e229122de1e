"""What layers and calls cost: counted, and read from a profile."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq import (
    ArgumentError,
    DataError,
    analyze_layers,
    calibrate_model,
    enable_quantization,
    rewire_operations,
    swap_modules,
)
from qdq.analyze.cost import LayerCost, count_costs, estimate_times, load_times


class Calls(nn.Module):
    """Products by functions, in the model and in a part of it."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x):
        q = self.query(x)
        attention = torch.softmax(torch.matmul(q, q.transpose(1, 2)) / 6, -1)
        return F.linear(torch.matmul(attention, q), self.weight)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Calls()
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        y = self.part(x)
        return self.head(y + F.scaled_dot_product_attention(y, y, y))


B, T, D = 4, 16, 32


def test_a_layer_inside_another_is_counted_once():
    """All of an attention is FP8: its projections, the one at its end, and its two products."""
    x = torch.randn(B, T, D)
    model = nn.Sequential(nn.MultiheadAttention(D, 2, batch_first=True)).eval()
    model.forward = lambda x: model[0](x, x, x, need_weights=False)[0]
    swap_modules(model, x, formats=("fp8",))
    rewire_operations(model, x, formats=("fp8",))
    calibrate_model(model, [x], method="max")
    analysis = analyze_layers(model, [x], max_float_layers=1, max_float_share=1)
    assert {layer.name: layer.macs for layer in analysis.layers} == {
        "0": 3 * B * T * D * D,
        "0.out_proj": B * T * D * D,
        "0.scaled_dot_product_attention": 2 * B * T * T * D,
    }
    assert analysis.macs == 4 * B * T * D * D + 2 * B * T * T * D
    assert analysis.float_share == 0
    (step,) = analysis.steps
    (first,) = [layer for layer in analysis.layers if layer.name == step.layer]
    assert step.float_share == pytest.approx(first.macs / analysis.macs)


def test_calls_are_counted():
    costs = count_costs(Outer().eval(), torch.randn(B, T, D))
    expected = {
        "part.query": B * T * D * D,
        "part.matmul": B * T * T * D,
        "part.matmul_1": B * T * T * D,
        "part.linear": B * T * D * D,
        "scaled_dot_product_attention": 2 * B * T * T * D,
        "head": B * T * D * 16,
    }
    assert {name: costs[name].macs for name in expected} == expected
    assert costs[""].macs == sum(expected.values())
    assert costs["part"].macs == sum(
        value for name, value in expected.items() if name.startswith("part.")
    )
    assert costs["part.linear"].values == 2 * B * T * D + D * D
    assert costs["part.query"].values == 2 * B * T * D + D * D + D
    assert costs["part.query"].outputs == costs["part.linear"].outputs == B * T * D
    assert costs["head"].outputs == B * T * 16


def test_times_are_those_of_the_roofline():
    """A T4: 65 and 130 x 10^12 operations a second, 320 GB/s; one tile of 64 x 64 keeps one of 40 processors busy."""
    costs = {"compute": LayerCost(10**9, 10**6, 4096), "memory": LayerCost(10**6, 10**8, 10**7)}
    times = estimate_times(costs, "t4")
    assert times["compute"].float16 == pytest.approx(40 * 2e9 / 65e6 + 3)
    assert times["compute"].int8 == pytest.approx(40 * 2e9 / 130e6 + 3)
    assert times["memory"].float16 == pytest.approx(2e8 / 320e3 + 3)
    assert times["memory"].int8 == pytest.approx(1e8 / 320e3 + 3)


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


HEADS, WIDTH = 4, 8
VECTOR, MATRICES, CUBE = torch.ones(D), torch.ones(B, D, T), torch.ones(5, D, D)


def attend(x, mask=None):
    heads = x.reshape(B, T, HEADS, WIDTH).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, mask)


ATTENTION = 2 * B * T * T * D
PROJECTIONS = 4 * B * T * D * D


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (Call(attend), ATTENTION),
        (Call(lambda x: attend(x, torch.zeros(T, T))), ATTENTION),
        (Call(lambda x: attend(x, torch.ones(T, T, dtype=torch.bool))), ATTENTION),
        (
            nn.TransformerEncoderLayer(D, HEADS, 64, batch_first=True),
            PROJECTIONS + ATTENTION + 2 * B * T * D * 64,
        ),
        (nn.LSTM(D, 8, num_layers=2, bidirectional=True), 2 * B * T * 4 * 8 * ((D + 8) + (16 + 8))),
        (nn.GRU(D, 8), B * T * 3 * 8 * (D + 8)),
        (Call(lambda x: torch.addbmm(torch.zeros(T, T), x, MATRICES)), B * T * D * T),
        (Call(lambda x: x @ VECTOR), B * T * D),
        (Call(lambda x: torch.einsum("btd,bsd->bts", x, x)), B * T * T * D),
        (Call(lambda x: F.bilinear(x, x, CUBE)), B * T * 5 * D * D),
    ],
    ids=[
        "attention",
        "mask",
        "boolean mask",
        "encoder",
        "lstm",
        "gru",
        "addbmm",
        "vector",
        "einsum",
        "bilinear",
    ],
)
def test_products_are_counted_whatever_kernel_computes_them(model, macs):
    """torch's counter knows no fused kernel of the CPU; which kernel runs depends on the version of torch."""
    assert count_costs(model.eval(), torch.randn(B, T, D))[""].macs == macs


@pytest.fixture
def called():
    model, batches = Calls().eval(), [torch.randn(B, T, D) for _ in range(2)]
    swap_modules(model, batches[0], include=["*"])
    rewire_operations(model, batches[0])
    calibrate_model(model, batches, method="max")
    return model, batches


def test_calls_cost_time_and_a_share(called):
    model, batches = called
    analysis = analyze_layers(model, batches, gpu="orin")
    assert {layer.name for layer in analysis.layers} == {"query", "linear"}
    assert all(layer.macs and layer.cost for layer in analysis.layers)
    nothing = analyze_layers(model, batches, max_float_share=0.0, max_float_layers=9)
    assert nothing.float_layers == []


@pytest.mark.parametrize("is_pinned", [True, False])
def test_the_share_holds_what_is_float_already(is_pinned):
    model, batch = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).eval(), torch.randn(4, 16)
    swap_modules(model, batch, include=["*"], exclude=[] if is_pinned else ["0", "1"])
    calibrate_model(model, [batch], method="max")
    pinned = {"0": "float", "1": "float", "2": "int8"} if is_pinned else {"2": "int8"}
    options = {"pinned": pinned, "max_float_layers": 5}
    over = analyze_layers(model, [batch], max_float_share=0.3, **options)
    assert over.steps == ()
    assert over.stopped_by == "0.4 of the multiplications are in float already, the limit is 0.3"
    assert len(analyze_layers(model, [batch], max_float_share=0.6, **options).steps) == 1
    enable_quantization(model)
    by_count = analyze_layers(
        model, [batch], **{**options, "max_float_layers": 1}, max_float_share=1
    )
    assert len(by_count.steps) == 1  # beyond what was decided before


class Unequal(nn.Sequential):
    """One layer with most of the work, and a small one; the noise of both is alike."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 16), nn.Linear(16, 512), nn.Linear(512, 16), nn.ReLU())


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_a_search_moves_a_tenth_of_the_work_at_most_and_says_so(mode):
    model, batch = Unequal().eval(), torch.randn(8, 16)
    swap_modules(model, batch, include=["*"])
    calibrate_model(model, [batch], method="max")
    macs = {"0": 8 * 16 * 16, "1": 8 * 16 * 512, "2": 8 * 16 * 512}
    analysis = analyze_layers(model, [batch], mode=mode, max_float_layers=3)
    assert {layer.name: layer.macs for layer in analysis.layers} == macs
    assert analysis.macs == sum(macs.values())
    assert analysis.float_share == 0
    assert analysis.float_layers == ["0"]
    share = macs["0"] / sum(macs.values())
    assert analysis.steps[0].float_share == pytest.approx(share)
    large = next(layer.name for layer in analysis.layers if layer.name != "0")
    reason = "would be in float, above the limit of 10.0% (max_float_share)"
    assert reason in analysis.kept[large]
    assert reason in analysis.stopped_by
    assert reason in analysis.plan.layers[large].reason
    table = analysis.format_table()
    assert f"{100 * macs['1'] / sum(macs.values()):.1f}" in table
    if analysis.layers[0].name != "0":
        assert f"{large} stays in int8: with it" in table
    lifted = analyze_layers(model, [batch], mode=mode, max_float_layers=3, max_float_share=1)
    assert {*lifted.float_layers, "0"} == {"0", "1", "2"}


def test_what_is_float_already_does_not_use_up_the_default():
    model, batch = Unequal().eval(), torch.randn(8, 16)
    swap_modules(model, batch, include=["*"], exclude=["1"])
    calibrate_model(model, [batch], method="max")
    analysis = analyze_layers(model, [batch], max_float_layers=3)
    assert 0.4 < analysis.float_share < 0.5
    assert analysis.float_layers == ["0"]


def test_the_only_int8_layer_stays_in_int8_however_small_it_is():
    """The default is a tenth of the int8 work; a tenth of all work would leave nothing in int8."""
    model, batch = Unequal().eval(), torch.randn(8, 16)
    swap_modules(model, batch, include=["0"])
    calibrate_model(model, [batch], method="max")
    analysis = analyze_layers(model, [batch], max_float_layers=3)
    assert analysis.float_share > 0.95
    assert analysis.float_layers == []
    assert "(max_float_share)" in analysis.kept["0"]


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_a_layer_that_was_tried_in_vain_says_so(mode):
    model, batch = Unequal().eval(), torch.randn(8, 16)
    swap_modules(model, batch, include=["*"])
    calibrate_model(model, [batch], method="max")

    def count_int8(model):
        return float(sum(layer.input_quantizer.is_enabled for layer in list(model)[:3]))

    analysis = analyze_layers(
        model, [batch], metric=count_int8, mode=mode, max_float_layers=1, max_float_share=1
    )
    worst = analysis.layers[0].name
    assert analysis.float_layers == []
    assert f"{worst} stays in int8: tried in float: " in analysis.format_table()
    assert "no better" in analysis.plan.layers[worst].reason


def write(path, **times):
    path.write_text(
        json.dumps([{"count": 1}, *({"name": n, "averageMs": t} for n, t in times.items())])
    )
    return path


def test_a_kernel_is_of_the_layers_whose_whole_names_it_has(tmp_path):
    names = [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.0.conv10",
        "block",
        "part.linear",
        "linear",
    ]
    modules = {"", "layer1", "layer1.0", "part", *names[:5]}
    kernels = {
        "conv1/Conv": 1.0,
        "layer1.0.conv1/Conv + layer1.0/Relu": 2.0,
        "/layer1/layer1.0/conv2/Conv + /layer1/layer1.0/Relu_1": 4.0,
        "layer1.0.conv10/Conv_2": 8.0,
        "Reformatting CopyNode for Input Tensor 0 to block/act/Relu": 16.0,
        "part/Gemm": 32.0,
        "part/Relu": 64.0,
        "/MatMul": 128.0,
        "layer1.0.conv1/Conv + layer1.0.conv2/Conv": 256.0,
        "nothing/Conv": 512.0,
    }
    times = load_times(write(tmp_path / "profile.json", **kernels), names, modules)
    assert {name: cost.int8 for name, cost in times.items()} == {
        "conv1": 1000,
        "layer1.0.conv1": 2000 + 128000,
        "layer1.0.conv2": 4000 + 128000,
        "layer1.0.conv10": 8000,
        "block": 16000,
        "part.linear": 32000,
        "linear": 128000,
    }


@pytest.mark.parametrize("time", [float("nan"), -3.0, float("inf")])
def test_a_time_that_is_none_is_refused(called, tmp_path, time):
    model, batches = called
    path = write(tmp_path / "profile.json", query=time)
    with pytest.raises(
        DataError, match=r"not an engine profile: .*(not a number|averageMs is -3\.0)"
    ):
        analyze_layers(model, batches, profile=path)


def test_a_gpu_and_a_profile_are_one_too_many(called, tmp_path):
    model, batches = called
    with pytest.raises(ArgumentError, match="both gpu and profile"):
        analyze_layers(
            model, batches, gpu="orin", profile=write(tmp_path / "profile.json", query=1.0)
        )


def test_layers_of_cudnn_count_as_those_of_the_cpu():
    from qdq.work import _FLOP_FORMULAS

    layer = nn.LSTM(4, 8, num_layers=2, bidirectional=True)
    expected = count_costs(layer, torch.randn(5, 3, 4))[""].macs
    formula = _FLOP_FORMULAS[torch.ops.aten._cudnn_rnn]
    assert (
        formula((5, 3, 4), [tuple(weight.shape) for weight in layer.parameters()]) == 2 * expected
    )
