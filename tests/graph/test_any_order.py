"""Random small graphs: whatever the order of the passes, the numbers stay to the bit."""

import random

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import compute, ops, read
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qdq.graph.fold_casts import FoldCasts
from qdq.graph.fold_pad import FoldPad
from qdq.graph.fold_weights import FoldWeights
from qdq.graph.merge_constants import MergeConstants
from qdq.graph.merge_pairs import MergePairs
from qdq.graph.move_quantize import MoveQuantizeBeforeCopies
from qdq.graph.passes import run_passes
from qdq.graph.remove_identities import RemoveIdentities
from qdq.graph.transpose_keys import TransposeKeys

PASSES = [
    FoldCasts,
    FoldPad,
    FoldWeights,
    MergeConstants,
    MergePairs,
    MoveQuantizeBeforeCopies,
    RemoveIdentities,
    TransposeKeys,
]
# Each makes a value of shape [1,4,6,6] from one or two of that shape; {n} is the number of the step.
STEPS = [
    "v{n} = Neg ({a})",
    "v{n} = Relu ({a})",
    "v{n} = Add ({a}, {b})",
    "v{n} = Identity ({a})",
    "v{n} = Transpose <perm = [0, 1, 3, 2]> ({a})",
    "v{n} = Reshape ({a}, same)",
    "v{n} = Gather <axis = 1> ({a}, order)",
    "v{n} = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({a})",
    "p{n} = Pad ({a}, frame) v{n} = Conv <kernel_shape = [3, 3]> (p{n}, w, b)",
    "p{n} = Pad ({a}, frame, zero) q{n} = QuantizeLinear (p{n}, s0, o) d{n} = DequantizeLinear (q{n}, s0, o)"
    " v{n} = Conv <kernel_shape = [3, 3]> (d{n}, w, b)",
    "l{n}, r{n} = Split <axis = 1, num_outputs = 2> ({a}) q{n} = QuantizeLinear (l{n}, s1, o)"
    " t{n} = QuantizeLinear (r{n}, s1, o) d{n} = DequantizeLinear (q{n}, s1, o)"
    " u{n} = DequantizeLinear (t{n}, s1, o) v{n} = Concat <axis = 1> (d{n}, u{n})",
    "t{n} = Transpose <perm = [0, 1, 3, 2]> ({a}) v{n} = MatMul ({b}, t{n})",
    "h{n} = Cast <to = 10> ({a}) v{n} = Cast <to = 1> (h{n})",
    "h{n} = Cast <to = 10> ({a}) f{n} = Cast <to = 1> (h{n}) q{n} = QuantizeLinear (f{n}, s2, o)"
    " d{n} = DequantizeLinear (q{n}, s2, o) e{n} = Cast <to = 10> (d{n}) v{n} = Cast <to = 1> (e{n})",
]
PAIRS = [
    f"q{{n}} = QuantizeLinear ({{a}}, s{scale}, o) v{{n}} = DequantizeLinear (q{{n}}, s{scale}, o)"
    for scale in (0, 1, 2)
]
STEPS += 3 * PAIRS  # pairs meet more often then
NUMBERS = ", ".join(f"{number:.4f}" for number in np.random.default_rng(0).normal(size=144))
GRAPH = f"""
g (float[1,4,6,6] x) => (%s)
<float s0 = {{0.05}}, float s1 = {{0.07}}, float s2 = {{0.0625}}, int8 o = {{0}}, float zero = {{0}},
 int64[4] same = {{1, 4, 6, 6}}, int64[4] order = {{2, 0, 3, 1}}, int64[8] frame = {{0, 0, 1, 1, 0, 0, 1, 1}},
 float[4,4,3,3] w = {{{NUMBERS}}}, float[4] b = {{1, 2, 3, 4}}>
{{ %s }}
"""


def draw(seed):
    """A graph of 12 steps, whose last value and some others are outputs, and the passes to run on it."""
    choose = random.Random(seed)  # noqa: S311
    body = []
    values = ["x"]
    for number in range(12):
        recent_values = values[-4:]
        a = choose.choice(recent_values)
        b = choose.choice(recent_values)
        body.append(choose.choice(STEPS).format(n=number, a=a, b=b))
        values.append(f"v{number}")

    inner_values = values[1:-1]
    outputs = [value for value in inner_values if choose.random() < 0.15]
    outputs.append(values[-1])
    passes = [graph_pass() for graph_pass in choose.choices(PASSES, k=8)]
    return GRAPH % (", ".join(outputs), "\n".join(body)), passes


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_numbers_stay(start):
    moved = 0
    for seed in range(start, start + 50):
        text, passes = draw(seed)
        model = read(text)
        RemoveUnusedNodesPass()(model)
        expected = compute(model, seed)
        original_ops = ops(model)
        run_passes(model, passes)
        outputs = compute(model, seed)
        assert list(expected) == list(outputs)
        for name in expected:
            assert expected[name].tobytes() == outputs[name].tobytes(), (
                f"seed {seed}, output {name}"
            )
        moved += ops(model) != original_ops
    assert moved > 25  # the graphs give the passes something to do


@pytest.mark.parametrize("seed", range(20))
def test_repeated_they_come_to_rest(seed):
    text, _ = draw(seed)
    model = read(text)
    RemoveUnusedNodesPass()(model)
    for _ in range(20):
        modified = [graph_pass()(model).modified for graph_pass in PASSES]
        if not any(modified):
            break
    else:
        pytest.fail("the passes undo one another")
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    run_passes(model, [graph_pass() for graph_pass in PASSES])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once
