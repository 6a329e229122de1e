"""The table of torch functions, against what torch computes, and that one spelling is judged as any other."""

import ast
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq
from qdq.forward import name_function, trace_forward
from qdq.functions import (
    ALIASES,
    AVERAGES,
    CONTRACTIONS,
    COPIES,
    FUNCTIONS,
    HOMOGENEOUS,
    IDENTITIES,
    MAX_POOLINGS,
    WEIGHTED,
    Kind,
    names_of,
)
from qdq.rewire import rewire_operations
from qdq.swap import plan_swap, swap_modules

MATRIX = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
SQUARE = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
FILTERS = torch.randn(8, 32, 1, 1)


def rows(x):
    """`[N, 32, H, W]` as `[N H W, 32]`."""
    return x.flatten(2).transpose(1, 2).reshape(-1, 32)


def batch_of_rows(x):
    return x.flatten(2).transpose(1, 2)


PRODUCTS = {
    "torch.matmul": lambda x: torch.matmul(rows(x), MATRIX),
    "Tensor.matmul": lambda x: rows(x).matmul(MATRIX),
    "torch.linalg.matmul": lambda x: torch.linalg.matmul(rows(x), MATRIX),
    "@": lambda x: rows(x) @ MATRIX,
    "__rmatmul__": lambda x: MATRIX.__rmatmul__(rows(x)),
    "torch.mm": lambda x: torch.mm(rows(x), MATRIX),
    "Tensor.mm": lambda x: rows(x).mm(MATRIX),
    "torch.ops.aten.mm": lambda x: torch.ops.aten.mm(rows(x), MATRIX),
    "torch.ops.aten.mm.default": lambda x: torch.ops.aten.mm.default(rows(x), MATRIX),
    "torch.bmm": lambda x: torch.bmm(batch_of_rows(x), MATRIX.expand(len(x), -1, -1)),
    "Tensor.bmm": lambda x: batch_of_rows(x).bmm(MATRIX.expand(len(x), -1, -1)),
    "torch.addmm": lambda x: torch.addmm(torch.zeros(8), rows(x), MATRIX),
    "Tensor.addmm": lambda x: torch.zeros(8).addmm(rows(x), MATRIX),
    "Tensor.addmm_": lambda x: torch.zeros(len(rows(x)), 8).addmm_(rows(x), MATRIX),
    "torch.baddbmm": lambda x: torch.baddbmm(
        torch.zeros(1), batch_of_rows(x), MATRIX.expand(len(x), -1, -1)
    ),
    "torch.addbmm": lambda x: torch.addbmm(
        torch.zeros(1), batch_of_rows(x), MATRIX.expand(len(x), -1, -1)
    ),
    "torch.mv": lambda x: torch.mv(rows(x), MATRIX[:, 0]),
    "Tensor.mv": lambda x: rows(x).mv(MATRIX[:, 0]),
    "torch.addmv": lambda x: torch.addmv(torch.zeros(1), rows(x), MATRIX[:, 0]),
    "torch.einsum": lambda x: torch.einsum("nchw,cd->ndhw", x, MATRIX),
    "torch.tensordot": lambda x: torch.tensordot(rows(x), MATRIX, 1),
    "torch.inner": lambda x: torch.inner(rows(x), MATRIX.T),
    "torch.linalg.multi_dot": lambda x: torch.linalg.multi_dot([rows(x), SQUARE, MATRIX]),
    "torch.linalg.vecdot": lambda x: torch.linalg.vecdot(rows(x), MATRIX[:, 0]),
    "F.linear": lambda x: F.linear(rows(x), MATRIX.T),
    "F.bilinear": lambda x: F.bilinear(rows(x), rows(x), SQUARE.expand(4, -1, -1)),
    "F.scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        *[batch_of_rows(x)] * 3
    ),
    "torch.lstm_cell": lambda x: nn.LSTMCell(32, 4)(rows(x)),
}
AVERAGED = {
    "Tensor.mean": lambda x: x.mean((2, 3)),
    "torch.mean": lambda x: torch.mean(x, (2, 3)),
    "F.avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 4),
    "torch.avg_pool1d": lambda x: torch.avg_pool1d(x.flatten(2), 4),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "nn.AvgPool2d": nn.AvgPool2d(2),
    "F.avg_pool3d": lambda x: F.avg_pool3d(x[:, None], 2),
    "F.adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "F.adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x[:, None], 2),
    "F.lp_pool1d": lambda x: F.lp_pool1d(x.flatten(2), 2, 2),
    "F.lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "F.lp_pool3d": lambda x: F.lp_pool3d(x[:, None], 2, 2),
}
MAXIMA = {
    "F.max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "torch.max_pool1d": lambda x: torch.max_pool1d(x.flatten(2), 2),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "F.max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "F.max_pool3d": lambda x: F.max_pool3d(x[:, None], 2),
    "F.adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 1),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1),
    "F.adaptive_max_pool2d with indices": lambda x: F.adaptive_max_pool2d(
        x, 1, return_indices=True
    )[0],
    "F.adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x[:, None], 2),
}
ACTIVATED = {
    "F.relu": F.relu,
    "torch.relu_": torch.relu_,
    "Tensor.clamp": lambda x: x.clamp(0, 6),
    "torch.clip": lambda x: torch.clip(x, 0, 6),
    "Tensor.clip_": lambda x: x.clip_(0, 6),
    "Tensor.clamp_min": lambda x: x.clamp_min(0),
    "F.silu": F.silu,
    "F.softsign": F.softsign,
    "F.logsigmoid": F.logsigmoid,
    "torch.multiply": lambda x: torch.multiply(x, 2),
    "*=": lambda x: x.mul_(2),
    "F.dropout3d": lambda x: F.dropout3d(x, 0.5, False),
}
SMALLER = {
    "F.conv1d": lambda x: F.conv1d(x.flatten(2), FILTERS[..., 0]),
    "F.conv2d": lambda x: F.conv2d(x, FILTERS),
    "torch.conv2d": lambda x: torch.conv2d(x, FILTERS),
    "F.conv3d": lambda x: F.conv3d(x[:, :, None], FILTERS[..., None]),
    "F.conv_transpose1d": lambda x: F.conv_transpose1d(
        x.flatten(2), FILTERS.transpose(0, 1)[..., 0]
    ),
    "F.conv_transpose2d": lambda x: F.conv_transpose2d(x, FILTERS.transpose(0, 1)),
    "F.conv_transpose3d": lambda x: F.conv_transpose3d(
        x[:, :, None], FILTERS.transpose(0, 1)[..., None]
    ),
}


