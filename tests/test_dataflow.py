"""The questions about a forward, on graphs drawn by hand and, for reachability, against brute force."""

from math import inf

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq.dataflow import Dataflow, clamp_of
from qdq.forward import ForwardTrace, Operation, trace_forward


class Graph:
    """Operations written as `name = function(inputs)`; the names stand for tensors, and "x" is the input."""

    def __init__(self, text, outputs):
        self.numbers = {"x": 1}
        operations = [self._parse(line.strip()) for line in text.strip().splitlines()]
        outputs = tuple(self.numbers[name] for name in outputs.split())
        self.flow = Dataflow(ForwardTrace(operations=operations, inputs=(1,), outputs=outputs))

    def _parse(self, line):
        output, call = line.split(" = ")
        function, names = call.rstrip(")").split("(")
        inputs = tuple(self._number(name) for name in names.split(", "))
        return Operation(output, function, 0, inputs, (self._number(output),), {})

    def _number(self, name):
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def backbone(self, name, **options):
        operation = self.flow.backbone_of(self.numbers[name], **options)
        return operation and operation.module

    def readers(self, name):
        return {operation.module for operation in self.flow.readers_behind([self.numbers[name]])}

    def fork(self, first, second):
        fork = self.flow.find_fork(self.numbers[first], self.numbers[second])
        names = {number: name for name, number in self.numbers.items()}
        return fork and (names[fork.value], fork.to_first, fork.to_second)

    def last_convolutions(self):
        return {operation.module for operation in self.flow.output_convolutions()}


RESIDUAL = """
    stem = conv2d(x, w0)
    act = relu(stem)
    main1 = conv2d(act, w1)
    norm1 = batch_norm(main1, mean, var)
    act1 = relu(norm1)
    main2 = conv2d(act1, w2)
    norm2 = batch_norm(main2, mean2, var2)
    sum = add(norm2, act)
    out = relu(sum)
"""


def test_the_backbone_is_the_convolution_in_a_straight_line():
    graph = Graph(RESIDUAL, "out")
    assert graph.backbone("main2") == "main2"
    assert graph.backbone("norm2") == "main2"
    assert graph.backbone("act") is None
    assert graph.backbone("act", through_activations=True) == "stem"
    assert graph.backbone("sum", through_activations=True) is None
    assert graph.backbone("x") is None


def test_the_fork_of_a_residual_block():
    graph = Graph(RESIDUAL, "out")
    assert graph.fork("norm2", "act") == ("act", 5, 0)
    assert graph.fork("act", "norm2") == ("act", 0, 5)
    assert graph.fork("out", "out") == ("out", 0, 0)
    assert graph.fork("w1", "act") is None


def test_weights_are_stored_and_not_computed():
    graph = Graph("view = reshape(w)\n scaled = mul(view, g)\n y = linear(x, scaled)", "y")
    flow, numbers = graph.flow, graph.numbers
    assert [name for name in numbers if flow.is_computed(numbers[name])] == ["x", "y"]
    stored = [name for name in numbers if flow.is_stored(numbers[name])]
    assert stored == ["x", "w", "view", "g"]


def test_the_first_convolution():
    first = Graph(RESIDUAL, "out").flow.first_convolution()
    assert first is not None
    assert first.module == "stem"
    assert Graph("y = relu(x)", "y").flow.first_convolution() is None


