"""The work of each stage grows with the layers, not with their square: instructions are counted, not seconds."""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from qdq.analyze.cost import load_times
from qdq.dataflow import Dataflow
from qdq.forward import ForwardTrace, Operation
from qdq.graph.coverage import Coverage
from qdq.report.layers import describe_layers
from qdq.units import find_all_quantizers, find_units, group_units, match_precisions

BLOCKS = (5, 10, 20)
COUNTED = (str(Path(qdq.__file__).parent), str(Path(nn.Module.__call__.__code__.co_filename)))
NO_BUILD = qdq.BuildReport(
    onnx=None,
    engine=None,
    engine_bytes=0,
    backend="rtx",
    backend_version="",
    sm=89,
    seconds=0.0,
    profiles={},
    layers=[],
    coverage=Coverage(()),
    attention=[],
    trtexec={},
    warnings=[],
)


class Block(nn.Module):
    """A residual block with a pooling before its convolutions, and a product out of reach behind them."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(1)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.mix = nn.Parameter(torch.randn(16, 16, 1, 1) / 4)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(self.pool(x))))
        y = torch.relu(x + self.norm2(self.conv2(y)))
        return nn.functional.conv_transpose2d(y, self.mix)


def count_instructions(function: Callable[[], object]) -> tuple[int, object]:
    """Instructions of Python that run in qdq and in torch's modules, and what the function returns."""
    count = 0

    def count_one(frame, event, argument):
        nonlocal count
        count += event == "opcode"
        return count_one

    def enter(frame, event, argument):
        if not frame.f_code.co_filename.startswith(COUNTED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return count_one

    tracer = sys.gettrace()
    sys.settrace(enter)
    try:
        result = function()
    finally:
        sys.settrace(tracer)
    return count, result


def make_model(blocks: int) -> tuple[nn.Module, torch.Tensor]:
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *(Block() for _ in range(blocks)), *tail).eval()
    return model, torch.randn(1, 3, 5, 5)


def count_stages(blocks: int) -> dict[str, int]:
    torch.manual_seed(0)
    model, x = make_model(blocks)
    counts = {}

    def run(stage, function):
        counts[stage], result = count_instructions(function)
        return result

    run("fold", lambda: qdq.fold_batchnorm(model, x))
    plan = run("swap", lambda: qdq.swap_modules(model, x))
    rewired = run("rewire", lambda: qdq.rewire_operations(model, x))
    ranges = qdq.calibrate_model(model, [x])
    run("find units", lambda: find_units(model, x))
    run("find quantizers", lambda: find_all_quantizers(model, x))
    analysis = run(
        "analyze",
        lambda: qdq.analyze_layers(
            model, [x], confirm=1, max_float_layers=1, max_float_share=0.9, gpu="a100"
        ),
    )
    run(
        "report",
        lambda: describe_layers(
            model,
            x,
            plan=plan,
            rewired=rewired,
            ranges=ranges,
            analysis=analysis,
            build=NO_BUILD,
            statistics=None,
        ),
    )
    return counts


@pytest.fixture(scope="module")
def counts():
    return [count_stages(blocks) for blocks in BLOCKS]


STAGES = ["fold", "swap", "rewire", "find units", "find quantizers", "analyze", "report"]


@pytest.mark.parametrize("stage", STAGES)
def test_instructions_grow_with_the_layers(counts, stage):
    """From n to 2n and from 2n to 4n layers: twice as much is added in the second step, and four times if quadratic."""
    first, second = (later[stage] - earlier[stage] for earlier, later in pairwise(counts))
    assert second < 2.1 * first