class Tailed(nn.Module):
    """Two convolutions and a function behind them."""

    def __init__(self, tail):
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3)
        self.last = nn.Conv2d(32, 32, 3)
        self.tail = tail

    def forward(self, x):
        return self.tail(self.last(torch.relu(self.first(x))))


def plan_of_last(tail):
    plan = plan_swap(Tailed(tail).eval(), torch.randn(2, 16, 8, 8))
    return next(module for module in plan.modules if module.name == "last")


def reason_of_last(tail):
    return plan_of_last(tail).reason


class Head(nn.Module):
    """A head with a weight of its own, and the layout that it takes."""

    def __init__(self, layout, multiply, *shape):
        super().__init__()
        self.layout = layout
        self.multiply = multiply
        self.weight = nn.Parameter(torch.randn(shape or (32, 16)))

    def forward(self, x):
        return self.multiply(self.layout(x), self.weight)


class Behind(nn.Module):
    """A module behind a change of the layout."""

    def __init__(self, layout, module):
        super().__init__()
        self.layout = layout
        self.module = module

    def forward(self, x):
        return self.module(self.layout(x))


def lines_of_pixels(x):
    return x.flatten(2)


def attend(x, weight):
    return F.scaled_dot_product_attention(x @ weight, x @ weight, x @ weight)