# graph, its outputs, the convolutions that write them
LAST = [
    ("a = conv2d(x, w)", "a", {"a"}),
    ("a = conv2d(x, w)\n b = sigmoid(a)\n c = reshape(b)", "c", {"a"}),
    ("a = conv2d(x, w)\n b = conv2d(a, v)", "b", {"b"}),
    ("a = conv2d(x, w)\n b = conv2d(a, v)", "a b", {"a", "b"}),
    ("a = conv2d(x, w)\n b = conv2d(a, v)\n c = cat(a, b)", "c", {"b"}),
    ("a = conv2d(x, w)\n b = conv2d(x, v)\n c = cat(a, b)", "c", {"a", "b"}),
    ("a = conv2d(x, w)\n b = mean(a)", "b", set()),
    ("a = conv2d(x, w)\n b = avg_pool2d(a)\n c = flatten(b)\n d = linear(c, v)", "d", set()),
    ("a = conv2d(x, w)\n b = adaptive_avg_pool2d(a)\n c = conv2d(b, v)", "c", set()),
    ("a = conv2d(x, w)\n b = max_pool2d(a)", "b", {"a"}),
    ("a = conv2d(x, w)\n b = add(a, a)", "b", {"a"}),
    # a residual stream: ViT, whose patches a linear layer reads behind a normalisation and a reshape
    (
        "a = conv2d(x, w)\n r = flatten(a)\n n = layer_norm(r)\n l = linear(n, v)\n s = add(r, l)",
        "s",
        set(),
    ),
    ("a = conv2d(x, w)\n n = group_norm(a)\n b = conv2d(n, v)\n s = add(a, b)", "s", {"b"}),
    (
        "a = conv2d(x, w)\n p = mean(a)\n l = conv2d(p, v)\n g = sigmoid(l)\n m = mul(a, g)",
        "m",
        {"a"},
    ),
]


@pytest.mark.parametrize(("text", "outputs", "expected"), LAST)
def test_convolutions_that_write_an_output(text, outputs, expected):
    convolutions = Graph(text, outputs).flow.output_convolutions()
    assert {operation.module for operation in convolutions} == expected
    assert len(convolutions) == len(expected)


ATTENTION = "q = linear(x, w)\n s = matmul(q, x)\n m = add(s, z)\n p = softmax(m)\n o = matmul(p, x)\n y = linear(o, v)"


@pytest.mark.parametrize(
    ("text", "output", "expected"),
    [
        (ATTENTION, "y", {"s", "o"}),
        ("s = matmul(x, x)\n p = softmax(s)", "p", set()),  # scores of a classifier
        ("s = matmul(x, x)\n y = relu(s)\n o = matmul(y, x)", "o", set()),  # a correlation
        ("s = linear(x, w)\n p = softmax(s)\n o = matmul(p, x)", "o", set()),  # a mixture
    ],
)
def test_products_around_a_softmax_are_attention(text, output, expected):
    products = Graph(text, output).flow.attention_products()
    assert {operation.module for operation in products} == expected


def test_readers_behind_activations_copies_and_concats():
    graph = Graph(RESIDUAL, "out")
    assert graph.readers("stem") == {"act", "main1", "sum"}
    assert graph.readers("norm2") == {"sum"}
    split = "a = relu(x)\n b = chunk(a)\n c = cat(b, z)\n d = linear(c, w)\n e = softmax(d)"
    assert Graph(split, "e").readers("x") == {"a", "b", "c", "d"}


PASSING = ("relu", "reshape", "mul", "max_pool2d", "cat")


@pytest.mark.parametrize("seed", range(6))
def test_readers_behind_equal_a_closure(seed):
    draw = np.random.default_rng(seed)
    functions = (*PASSING, "conv2d", "softmax", "mean")
    edges = []
    for value in range(2, 16):
        edges.append((int(draw.integers(1, value)), str(draw.choice(functions)), value))
    operations = [
        Operation(str(target), function, 0, (source,), (target,), {})
        for source, function, target in edges
    ]
    flow = Dataflow(ForwardTrace(operations=operations, inputs=(1,), outputs=(15,)))
    for start in range(1, 16):
        reached = {start}
        for _ in edges:
            reached |= {
                target for source, name, target in edges if source in reached and name in PASSING
            }
        expected = {str(target) for source, _, target in edges if source in reached}
        assert {reader.module for reader in flow.readers_behind([start])} == expected


