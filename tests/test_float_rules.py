"""What stays in float by default, against tables written by hand from the rules' words."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq.dataflow import Dataflow
from qdq.float_rules import (
    CallRules,
    list_factors,
    reason_against_convolution,
    reason_against_linear,
    reason_against_type,
)
from qdq.forward import trace_forward
from qdq.rewire import rewire_operations
from qdq.swap import swap_modules

# weight [Cout, Cin / groups, kernel ...], groups, is it the first convolution, rule against it ("" if none)
CONVOLUTIONS = [
    # Cout >= 16 and Cin / groups >= 16: quantize, whatever the kernel
    ((16, 16, 3, 3), 1, False, ""),
    ((16, 16, 1, 1), 1, False, ""),
    ((16, 16, 1, 7), 1, False, ""),
    ((17, 19, 3, 3), 1, False, ""),
    ((16, 16, 3), 1, False, ""),
    # one below either bound, and neither a multiple of 8
    ((15, 17, 3, 3), 1, False, "R-CONV-3"),
    ((17, 15, 3, 3), 1, False, "R-CONV-3"),
    ((17, 15, 3, 3), 1, True, "R-CONV-3"),
    # one group: Cout or Cin a multiple of 8 ...
    ((15, 16, 3, 3), 1, False, ""),
    ((16, 15, 3, 3), 1, False, ""),
    ((24, 3, 3, 3), 1, False, ""),
    ((3, 24, 3, 3), 1, False, ""),
    ((20, 8, 3, 3), 1, False, ""),
    ((20, 7, 3, 3), 1, False, "R-CONV-3"),
    ((20, 9, 3, 3), 1, False, "R-CONV-3"),
    ((1, 32, 1, 1), 1, False, ""),
    ((1, 33, 1, 1), 1, False, "R-CONV-3"),
    # ... and the first of the network, or one of them >= 16 ...
    ((8, 3, 3, 3), 1, True, ""),
    ((8, 3, 3, 3), 1, False, "R-CONV-3"),
    ((8, 8, 3, 3), 1, True, ""),
    ((8, 8, 3, 3), 1, False, "R-CONV-3"),
    ((8, 15, 3, 3), 1, False, "R-CONV-3"),
    ((15, 8, 3, 3), 1, False, "R-CONV-3"),
    ((8, 16, 3, 3), 1, False, ""),
    ((12, 3, 3, 3), 1, True, "R-CONV-3"),
    ((32, 3, 3, 3), 1, True, ""),
    # ... and a square kernel
    ((24, 3, 5, 5), 1, False, ""),
    ((24, 3, 5, 3), 1, False, "R-CONV-3"),
    ((24, 3, 1, 3), 1, True, "R-CONV-3"),
    ((24, 3, 5), 1, False, ""),
    # depthwise: Cout a multiple of 8 and every kernel size >= 3
    ((32, 1, 3, 3), 32, False, ""),
    ((32, 1, 3, 5), 32, False, ""),
    ((32, 1, 2, 3), 32, False, "R-CONV-3"),
    ((32, 1, 3, 2), 32, False, "R-CONV-3"),
    ((32, 1, 1, 1), 32, False, "R-CONV-3"),
    ((32, 1, 3), 32, False, ""),
    ((8, 1, 3, 3), 8, False, ""),
    ((8, 1, 3, 3), 4, False, ""),
    ((12, 1, 3, 3), 12, False, "R-CONV-3"),
    ((12, 1, 3, 3), 12, True, "R-CONV-3"),
    ((7, 1, 3, 3), 7, False, "R-CONV-3"),
    # grouped, 1 < groups < Cin: never, however wide
    ((64, 32, 3, 3), 2, False, "R-CONV-4"),
    ((64, 32, 3, 3), 2, True, "R-CONV-4"),
    ((32, 2, 3, 3), 16, False, "R-CONV-4"),
    ((32, 4, 1, 1), 8, False, "R-CONV-4"),
    # three dimensions: never
    ((32, 32, 3, 3, 3), 1, False, "R-CONV-7"),
    ((32, 3, 3, 3, 3), 1, True, "R-CONV-7"),
    ((32, 1, 3, 3, 3), 32, False, "R-CONV-7"),
]

# weight [N, K], rule against it
LINEAR = [
    ((16, 16), ""),
    ((1000, 1280), ""),
    ((17, 19), ""),
    ((15, 16), "R-MM-3"),
    ((16, 15), "R-MM-3"),
    ((1, 4096), "R-MM-3"),
    ((4096, 1), "R-MM-3"),
    ((15, 15), "R-MM-3"),
]


@pytest.mark.parametrize(("weight", "groups", "is_first", "rule"), CONVOLUTIONS)
def test_convolution(weight, groups, is_first, rule):
    reason = reason_against_convolution(weight, groups, is_first)
    assert reason.endswith(f"({rule})") if rule else reason == ""


def test_reason_names_the_sizes():
    assert reason_against_convolution((12, 3, 3, 5), 1, True).startswith(
        "3 to 12 channels, kernel [3, 5]: "
    )
    assert reason_against_convolution((12, 1, 3, 3), 12, False).startswith(
        "12 to 12 channels, kernel [3, 3]: "
    )
    assert reason_against_linear((10, 1280)).startswith("1280 to 10 features: ")


@pytest.mark.parametrize(("weight", "rule"), LINEAR)
def test_linear(weight, rule):
    reason = reason_against_linear(weight)
    assert reason.endswith(f"({rule})") if rule else reason == ""


TYPES = [
    (nn.BatchNorm2d(4), True),
    (nn.InstanceNorm1d(4, affine=True), True),
    (nn.LayerNorm(4), True),
    (nn.GroupNorm(2, 4), True),
    (nn.Embedding(4, 4), True),
    (nn.EmbeddingBag(4, 4), True),
    (nn.PReLU(), True),
    (nn.Conv2d(4, 4, 1), False),
    (nn.Linear(4, 4), False),
    (nn.Bilinear(4, 4, 4), False),
]


@pytest.mark.parametrize(("module", "is_float"), TYPES)
def test_classes_without_a_counterpart(module, is_float):
    assert reason_against_type(module).endswith("(R-LN, R-SM)") == is_float


class Residual(nn.Module):
    """Two convolutions in a row, or side by side, with an add behind them."""

    def __init__(self, add):
        super().__init__()
        self.add = add
        self.stem, self.long, self.end = (nn.Conv2d(16, 16, 1) for _ in range(3))

    def forward(self, x):
        return self.add(self, torch.relu(self.stem(x)))


ADDITIONS = {
    "shortcut second": (lambda net, y: net.long(y) + y, 1),
    "shortcut first": (lambda net, y: y + net.long(y), 0),
    "in place": (lambda net, y: net.long(y).add_(y), 1),
    "the shorter of two ways": (lambda net, y: net.end(torch.relu(net.long(y))) + net.end(y), 1),
    "the shorter of two ways first": (lambda net, y: net.end(y) + net.end(net.long(y)), 0),
    "two ways as long": (lambda net, y: net.long(y) + net.end(y), 1),
    "activations on both ways": (lambda net, y: torch.relu(net.long(y)) + y, None),
    "twice the same": (lambda net, y: (net.long(y).add(1) * 2).relu() * 1 + y.relu(), None),
}


@pytest.mark.parametrize("spelling", ADDITIONS)
def test_the_shortcut_of_a_residual_add(spelling):
    add, shortcut = ADDITIONS[spelling]
    model = Residual(add).eval()
    flow = Dataflow(trace_forward(model, torch.randn(1, 16, 4, 4)))
    rules = CallRules(dict(model.named_modules()), flow, is_quantized=lambda operation: True)
    addition = [operation for operation in flow.operations if operation.function == "add"][-1]
    assert rules.find_shortcut(addition) == shortcut


def test_an_add_of_float_convolutions_stays_in_float():
    model = Residual(ADDITIONS["shortcut second"][0]).eval()
    flow = Dataflow(trace_forward(model, torch.randn(1, 16, 4, 4)))
    rules = CallRules(dict(model.named_modules()), flow, is_quantized=lambda operation: False)
    addition = flow.operations[-1]
    assert rules.find_shortcut(addition) is None
    assert rules.reason_against(addition) == "its convolution long is in float"


class Boxes(nn.Module):
    """Scores, and boxes whose sides are decoded from the probabilities of 16 lengths."""

    def __init__(self, decode):
        super().__init__()
        self.stem, self.box, self.score = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 64, 1),
            nn.Conv2d(16, 8, 1),
        )
        self.decode = decode

    def forward(self, x):
        features = self.stem(x).relu()
        lengths = self.box(features).flatten(2).unflatten(1, (4, 16))
        return {"boxes": self.decode(lengths), "scores": self.score(features).sigmoid()}


class Called(nn.Module):
    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        self.lengths = nn.Buffer(torch.arange(16.0))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


EXPECTATIONS = {
    "convolution": lambda: Called(
        lambda net, x: net.mean(x.transpose(1, 2).softmax(1)), mean=nn.Conv2d(16, 1, 1, bias=False)
    ),
    "linear layer": lambda: Called(
        lambda net, x: net.mean(net.softmax(x.mT)), mean=nn.Linear(16, 1), softmax=nn.Softmax(-1)
    ),
    "F.linear": lambda: Called(lambda net, x: F.linear(F.softmax(x, dim=2).mT, net.lengths)),
    "vector": lambda: Called(lambda net, x: x.softmax(2).mT @ net.lengths),
    "column": lambda: Called(lambda net, x: x.mT.softmax(dim=-1) @ net.lengths[:, None]),
    "sum": lambda: Called(lambda net, x: (x.mT.softmax(-1) * net.lengths).sum(-1)),
}


@pytest.mark.parametrize("spelling", EXPECTATIONS)
def test_the_layers_behind_which_boxes_are_decoded_stay_in_float(spelling):
    model = Boxes(EXPECTATIONS[spelling]()).eval()
    images = torch.randn(2, 3, 9, 9)
    plan = swap_modules(model, images)
    calls = rewire_operations(model, images)
    assert [layer.name for layer in plan.of("quantize")] == ["stem"]
    assert plan.of("missed") == []
    reasons = {layer.name: layer.reason for layer in plan.of("float")}
    assert reasons.pop("box") == reasons.pop("score")
    assert all(reason.startswith("expectation over a softmax") for reason in reasons.values())
    assert len(reasons) == (spelling != "sum")
    decoding = [call for call in calls.operations if call.function in ("linear", "matmul")]
    assert all(call.reason.startswith("expectation over a softmax") for call in decoding)
    assert not calls.of("quantize")


@pytest.mark.parametrize(
    "decode",
    [
        lambda net, x: net.mean(x.transpose(1, 2).softmax(-1)),  # over positions, not over lengths
        lambda net, x: net.mix(x.mT.softmax(-1)),  # 16 mixtures
        lambda net, x: net.mean(x.transpose(1, 2).sigmoid()),
    ],
)
def test_other_products_after_a_softmax_are_layers(decode):
    model = Boxes(Called(decode, mean=nn.Conv2d(16, 1, 1), mix=nn.Linear(16, 16))).eval()
    plan = swap_modules(model, torch.randn(2, 3, 9, 9))
    assert "box" in [layer.name for layer in plan.of("quantize")]


@pytest.mark.parametrize("function", ["addmm", "mm", "chain_matmul"])
def test_factors_of_a_product(function):
    matrix = torch.randn(4, 4)
    calls = {
        "addmm": lambda x: torch.addmm(x, matrix, matrix),
        "mm": lambda x: torch.mm(x, matrix),
        "chain_matmul": lambda x: torch.chain_matmul(x, matrix, matrix),
    }

    class Product(nn.Module):
        def forward(self, x):
            return calls[function](x)

    trace = trace_forward(Product(), matrix)
    operation = next(operation for operation in trace.operations if operation.function == function)
    expected = {"addmm": (1, 2), "mm": (0, 1), "chain_matmul": (0, 1, 2)}
    assert list_factors(operation) == expected[function]