HEADS = {
    "nn.Linear": lambda: Behind(rows, nn.Linear(32, 16)),
    "F.linear": lambda: Head(rows, F.linear, 16, 32),
    "mm": lambda: Head(rows, torch.mm),
    "matmul": lambda: Head(rows, torch.matmul),
    "@": lambda: Head(batch_of_rows, lambda x, weight: x @ weight),
    "bmm": lambda: Head(batch_of_rows, lambda x, weight: x.bmm(weight.expand(len(x), -1, -1))),
    "addmm": lambda: Head(rows, lambda x, weight: torch.addmm(torch.ones(16), x, weight)),
    "baddbmm": lambda: Head(
        batch_of_rows, lambda x, weight: torch.ones(1).baddbmm(x, weight.expand(len(x), -1, -1))
    ),
    "einsum": lambda: Head(batch_of_rows, lambda x, weight: torch.einsum("nlc,cd->nld", x, weight)),
    "mv": lambda: Head(rows, torch.mv, 32),
    "addmv": lambda: Head(rows, lambda x, weight: torch.addmv(torch.ones(1), x, weight), 32),
    "tensordot": lambda: Head(rows, lambda x, weight: torch.tensordot(x, weight, 1)),
    "nn.Bilinear": lambda: Behind(rows, Tied(nn.Bilinear(32, 32, 4))),
    "attention": lambda: Head(batch_of_rows, attend),
    "nn.LSTM": lambda: Behind(batch_of_rows, nn.LSTM(32, 16, batch_first=True)),
    "nn.AvgPool1d": lambda: Behind(lines_of_pixels, nn.AvgPool1d(2)),
    "F.avg_pool1d": lambda: Head(lines_of_pixels, lambda x, weight: F.avg_pool1d(x, 2)),
    "nn.AvgPool2d": lambda: nn.AvgPool2d(2),
    "F.avg_pool2d": lambda: Head(nn.Identity(), lambda x, weight: F.avg_pool2d(x, 2)),
    "nn.AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(1),
    "mean": lambda: Head(nn.Identity(), lambda x, weight: x.mean((2, 3))),
    "nn.Conv2d": lambda: nn.Conv2d(32, 16, 1),
    "F.conv2d": lambda: Head(nn.Identity(), F.conv2d, 16, 32, 1, 1),
}