CLAMPS = {
    "F.relu": (F.relu, (0.0, inf)),
    "F.relu6": (F.relu6, (0.0, 6.0)),
    "nn.ReLU6": (nn.ReLU6(), (0.0, 6.0)),
    "F.hardtanh": (F.hardtanh, (-1.0, 1.0)),
    "F.hardtanh(-2, 3)": (lambda x: F.hardtanh(x, -2, 3), (-2.0, 3.0)),
    "F.hardtanh(max_val=5)": (lambda x: F.hardtanh(x, max_val=5.0), (-1.0, 5.0)),
    "clamp(0, 4)": (lambda x: x.clamp(0, 4), (0.0, 4.0)),
    "clamp(min=0)": (lambda x: torch.clamp(x, min=0), (0.0, inf)),
    "clamp(max=2)": (lambda x: torch.clamp(x, max=2), (-inf, 2.0)),
    "clamp(None, 2)": (lambda x: x.clamp(None, 2), (-inf, 2.0)),
    "clip_(-1, 1)": (lambda x: x.clone().clip_(-1, 1), (-1.0, 1.0)),
    "clamp(tensor)": (lambda x: x.clamp(torch.zeros(1), torch.ones(1)), None),
    "silu": (F.silu, None),
    "leaky_relu": (F.leaky_relu, None),
}


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("spelling", CLAMPS)
def test_bounds_of_a_clamp(spelling):
    function, expected = CLAMPS[spelling]
    x = torch.linspace(-100, 100, 401)
    operation = trace_forward(Called(function), x).operations[-1]
    bounds = clamp_of(operation)
    assert bounds == expected
    if bounds is not None:
        torch.testing.assert_close(function(x), x.double().clamp(*bounds).float())


def test_the_interval_in_which_a_tensor_matters():
    x = torch.randn(4, 4)
    for model, expected in [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU6()), (0.0, 6.0)),
        (nn.Sequential(nn.Linear(4, 4), nn.SiLU()), (-inf, inf)),
        (nn.Sequential(nn.Linear(4, 4)), (-inf, inf)),
        (Called(lambda y: F.relu(y + 1) + y), (-inf, inf)),
    ]:
        flow = Dataflow(trace_forward(model, x))
        first = flow.operations[0].outputs[0] if isinstance(model, nn.Sequential) else 1
        assert flow.passing_interval(first) == expected


@pytest.mark.parametrize(
    ("mode", "is_copy"), [("nearest", True), ("nearest-exact", True), ("bilinear", False)]
)
def test_a_resize_that_copies(mode, is_copy):
    for resize in (
        lambda x: F.interpolate(x, scale_factor=2, mode=mode),
        lambda x: F.interpolate(x, None, 2, mode),
    ):
        flow = Dataflow(trace_forward(Called(resize), torch.randn(1, 2, 4, 4)))
        (operation,) = [call for call in flow.operations if call.function == "interpolate"]
        assert flow.is_copy(operation) == is_copy


@pytest.mark.parametrize(
    ("readers", "outputs", "expected"),
    [
        ("b = add(x, a)\nn = layer_norm(b)", "n", "n"),
        ("d = dropout(a)\nn = layer_norm(d)\nb = add(d, x)\nm = layer_norm(b)", "m", "n"),
        ("b = add(x, a)\nc = relu(b)", "c", None),
        ("n = layer_norm(a)\nc = linear(a)", "n c", None),
        ("n = layer_norm(a)", "n a", None),
        ("b = add(x, a)", "b", None),
    ],
)  # fmt: skip
def test_the_norm_behind_a_sum(readers, outputs, expected):
    graph = Graph(f"a = linear(x)\n{readers}", outputs)
    graph.flow.shapes.update(dict.fromkeys(graph.numbers.values(), (2, 4, 16)))
    operation = graph.flow.normalization_behind(graph.numbers["a"])
    assert (None if operation is None else operation.module) == expected
