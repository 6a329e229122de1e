"""Lowering: ONNX's checker accepts what comes out, and ONNX Runtime computes the same numbers, to the bit."""

import copy
import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import defs
from onnx_ir.passes.common import ShapeInferencePass
from torch import nn

from qdq import ArgumentError, ExportError, calibrate_model, export_onnx, predict, swap_modules
from qdq.graph.coverage import count_qdq
from qdq.graph.opset import HIGHEST, LOWEST, LowerOpset
from qdq.graph.opset_rules import RULES

OLDER = range(LOWEST, HIGHEST)
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
X = "float[2,6,4] x"
IMAGE = "float[1,2,6,6] x"
OTHER = "float[2,6,4] z"
KEEP = "float[2,6,4] y"


def read(text, opset=HIGHEST):
    """`(inputs) => (outputs) <constants> { nodes }` as a model, with types of inner values as torch has them."""
    return ShapeInferencePass()(
        ir.from_onnx_text(f'<ir_version: 9, opset_import: ["": {opset}]> g {text}')
    ).model


def run(model, named=2):
    """Outputs in ONNX Runtime, operator by operator, on seeded inputs; named sizes are `named`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else named for size in value.shape]
        numbers = random.uniform(-4, 4, shape)
        if value.name == "positive":
            numbers = np.abs(numbers) + 0.5
        feeds[value.name] = numbers.astype(value.dtype.numpy())
    return session.run(None, feeds)


def assert_same_below(model, target):
    """Lower a copy, check it with ONNX, and compare each number with those of the model; returns the copy."""
    expected = run(model)
    lowered = ir.from_proto(copy.deepcopy(ir.to_proto(model)))
    assert LowerOpset(target)(lowered).modified
    assert lowered.opset_imports[""] == target
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
    for output, expected_output in zip(run(lowered), expected, strict=True):
        assert output.dtype == expected_output.dtype
        np.testing.assert_array_equal(output, expected_output, strict=True)
    return lowered


def recurrent(op_type, gates):
    return (
        f"(float[5,2,3] x, float[1,{4 * gates},3] w, float[1,{4 * gates},4] r) => (float[5,1,2,4] y)"
        f"{{ y = {op_type} <hidden_size = 4, layout = 0> (x, w, r) }}"
    )


def reductions():
    """Each operator once, and all forms of axes on one of them."""
    for kind in REDUCTIONS:
        source = "float[2,6,4] positive" if kind.startswith("Log") else X
        name = source.split()[1]
        yield (
            f"Reduce{kind}",
            f"({source}) => (float[2,1,4] y) <int64[1] a = {{1}}> {{ y = Reduce{kind} ({name}, a) }}",
        )
    for name, axes, attributes, out in (
        ("keepdims", "{1}", "keepdims = 0", "2,4"),
        ("negative", "{-1}", "keepdims = 1", "2,6,1"),
        ("two", "{0, -1}", "keepdims = 0", "6"),
        ("empty", "{}", "keepdims = 1", "1,1,1"),
        ("noop", "{2}", "noop_with_empty_axes = 1", "2,6,1"),
    ):
        size = axes.count(",") + 1 if axes != "{}" else 0
        yield (
            f"ReduceMean {name}",
            f"({X}) => (float[{out}] y) <int64[{size}] a = {axes}> {{ y = ReduceMean <{attributes}> (x, a) }}",
        )
    yield "ReduceMean all", f"({X}) => (float[1,1,1] y) {{ y = ReduceMean (x) }}"
    yield (
        "ReduceMean node",
        f"({X}) => (float[2,1,4] y) {{ a = Constant <value_ints = [1]> () y = ReduceMean (x, a) }}",
    )
    yield (
        "ReduceMean shared",
        f"({X}) => (float[2,1,4] y) <int64[1] a = {{1}}>"
        "{ m = ReduceMean (x, a) l = ReduceMax (x, a) s = ReduceSum (x, a) t = Add (m, l) y = Add (t, s) }",
    )


def shapes():
    for name, attributes, size in (
        ("default", "", 3),
        ("start 0", "<start = 0>", 3),
        ("start", "<start = 1>", 2),
        ("end", "<end = 2>", 2),
        ("both", "<start = 0, end = 1>", 1),
        ("negative", "<start = -2, end = -1>", 1),
        ("far", "<start = -9, end = 9>", 3),
        ("none", "<start = 2, end = 1>", 0),
    ):
        yield (
            f"Shape {name}",
            f"(float[N,6,4] x) => (int64[{size}] y) {{ y = Shape {attributes} (x) }}",
        )


# operator and form -> a model at opset 18
CASES = {
    **{
        op: f"({X}, {OTHER}) => ({KEEP}) {{ y = {op} (x, z) }}"
        for op in ("Add", "Sub", "Mul", "Div", "PRelu")
    },
    **{
        op: f"({X}) => ({KEEP}) {{ y = {op} (x) }}"
        for op in ("Relu", "LeakyRelu", "Identity", "HardSwish", "Mish")
    },
    **{
        op: f"({X}, {OTHER}) => (bool[2,6,4] y) {{ y = {op} (x, z) }}"
        for op in ("GreaterOrEqual", "LessOrEqual")
    },
    **dict(reductions()),
    **dict(shapes()),
    "Pow": f"(float[2,6,4] positive, {OTHER}) => ({KEEP}) {{ y = Pow (positive, z) }}",
    "Where": f"({X}, {OTHER}) => ({KEEP}) {{ c = Greater (x, z) y = Where (c, x, z) }}",
    "CumSum": f"({X}) => ({KEEP}) <int64 a = {{1}}> {{ y = CumSum <reverse = 1> (x, a) }}",
    "float16": "(float16[2,6,4] x, float16[2,6,4] z) => (float16[2,6,4] y) { y = Add (x, z) }",
    "int64": "(int64[2,6,4] x, int64[2,6,4] z) => (int64[2,6,4] y) { y = Mul (x, z) }",
    "BatchNormalization": f"""({X}, float[6] s, float[6] b, float[6] m, float[6] positive) => ({KEEP})
        {{ y = BatchNormalization <epsilon = 0.01, momentum = 0.8, training_mode = 0> (x, s, b, m, positive) }}""",
    "Reshape": f"({X}) => (float[4,12] y) <int64[2] s = {{-1, 12}}> {{ y = Reshape <allowzero = 1> (x, s) }}",
    "Reshape 0": f"({X}) => (float[2,24] y) <int64[2] s = {{0, -1}}> {{ y = Reshape <allowzero = 0> (x, s) }}",
    "Reshape computed": """(float[N,6,4] x) => (float[N,2,12] y) <int64[2] tail = {2, 12}> {
        n = Shape <end = 1> (x)
        s = Concat <axis = 0> (n, tail)
        y = Reshape <allowzero = 1> (x, s)
    }""",
    "Split": f"({X}) => (float[2,3,4] y, float[2,3,4] z) {{ y, z = Split <axis = 1, num_outputs = 2> (x) }}",
    "Split negative": f"({X}) => (float[2,6,2] a, float[2,6,2] b) {{ a, b = Split <axis=-1, num_outputs=2> (x) }}",
    "Split rest": "(float[7,N] x) => (float[3,N] a, float[3,N] b, float[1,N] c) {a, b, c = Split <num_outputs=3> (x)}",
    "Split sizes": f"({X}) => (float[2,5,4] y, float[2,1,4] z) <int64[2] s = {{5,1}}> {{y, z = Split <axis=1> (x, s)}}",
    "Resize scales": f"""({IMAGE}) => (float[1,2,12,15] y) <float[4] s = {{1, 1, 2, 2.5}}>
        {{ y = Resize <mode = "linear", antialias = 0, keep_aspect_ratio_policy = "stretch"> (x, , s) }}""",
    "Resize sizes": f"""({IMAGE}) => (float[1,2,9,4] y) <int64[4] s = {{1, 2, 9, 4}}>
        {{ y = Resize <mode = "cubic", coordinate_transformation_mode = "pytorch_half_pixel", cubic_coeff_a = -0.75>
           (x, , , s) }}""",
    "Resize nearest": f"""({IMAGE}) => (float[1,2,12,12] y) <float[4] s = {{1, 1, 2, 2}}>
        {{ y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
           (x, , s) }}""",
    "Pad": f"({IMAGE}) => (float[1,2,9,7] y) <int64[8] p={{0,0,1,-1,0,0,2,2}}, float v={{3}}> {{ y = Pad (x, p, v) }}",
    "Pad reflect": f"""({IMAGE}) => (float[1,2,8,8] y) <int64[8] p = {{0,0,1,1,0,0,1,1}}>
        {{ y = Pad <mode = "reflect"> (x, p, , ) }}""",
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "RNN": recurrent("RNN", 1),
    "ScatterND": f"""({X}, float[2,4] u) => ({KEEP}) <int64[2,2] i = {{0, 1, 1, 5}}>
        {{ y = ScatterND <reduction = "none"> (x, i, u) }}""",
    "ScatterElements": f"""({X}, float[1,2,1] u) => ({KEEP}) <int64[1,2,1] i = {{5, 1}}>
        {{ y = ScatterElements <axis = 1> (x, i, u) }}""",
    "LpPool": f"""({IMAGE}) => (float[1,2,3,3] y)
        {{ y = LpPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 0, dilations = [1, 1]> (x) }}""",
    "RoiAlign": f"""({IMAGE}) => (float[1,2,3,3] y) <float[1,4] r = {{0.5, 1, 4, 5}}, int64[1] b = {{0}}> {{
        y = RoiAlign <output_height = 3, output_width = 3, coordinate_transformation_mode = "output_half_pixel">
            (x, r, b)
    }}""",
    "If": f"""({X}) => ({KEEP}) <int64[3] a = {{0, 1, 2}}, float zero = {{0}}> {{
        m = ReduceMean <keepdims = 0> (x, a)
        c = Less (m, zero)
        y = If (c) <
            then_branch = t () => (float[2,6,4] u) {{ h = ReduceMax (x, a) u = Sub (x, h) }},
            else_branch = e () => (float[2,6,4] v) {{ v = HardSwish (x) }}
        >
    }}""",
    "Loop": f"""({X}) => ({KEEP}) <int64 n = {{3}}, bool true = {{1}}> {{
        y = Loop (n, true, x) <body = b (int64 i, bool c, float[2,6,4] v) => (bool d, float[2,6,4] w)
            {{ d = Identity (c) w = HardSwish (v) }}>
    }}""",
    "Scan": """(float[4] s, float[6,4] x) => (float[4] t, float[6,4] y) {
        t, y = Scan <num_scan_inputs = 1, body = b (float[4] p, float[4] q) => (float[4] r, float[4] o)
            { r = Add (p, q) o = Relu (r) }> (s, x)
    }""",
}


@pytest.mark.parametrize("target", OLDER)
@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case, target):
    lowered = assert_same_below(read(CASES[case]), target)
    read_by = {value.name for node in lowered.graph.all_nodes() for value in node.inputs if value}
    assert set(lowered.graph.initializers) <= read_by


@pytest.mark.parametrize("target", [17, 18])
def test_a_file_with_qdq_from_19(target):
    """What an export writes by default, for TensorRT 8.6: the same numbers, not one code differs."""
    model = read(
        f"""({IMAGE}) => (float[1,2,3,3] y) <float s = {{0.03125}}, int8 z = {{0}}> {{
            q = QuantizeLinear <saturate = 1> (x, s, z)
            d = DequantizeLinear (q, s, z)
            p = AveragePool <kernel_shape = [2, 2], strides = [2, 2], dilations = [1, 1]> (d)
            c = Cast <to = 11, saturate = 1> (p)
            y = Cast <to = 1> (c)
        }}"""
    )
    assert_same_below(model, target)


def test_reshape_of_an_empty_batch():
    """The one size that allowzero is about: what is copied instead is the same 0."""
    model = read(CASES["Reshape computed"])
    assert run(model, named=0)[0].shape == (0, 2, 12)
    assert run(assert_same_below(model, 13), named=0)[0].shape == (0, 2, 12)


def test_rules_cover_all_that_onnx_changed():
    """Every operator that is of 13 or older and was changed since has a rule for each change; some new ones too."""
    changes = {
        (schema.name, schema.since_version)
        for schema in defs.get_all_schemas_with_history()
        if schema.domain == ""
        and LOWEST < schema.since_version <= HIGHEST
        and defs.has(schema.name, LOWEST, "")
    }
    assert set(RULES) - changes == {("HardSwish", 14), ("Mish", 18)}
    assert changes - set(RULES) == set()


# what it is -> (model at opset 18, what the message says of opset 13, lowest opset that can)
REFUSED = {
    "LayerNormalization": (
        f"({X}, float[4] s) => ({KEEP}) {{ y = LayerNormalization (x, s) }}",
        "LayerNormalization (new in opset 17)",
        17,
    ),
    "Trilu": (f"({X}) => ({KEEP}) {{ y = Trilu (x) }}", "Trilu (new in opset 14)", 14),
    "BitwiseAnd": (
        "(uint8[2] x, uint8[2] z) => (uint8[2] y) { y = BitwiseAnd (x, z) }",
        "BitwiseAnd (new in opset 18)",
        18,
    ),
    "types": (
        "(int8[2] x, int8[2] z) => (int8[2] y) { y = Add (x, z) }",
        "Add (tensor(int8) came later)",
        14,
    ),
    "bfloat16": (
        "(bool[2] c, bfloat16[2] x, bfloat16[2] z) => (bfloat16[2] y) { y = Where (c, x, z) }",
        "Where (tensor(bfloat16) came later)",
        16,
    ),
    "CumSum float16": (
        "(float16[2] x) => (float16[2] y) <int64 a = {0}> { y = CumSum (x, a) }",
        "CumSum (tensor(float16) came later)",
        14,
    ),
    "BatchNormalization of two types": (
        "(float16[2,6] x, float[6] s, float[6] b, float[6] m, float[6] v) => (float16[2,6] y)"
        "{ y = BatchNormalization (x, s, b, m, v) }",
        "BatchNormalization (tensor(float16) together with tensor(float) came later)",
        15,
    ),
    "BatchNormalization in training": (
        f"({X}, float[6] s, float[6] b, float[6] m, float[6] v) => ({KEEP}, float[6] n, float[6] w)"
        "{ y, n, w = BatchNormalization <training_mode = 1> (x, s, b, m, v) }",
        "BatchNormalization (training_mode=1)",
        14,
    ),
    "Reshape to 0": (
        "(float[0,3] x) => (float[0,5] y) <int64[2] s = {0, 5}> { y = Reshape <allowzero = 1> (x, s) }",
        "Reshape (allowzero=1 with a shape that may contain 0)",
        14,
    ),
    "Reshape to an input": (
        f"({X}, int64[2] s) => (float[A,B] y) {{ y = Reshape <allowzero = 1> (x, s) }}",
        "Reshape (allowzero=1 with a shape that may contain 0)",
        14,
    ),
    "Reshape that moves the batch": (
        """(float[N,6] x) => (float[6,N] y) <int64[1] six = {6}> {
            n = Shape <end = 1> (x)
            s = Concat <axis = 0> (six, n)
            y = Reshape <allowzero = 1> (x, s)
        }""",
        "Reshape (allowzero=1 with a shape that may contain 0)",
        14,
    ),
    "axes that are an input": (
        f"({X}, int64[1] a) => (float[A,B,C] y) {{ y = ReduceMean (x, a) }}",
        "ReduceMean (axes that are not constant)",
        18,
    ),
    "no axes, no reduction": (
        f"({X}) => ({KEEP}) {{ y = ReduceL1 <noop_with_empty_axes = 1> (x) }}",
        "ReduceL1 (noop_with_empty_axes=1 without axes)",
        18,
    ),
    "Split of an open size": (
        "(float[N,6] x) => (float[A,6] y, float[B,6] z) { y, z = Split <num_outputs = 2> (x) }",
        "Split (num_outputs on a size that is not known)",
        18,
    ),
    "antialias": (
        f"({IMAGE}) => (float[1,2,3,3] y) <float[4] s = {{1, 1, 0.5, 0.5}}>"
        '{ y = Resize <mode = "linear", antialias = 1> (x, , s) }',
        "Resize (antialias=1)",
        18,
    ),
    "axes of Resize": (
        f"({IMAGE}) => (float[1,2,3,3] y) <float[2] s = {{0.5, 0.5}}> {{ y = Resize <axes = [2, 3]> (x, , s) }}",
        "Resize (axes=[2, 3])",
        18,
    ),
    "policy of Resize": (
        f"({IMAGE}) => (float[A,B,C,D] y) <int64[4] s = {{1, 2, 3, 3}}>"
        '{ y = Resize <keep_aspect_ratio_policy = "not_larger"> (x, , , s) }',
        "Resize (keep_aspect_ratio_policy=not_larger)",
        18,
    ),
    "axes of Pad": (
        f"({IMAGE}) => (float[1,2,8,6] y) <int64[2] p = {{1, 1}}, int64[1] a = {{2}}> {{ y = Pad (x, p, , a) }}",
        "Pad (an axes input)",
        18,
    ),
    "layout": (
        "(float[2,5,3] x, float[1,4,3] w, float[1,4,4] r) => (float[2,5,1,4] y)"
        "{ y = RNN <hidden_size = 4, layout = 1> (x, w, r) }",
        "RNN (layout=1)",
        14,
    ),
    "reduction add": (
        f"({X}, float[1,2,1] u) => ({KEEP}) <int64[1,2,1] i = {{0, 1}}>"
        '{ y = ScatterElements <reduction = "add"> (x, i, u) }',
        "ScatterElements (reduction=add)",
        16,
    ),
    "reduction max": (
        f'({X}, float[1,4] u) => ({KEEP}) <int64[1,2] i = {{0, 1}}> {{ y = ScatterND <reduction = "max"> (x, i, u) }}',
        "ScatterND (reduction=max)",
        18,
    ),
    "dilations": (
        f"({IMAGE}) => (float[1,2,4,4] y) {{ y = LpPool <kernel_shape = [2, 2], dilations = [2, 2]> (x) }}",
        "LpPool (dilations=[2, 2])",
        18,
    ),
    "RoiAlign by default": (
        f"({IMAGE}, float[1,4] r, int64[1] b) => (float[1,2,1,1] y) {{ y = RoiAlign (x, r, b) }}",
        "RoiAlign (coordinate_transformation_mode=half_pixel)",
        16,
    ),
    "saturate": (
        "(float[2] x) => (float8e4m3fn[2] y) { y = Cast <to = 17, saturate = 0> (x) }",
        "Cast (saturate=0)",
        19,
    ),
    "wrap": (
        f"({IMAGE}) => (float[1,2,6,8] y) <int64[8] p = {{0, 0, 0, 1, 0, 0, 0, 1}}>"
        '{ y = Pad <mode = "wrap"> (x, p) }',
        "Pad (mode=wrap)",
        19,
    ),
    "symmetric": (
        f"({IMAGE}) => (float[1,2,3,3] y) <float[4] s = {{1, 1, 0.5, 0.5}}>"
        '{ y = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"> (x, , s) }',
        "Resize (coordinate_transformation_mode=half_pixel_symmetric)",
        19,
    ),
    "ceil_mode": (
        f"({IMAGE}) => (float[1,2,2,2] y)"
        "{ y = AveragePool <kernel_shape = [4, 4], strides = [3, 3], ceil_mode = 1> (x) }",
        "AveragePool (ceil_mode=1)",
        19,
    ),
    "several": (
        f"({X}, float[4] s) => ({KEEP}) {{t = LayerNormalization (x, s) u = LayerNormalization (t, s) y = Trilu (u)}}",
        "LayerNormalization (new in opset 17) at node_LayerNormalization_0, node_LayerNormalization_1, Trilu (new in",
        17,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_opset_that_can(case):
    text, message, lowest = REFUSED[case]
    model = read(text)
    for number, node in enumerate(model.graph):
        node.name = f"node_{node.op_type}_{number}"
    content = ir.to_proto(model)
    with pytest.raises(
        ExportError, match=re.escape(f"opset 13 cannot express the model: {message}")
    ) as error:
        LowerOpset(13)(model)
    assert f"the lowest opset that can is {lowest}" in str(error.value)
    assert error.value.fix == f"export with opset {lowest} or above."
    assert ir.to_proto(model) == content
    if lowest > 14:
        with pytest.raises(ExportError, match=f"the lowest opset that can is {lowest}"):
            LowerOpset(lowest - 1)(model)
    if lowest < HIGHEST:
        LowerOpset(lowest)(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_reductions_of_scatter_since_16():
    model = read(f"""({X}, float[2,4] u) => ({KEEP}) <int64[2,2] i = {{0, 1, 0, 1}}>
        {{ y = ScatterND <reduction = "add"> (x, i, u) }}""")
    assert_same_below(model, 16)


def test_a_value_without_type_is_refused():
    model = ir.from_onnx_text(
        f'<ir_version: 9, opset_import: ["": 18]> g ({X}) => ({KEEP}) {{ t = Relu (x) y = Exp (t) }}'
    )
    with pytest.raises(ExportError, match="the type of t is not known"):
        LowerOpset(13)(model)


FUNCTION = """
<ir_version: 8, opset_import: ["": 18, "own": 1]>
g (float[2,3] x) => (float[2,3] y) {{ y = own.F {arguments} (x) }}
<domain: "own", opset_import: ["": 18]>
F {parameters} (a) => (b) {{ b = {body} (a) }}
"""


def test_functions():
    text = FUNCTION.format(arguments="", parameters="", body="HardSwish")
    model = ir.from_onnx_text(text)
    lowered = assert_same_below(model, 13)
    function = next(iter(lowered.functions.values()))
    assert [node.op_type for node in function] == ["HardSigmoid", "Mul"]
    assert function.opset_imports[""] == 13


def test_an_argument_of_a_function_is_refused():
    text = FUNCTION.format(
        arguments="<k = 1>", parameters="<k>", body="ReduceL1 <noop_with_empty_axes: int = @k>"
    )
    with pytest.raises(ExportError, match="noop_with_empty_axes is an argument of the function"):
        LowerOpset(13)(ir.from_onnx_text(text))


def test_models_that_need_nothing():
    model = read(f"({X}) => ({KEEP}) {{ y = HardSwish (x) }}", opset=14)
    assert not LowerOpset(17)(model).modified
    assert model.opset_imports[""] == 14
    assert LowerOpset(13)(model).modified  # from 14 as well as from 18


def test_models_above_19_are_refused():
    model = read(f"({X}) => ({KEEP}) {{ y = Gelu (x) }}", opset=20)
    with pytest.raises(
        ExportError, match=r"the model is of opset 20; only 19 and below can be lowered"
    ):
        LowerOpset(13)(model)


@pytest.mark.parametrize("target", [12, 20])
def test_targets_out_of_range(target):
    with pytest.raises(ArgumentError, match=f"target is {target}; it must be 13 to 19"):
        LowerOpset(target)


def test_names_and_origin_of_new_nodes():
    model = read(f"({X}) => ({KEEP}) {{ y = HardSwish (x) }}")
    model.graph[0].name = "act/HardSwish"
    model.graph[0].metadata_props["origin"] = "act"
    LowerOpset(13)(model)
    assert [node.name for node in model.graph] == ["act/HardSwish_HardSigmoid", "act/HardSwish_Mul"]
    assert [node.metadata_props for node in model.graph] == [{"origin": "act"}] * 2
    assert [value.name for value in model.graph.outputs] == ["y"]


def exported(model, x, **options):
    program = torch.onnx.export(
        model, (x,), dynamo=True, opset_version=18, verbose=False, **options
    )
    return program.model


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "shufflenet_v2_x0_5"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision", reason="needs the extra 'demo'").models
    network = getattr(models, name)(weights=None).eval()
    model = exported(network, torch.randn(2, 3, 64, 64), dynamic_shapes=({0: "batch"},))
    assert_same_below(model, 13)


def test_batchnorm_lstm_and_upsampling_of_torch():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.norm.running_mean.normal_()
            self.lstm = nn.LSTM(8, 5, batch_first=True, bidirectional=True)

        def forward(self, x):
            x = nn.functional.interpolate(self.norm(x) * 2, scale_factor=2, mode="bilinear")
            padded = nn.functional.pad(x, (1, 1, 0, 0), mode="reflect")
            first, second = padded.mean(1).chunk(2, dim=-1)
            sequence = nn.functional.mish(first - second)[..., :8].flip(1)
            states, _ = self.lstm(sequence)
            return states.amax(dim=1).view(x.shape[0], -1)

    model = exported(Mixed().eval(), torch.randn(2, 3, 8, 16), dynamic_shapes=({0: "batch"},))
    assert {"BatchNormalization", "LSTM", "Resize", "Pad"} <= {node.op_type for node in model.graph}
    assert_same_below(model, 13)


class TestExport:
    @pytest.mark.parametrize("opset", OLDER)
    def test_every_opset(self, quantized, images, tmp_path, opset):
        newest = export_onnx(quantized, images, tmp_path / "18.onnx", opset=HIGHEST)
        report = export_onnx(quantized, images, tmp_path / "model.onnx", opset=opset)
        assert report.opset == opset
        assert (report.quantize_nodes, report.dequantize_nodes) == (3, 6)
        assert (report.inputs, report.layers) == (newest.inputs, newest.layers)
        onnx.checker.check_model(report.path, full_check=True)
        model = ir.load(report.path)
        assert model.opset_imports[""] == opset
        assert count_qdq(model) == (3, 6)
        assert model.graph.initializers["conv.weight"].dtype == ir.DataType.INT8
        expected = predict(newest.path, [images])
        outputs = predict(report.path, [images])
        np.testing.assert_array_equal(outputs, expected)

    def test_names_of_modules_in_the_refusal(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        x = torch.randn(2, 4)
        swap_modules(model, include="*")
        calibrate_model(model, [x])
        with pytest.raises(
            ExportError, match=r"LayerNormalization \(new in opset 17\) at 1/LayerNormalization"
        ):
            export_onnx(model, x, tmp_path / "model.onnx", opset=13)
        assert not (tmp_path / "model.onnx").exists()
        assert export_onnx(model, x, tmp_path / "model.onnx", opset=17).opset == 17