class Tied(nn.Module):
    """A module of two inputs that is given one tensor twice."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x)


@pytest.mark.parametrize("between", ["nothing", "relu", "dropout"])
@pytest.mark.parametrize("head", HEADS)
def test_the_last_convolution_is_planned_alike_before_every_head(head, between):
    layers = {"nothing": nn.Identity(), "relu": nn.ReLU(), "dropout": nn.Dropout()}
    last = plan_of_last(nn.Sequential(layers[between], HEADS[head]()))
    assert (last.action, last.reason) == ("quantize", "Conv2d is in the map")


@pytest.mark.parametrize("between", ["nothing", "sigmoid"])
def test_the_last_convolution_without_a_head(between):
    last = plan_of_last({"nothing": nn.Identity(), "sigmoid": nn.Sigmoid()}[between])
    assert last.action == "float"
    assert "R-OUT" in last.reason


def list_texts(node):
    """The texts in a set, tuple, list or dict, as keys, or in a text that is split."""
    if isinstance(node, ast.Set | ast.Tuple | ast.List):
        items = node.elts
    elif isinstance(node, ast.Dict):
        items = node.keys
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = node.func.value
        is_split = node.func.attr == "split" and isinstance(text, ast.Constant)
        return str(text.value).split() if is_split else []
    else:
        return []
    return [item.value for item in items if isinstance(item, ast.Constant)]


def is_literal_type(node):
    """Whether a node is `Literal[...]`: the options of a parameter, which may have the names of functions."""
    return isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal"


def find_function_names(source):
    """Line -> two or more names of torch functions in one literal."""
    lines = {}
    nodes = list(ast.walk(ast.parse(source)))
    options = [node.slice for node in nodes if is_literal_type(node)]
    for node in nodes:
        if node in options:
            continue
        names = {text for text in list_texts(node) if text in FUNCTIONS or text in ALIASES}
        if len(names) > 1:
            lines[node.lineno] = sorted(names)
    return lines


def test_the_table_is_the_only_list_of_torch_functions():
    package = Path(qdq.__file__).parent
    faults = []
    for path in sorted(package.rglob("*.py")):
        if path == package / "functions.py":
            continue
        for line, names in find_function_names(path.read_text(encoding="utf-8")).items():
            faults.append(f"{path.relative_to(package.parent)}:{line}: {', '.join(names)}")
    assert not faults, "derive these from the table in qdq/functions.py:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "source",
    [
        "X = {'relu', 'conv2d'}",
        "if name in ('linear', 'matmul'): pass",
        "X = ['add',\n 'mul']",
        "X = {'add': 1, 'mul': 2}",
        "X = frozenset('relu gelu'.split())",
        "X = dict.fromkeys(('hsplit', 'concat'))",
    ],
)
def test_a_second_list_of_torch_functions_is_seen(source):
    assert list(find_function_names(source)) == [1]


@pytest.mark.parametrize(
    "source",
    ["x = name == 'relu'", "X = {'relu', 'no function'}", "y = text.split()", "X = (1, 'mul')"],
)
def test_a_single_name_of_a_torch_function_is_no_list(source):
    assert not find_function_names(source)


@pytest.mark.parametrize("spelling", [*PRODUCTS, *AVERAGED, *SMALLER])
def test_a_convolution_that_is_multiplied_or_averaged_is_not_the_last(spelling):
    tail = {**PRODUCTS, **AVERAGED, **SMALLER}[spelling]
    assert "R-OUT" not in reason_of_last(tail)


@pytest.mark.parametrize("spelling", [*MAXIMA, *ACTIVATED])
def test_a_convolution_behind_which_only_values_are_chosen_is_the_last(spelling):
    assert "R-OUT" in reason_of_last({**MAXIMA, **ACTIVATED}[spelling])


@pytest.mark.parametrize("spelling", [name for name in AVERAGED if "3d" not in name])
def test_a_classifier_of_one_pixel_is_not_the_last_convolution(spelling):
    pool = AVERAGED[spelling]
    head = nn.Conv2d(32, 16, 1)

    class Pooled(Tailed):
        def forward(self, x):
            y = torch.relu(pool(super().forward(x)))
            return head(y.reshape(len(x), 32, -1, 1))

    plan = plan_swap(Pooled(nn.Identity()).eval(), torch.randn(2, 16, 8, 8))
    assert not [module.name for module in plan.modules if "R-OUT" in module.reason]


def trace_of(tail):
    return trace_forward(Tailed(tail).eval(), torch.randn(2, 16, 8, 8))


@pytest.mark.parametrize("spelling", [*PRODUCTS, *SMALLER])
def test_every_product_is_recorded(spelling):
    calls = [call.function for call in trace_of({**PRODUCTS, **SMALLER}[spelling]).contractions]
    assert len(calls) == 3
    assert set(calls) <= CONTRACTIONS


FACTORS = [
    "torch.mm",
    "torch.addmm",
    "torch.addmv",
    "torch.bmm",
    "torch.baddbmm",
    "torch.addbmm",
    "torch.mv",
    "@",
]


@pytest.mark.parametrize(
    "spelling", [*FACTORS, "torch.einsum", "torch.tensordot", "torch.linalg.multi_dot"]
)
def test_an_included_product_quantizes_all_its_factors_and_no_bias(spelling):
    model = Tailed(PRODUCTS[spelling]).eval()
    x = torch.randn(2, 16, 8, 8)
    swap_modules(model, x)
    function = trace_of(PRODUCTS[spelling]).contractions[-1].function
    plan = rewire_operations(model, x, include=[function])
    (call,) = [operation for operation in plan.operations if operation.function == function]
    expected = (1, 2) if function.startswith(("add", "badd")) else (0, 1)
    assert call.operands == ((0, 1, 2) if "multi_dot" in spelling else expected)
    assert torch.isfinite(model(x)).all()


WIDE = torch.randn(32, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("product", "operands", "axis"),
    [
        (lambda x: rows(x) @ WIDE, (0, 1), 1),
        (lambda x: rows(x).mm(WIDE), (0, 1), 1),
        (lambda x: torch.addmm(torch.zeros(24), rows(x), WIDE), (1, 2), 1),
        (lambda x: torch.einsum("nchw,cd->ndhw", x, WIDE), (0, 1), 1),
        (lambda x: torch.einsum("...c,dc->...d", rows(x), WIDE.T), (0, 1), 0),
        (lambda x: F.linear(rows(x), WIDE.T), (0, 1), 0),
    ],
)
def test_a_product_with_a_matrix_is_quantized_as_a_linear_layer_is(product, operands, axis):
    model = Tailed(product).eval()
    x = torch.randn(2, 16, 8, 8)
    swap_modules(model, x)
    call = rewire_operations(model, x).operations[-1]
    assert call.action == "quantize"
    assert call.operands == operands
    quantizer = getattr(model, f"_{call.function}_input{operands[1]}_quantizer")
    assert quantizer.axis == axis
    assert getattr(model, f"_{call.function}_input{operands[0]}_quantizer").axis is None


def test_a_small_product_with_a_matrix_stays_float_as_a_linear_layer_does():
    model = Tailed(PRODUCTS["torch.addmm"]).eval()
    x = torch.randn(2, 16, 8, 8)
    swap_modules(model, x)
    assert "32 to 8 features" in rewire_operations(model, x).operations[-1].reason


@pytest.mark.parametrize(
    "product",
    [
        PRODUCTS["torch.mv"],
        PRODUCTS["torch.inner"],
        lambda x: MATRIX.T @ batch_of_rows(x).mT,
        lambda x: torch.einsum("nchw,ecd->nedhw", x, SQUARE[None]),
    ],
)
def test_another_product_with_a_weight_says_so(product):
    model = Tailed(product).eval()
    x = torch.randn(2, 16, 8, 8)
    swap_modules(model, x)
    reason = rewire_operations(model, x).operations[-1].reason
    assert "product with a weight" in reason


@pytest.mark.parametrize(
    "product", [torch.mm, torch.matmul, lambda a, b: torch.einsum("ij,jk->ik", a, b), torch.inner]
)
def test_a_product_of_two_activations_is_no_missed_weight(product):
    plan = plan_swap(
        Tailed(lambda x: product(x[0, :, 0], x[1, :, 0].T.contiguous().T)).eval(),
        torch.zeros(2, 16, 36, 36),
    )
    assert not plan.of("missed")


def test_operators_methods_and_synonyms_have_one_name():
    x = torch.ones(2, 2)
    assert name_function(torch.concat) == name_function(torch.concatenate) == "cat"
    assert (
        name_function(torch.Tensor.__matmul__)
        == name_function(torch.Tensor.__rmatmul__)
        == "matmul"
    )
    assert name_function(torch.Tensor.__imul__) == name_function(torch.multiply) == "mul"
    assert name_function(torch.Tensor.T.__get__) == "T"
    assert name_function(type(x).clip_) == name_function(torch.clamp) == "clamp"
    assert name_function(torch.ops.aten.mm.default) == "mm"


ARGUMENTS = {
    "prelu": lambda x: (torch.full((4,), 0.3, dtype=x.dtype),),
    "avg_pool": lambda x: (2,),
    "adaptive_": lambda x: (1,),
    "lp_pool": lambda x: (2, 2),
    "max_pool": lambda x: (2,),
    "alpha_dropout": lambda x: (0.5, False),
    "dropout": lambda x: (0.5, False),
    "feature": lambda x: (0.5, False),
}


def call(name, x):
    torch.manual_seed(0)
    function = next(
        attribute
        for space in (F, torch, torch.Tensor)
        if (attribute := getattr(space, name, None)) is not None
    )
    if not callable(function):
        return x.data
    extra = next((make(x) for part, make in ARGUMENTS.items() if part in name), ())
    result = function(x, *extra)
    return result[0] if isinstance(result, tuple) else result


def input_of(name):
    dims = {"1": (2, 4, 8), "3": (2, 4, 8, 8, 8)}.get(
        name[name.find("pool") + 4 : name.find("pool") + 5], (2, 4, 8, 8)
    )
    dims = (2, 4, 8) if name == "dropout1d" else (2, 4, 4, 8, 8) if name == "dropout3d" else dims
    return torch.randn(dims, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(HOMOGENEOUS))
def test_homogeneous_functions_commute_with_positive_factors(name):
    x = input_of(name)
    torch.testing.assert_close(call(name, 3.7 * x), 3.7 * call(name, x))


@pytest.mark.parametrize("name", sorted(IDENTITIES))
def test_identities_change_nothing_in_evaluation(name):
    assert torch.equal(call(name, x := input_of(name)), x)


@pytest.mark.parametrize("name", sorted(MAX_POOLINGS))
def test_max_poolings_choose_among_the_values(name):
    x = input_of(name)
    assert torch.isin(call(name, x), x).all()


@pytest.mark.parametrize("spelling", [*ACTIVATED])
def test_what_stands_behind_an_activation_reads_the_convolution(spelling):
    """Pooling in front of an int8 layer is quantized, whatever activation stands between them."""

    class Pooled(Tailed):
        def forward(self, x):
            return self.last(self.tail(F.avg_pool2d(self.first(x), 2)))

    model = Pooled(ACTIVATED[spelling]).eval()
    x = torch.randn(2, 16, 12, 12)
    swap_modules(model, x)
    assert "avg_pool2d" in [call.name for call in rewire_operations(model, x).of("quantize")]


def test_the_sets():
    kinds = {kind: names_of(kind) for kind in get_args(Kind)}
    assert all(kinds.values())
    assert sorted(WEIGHTED) == ["conv1d", "conv2d", "conv3d", "linear"]
    assert AVERAGES.isdisjoint(MAX_POOLINGS)
    assert COPIES.isdisjoint(CONTRACTIONS)
    assert all(name == name.strip("_") for name in FUNCTIONS)