def count_walks(model: nn.Module, function: Callable[[], object]) -> int:
    """How many times a function goes through all modules of a model."""
    walk = nn.Module.named_modules
    count = 0

    def named_modules(self, memo=None, *args, **kwargs):
        nonlocal count
        count += self is model and memo is None  # torch hands a memo to the walks inside a walk
        return walk(self, memo, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", named_modules)
        function()
    return count


def count_walks_of_stages(blocks: int) -> dict[str, int]:
    torch.manual_seed(0)
    model, x = make_model(blocks)
    layers = [f"{number}.conv1" for number in range(1, blocks + 1)]
    precisions = dict.fromkeys(layers, "float")
    stages = {
        "fold": lambda: qdq.fold_batchnorm(model, x),
        "plan": lambda: qdq.plan_swap(model, x),
        "swap": lambda: qdq.swap_modules(model, x),
        "rewire": lambda: qdq.rewire_operations(model, x),
        "calibrate": lambda: qdq.calibrate_model(model, [x]),
        "find units": lambda: find_units(model, x),
        "find quantizers": lambda: find_all_quantizers(model, x),
        "match": lambda: match_precisions(model, layers, precisions),
        "group": lambda: group_units(model, find_units(model, x), layers),
        "restore": lambda: qdq.restore_modules(model),
    }
    return {stage: count_walks(model, function) for stage, function in stages.items()}


def test_walks_over_all_modules_do_not_grow_with_the_layers():
    few, many = count_walks_of_stages(5), count_walks_of_stages(20)
    assert few == many
    # One of them only looks at the first parameter, for the device, and one freezes the parameters to count MACs.
    assert few["plan"] <= 6
    assert few["rewire"] <= 7
    assert few["find units"] <= 6
    assert few["match"] <= 2  # names of layers, and names of quantizers that are on


def test_times_of_a_profile_are_looked_up(tmp_path):
    def count(layers):
        names = [f"layer{number}" for number in range(layers)] + [
            f"block{number}.matmul" for number in range(layers)
        ]
        kernels = [{"name": f"{name}/Conv", "averageMs": 1.0} for name in names[:layers]]
        kernels += [{"name": f"block{number}/MatMul", "averageMs": 1.0} for number in range(layers)]
        (file := tmp_path / "profile.json").write_text(str(kernels).replace("'", '"'))
        modules = names[:layers]
        number, times = count_instructions(lambda: load_times(file, names, modules))
        assert len(times) == 2 * layers
        return number

    few, more, most = map(count, (20, 40, 80))
    assert most - more < 2.1 * (more - few)


def make_graph(size: int, seed: int) -> Dataflow:
    """Tensor 1 is the input; every other one comes from one or two earlier ones, some of which are constants."""
    draw = np.random.default_rng(seed)
    operations = []
    for value in range(2, size):
        count = min(draw.choice((1, 1, 2)), value - 1)
        sources = tuple(map(int, draw.choice(np.arange(1, value), count, replace=False)))
        inputs = sources if draw.random() > 0.1 else (size + value,)
        operations.append(Operation("", "mul", value, inputs, (value,), {}))
    return Dataflow(ForwardTrace(operations=operations, inputs=(1,), outputs=(size - 1,)))


def find_distances(flow: Dataflow, value: int) -> dict[int, int]:
    """All tensors that one was computed from, by repeated relaxation."""
    makers = {operation.outputs[0]: operation.inputs for operation in flow.operations}
    distances = {value: 0}
    for _ in range(len(makers)):
        for number, distance in list(distances.items()):
            for source in makers.get(number, ()):
                if flow.is_computed(source):
                    distances[source] = min(distances.get(source, sys.maxsize), distance + 1)
    return distances


@pytest.mark.parametrize("seed", range(8))
def test_the_nearest_fork_of_any_two_tensors(seed):
    flow = make_graph(14, seed)
    for first in range(1, 14):
        for second in range(1, 14):
            to_first, to_second = find_distances(flow, first), find_distances(flow, second)
            common = to_first.keys() & to_second.keys()
            fork = min(
                common, key=lambda value: (to_first[value] + to_second[value], value), default=None
            )
            expected = None if fork is None else (fork, to_first[fork], to_second[fork])
            assert flow.find_fork(first, second) == expected
