"""The float remainder in 16 bit: valid ONNX, near float32 in ONNX Runtime and onnx.reference, int8 as before."""

import importlib.util

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import nn

from qdq import (
    ArgumentError,
    ExportError,
    build_engine,
    calibrate_model,
    export_onnx,
    fold_batchnorm,
    swap_modules,
)
from qdq.check.precision import measure_peaks, run_rounded
from qdq.graph.coverage import count_qdq
from qdq.graph.passes import run_passes
from qdq.graph.precision import ConvertPrecision
from qdq.trt.backend import find_backend
from qdq.trt.builder import build_plan

FP16, BF16, FP32 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT


def needs_rtx(test):
    missing = importlib.util.find_spec("tensorrt_rtx") is None
    return pytest.mark.trt(
        pytest.mark.skipif(missing, reason="needs tensorrt_rtx: pip install 'qdq[rtx]'")(test)
    )


def read(text, opset=19):
    """`(inputs) => (outputs) <constants> { nodes }` as a model, nodes named by their outputs."""
    model = onnx.shape_inference.infer_shapes(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}'),
        strict_mode=True,
    )
    for node in model.graph.node:
        node.name = node.output[0]
    return ir.from_proto(model)


def convert(text, dtype=FP16, opset=19, **options):
    """Convert a model and check it with ONNX; returns the model and node -> reason of what stays float32."""
    model = read(text, opset)
    graph_pass = ConvertPrecision(dtype, **options)
    run_passes(model, [graph_pass])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, {entry.node: entry.reason for entry in graph_pass.kept}


def ops(model):
    return [node.op_type for node in model.graph]


def value(model, name):
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        values += node.outputs

    return next(value for value in values if value.name == name)


def run(model, *arrays):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


PAIR = "float s = {0.05}, int8 z = {0}"


class TestTypes:
    def test_constants_outputs_and_one_cast_at_each_end(self):
        model, reasons = convert(
            "(float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}> { t = Mul (x, w) y = Relu (t) }"
        )
        assert ops(model) == ["Cast", "Mul", "Relu", "Cast"]
        assert reasons == {}
        assert value(model, "w").dtype == value(model, "t").dtype == FP16
        assert value(model, "w").const_value.numpy().dtype == np.float16
        assert value(model, "x").dtype == value(model, "y").dtype == FP32

    @pytest.mark.parametrize(
        ("dtype", "numpy_type"), [(FP16, np.float16), (BF16, ml_dtypes.bfloat16)]
    )
    def test_io_in_16_bit_on_request(self, dtype, numpy_type):
        text = "(float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}> { y = Mul (x, w) }"
        model, _ = convert(text, dtype, keep_io_types=False)
        assert ops(model) == ["Mul"]
        assert value(model, "x").dtype == value(model, "y").dtype == dtype
        assert value(model, "w").const_value.numpy().dtype == numpy_type

    def test_constant_nodes_and_attributes_with_types(self):
        model, reasons = convert("""(float[2,3] x, int64[2] n) => (float[2,3] y) {
            c = Constant <value_float = 2.5> ()
            k = Constant <value = float[1] {0.5}> ()
            zero = ConstantOfShape <value = float[1] {1.5}> (n)
            i = Cast <to = 1> (n)
            t = Mul (x, c)
            u = Add (t, k)
            h = ReduceMax <keepdims = 0> (i)
            v = Mul (u, h)
            y = Add (v, zero)
        }""")
        assert reasons == {}
        assert [value(model, name).dtype for name in ("zero", "i", "t", "v")] == [FP16] * 4
        x, n = np.float32([[1, 2, 3], [4, 5, 6]]), np.int64([2, 3])
        np.testing.assert_array_equal(run(model, x, n)[0], (x * 2.5 + 0.5) * 3 + 1.5)
        assert not [node for node in model.graph if node.op_type == "Constant"]

    def test_integers_and_what_reads_any_type_get_no_cast(self):
        model, reasons = convert("""(float[N,4] x) => (int64[2] n, int64[N,1] a, float[N,4] y) {
            e = Exp (x)
            n = Shape (e)
            a = ArgMax <axis = 1> (e)
            y = Relu (e)
        }""")
        assert set(reasons) == {"e", "y"}  # y lies between Exp and the output
        assert ops(model) == ["Exp", "Shape", "ArgMax", "Relu"]

    def test_a_constant_with_readers_of_both_types(self):
        model, _ = convert(
            """(float[2,3] x) => (float[2,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}> {
            t = Mul (x, w)  u = Softmax (w)  y = Add (t, u)
        }""",
            keep_io_types=False,
        )
        assert value(model, "w").dtype == FP32
        assert value(model, "w.fp16").dtype == FP16

    def test_casts_of_a_half_model_are_folded(self):
        model, _ = convert(f"""(float16[1,3] x) => (float16[1,3] y) <{PAIR}> {{
            a = Cast <to = 1> (x)  q = QuantizeLinear (a, s, z)  d = DequantizeLinear (q, s, z)
            b = Cast <to = 10> (d)  y = Relu (b)
        }}""")
        assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "Relu"]
        assert value(model, "s").dtype == FP16

    def test_a_cast_to_integer_reads_what_is_there(self):
        model, _ = convert(
            "(float[3] x) => (int64[3] y, float[3] z) { e = Exp (x) y = Cast <to = 7> (e) z = Relu (x) }"
        )
        cast = next(node for node in model.graph if node.name == "y")
        assert cast.inputs[0].name == "e"

    def test_subgraphs_keep_their_types(self):
        model, reasons = (
            convert("""(float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}> {
            t = Mul (x, w)
            u = If (c) <then_branch = a () => (float[2,3] p) { p = Add (t, w) },
                        else_branch = b () => (float[2,3] r) { r = Neg (t) }>
            y = Mul (u, w)
        }""")
        )
        assert reasons["u"] == "has a subgraph"
        x = np.float32([[1, 2, 3], [4, 5, 6]])
        np.testing.assert_array_equal(
            run(model, x, np.array(True))[0], (x * [1, 2, 3] + [1, 2, 3]) * [1, 2, 3]
        )


class TestPairs:
    CONV = f"""(float[1,2,3,3] x) => (float[1,2,3,3] y)
        <{PAIR}, int8[2,2,1,1] w = {{1, 2, 3, 4}}, float[2] ws = {{0.1, 0.2}}, int8[2] wz = {{0, 0}},
         float[2] b = {{1, 2}}> {{
        q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)
        v = DequantizeLinear <axis = 0> (w, ws, wz)
        y = Conv (d, v, b)
    }}"""

    def test_float32_enters_through_the_pair_itself(self):
        model, reasons = convert(self.CONV)
        assert ops(model) == [
            "QuantizeLinear",
            "DequantizeLinear",
            "DequantizeLinear",
            "Conv",
            "Cast",
        ]
        assert reasons == {}
        scale, copy = value(model, "s"), value(model, "s.fp16")
        assert (scale.dtype, copy.dtype) == (FP32, FP16)
        assert copy.const_value.numpy() == scale.const_value.numpy().astype(np.float16)
        assert [value(model, name).dtype for name in ("d", "v", "ws", "b")] == [FP16] * 4
        assert value(model, "w").const_value.numpy().ravel().tolist() == [1, 2, 3, 4]

    def test_behind_16_bit_the_pair_has_one_scale(self):
        model, _ = convert(self.CONV, keep_io_types=False)
        assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv"]
        assert value(model, "s").dtype == FP16

    @pytest.mark.parametrize("entry", [{"keep_io_types": True}, {"keep_io_types": False}])
    def test_numbers_of_the_reference(self, entry):
        x = np.random.default_rng(0).normal(size=(1, 2, 3, 3)).astype(np.float32)
        (expected,) = ReferenceEvaluator(ir.to_proto(read(self.CONV))).run(None, {"x": x})
        model, _ = convert(self.CONV, **entry)
        inputs = x if entry["keep_io_types"] else x.astype(np.float16)
        # One code more or less.
        np.testing.assert_allclose(run(model, inputs)[0], expected, rtol=2e-3, atol=0.05)
        (outputs,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": inputs})
        np.testing.assert_allclose(outputs, expected, rtol=2e-3, atol=0.05)

    @pytest.mark.parametrize(
        ("scale", "words"), [(1e-6, "smallest normal"), (1000, "codes reach 1.28e+05")]
    )
    def test_a_scale_that_float16_has_not(self, scale, words):
        text = f"""(float[1,2] x) => (float[1,2] y) <float s = {{{scale}}}, int8 z = {{0}}> {{
            r = Relu (x)  q = QuantizeLinear (r, s, z)  d = DequantizeLinear (q, s, z)  a = Abs (d)  y = Neg (a)
        }}"""
        model, reasons = convert(text, keep_io_types=False)
        assert set(reasons) == {"q", "d"}
        assert all(words in reason for reason in reasons.values())
        assert ops(model) == [
            "Relu",
            "Cast",
            "QuantizeLinear",
            "DequantizeLinear",
            "Cast",
            "Abs",
            "Neg",
        ]
        assert value(model, "s").const_value.numpy() == np.float32(scale)
        assert convert(text, BF16, keep_io_types=False)[1] == {}

    def test_one_tiny_channel_of_a_weight(self):
        model, reasons = convert(self.CONV.replace("{0.1, 0.2}", "{0.1, 0.00001}"))
        assert reasons == {
            "v": "1 of 2 scales are below the smallest normal float16, down to 1e-05"
        }
        assert count_qdq(model) == (1, 2)

    def test_both_operands_of_a_product_have_scales_of_one_type(self):
        """Else TensorRT refuses: "type mismatch between matmul operand scales"."""
        model, reasons = convert(
            "(float[2,4] x, float[2,4] a) => (float[2,4] y, float[2,4] z)"
            " <float s = {1e-7}, float t = {0.1}, int8 o = {0}, int8[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}>"
            "{ q = QuantizeLinear (x, s, o) d = DequantizeLinear (q, s, o) e = DequantizeLinear (w, t, o)"
            "  f = Transpose <perm = [1, 0]> (e) y = MatMul (d, f)"
            "  p = QuantizeLinear (a, t, o) b = DequantizeLinear (p, t, o) h = DequantizeLinear (w, t, o)"
            "  z = MatMul (b, h) }"
        )
        assert reasons.keys() >= {"d", "e", "f", "y"}
        assert not reasons.keys() & {"b", "h", "z"}
        assert {value(model, name).dtype for name in ("d", "e", "f")} == {FP32}


class TestKept:
    """What stays in float32, one reason each."""

    @pytest.mark.parametrize(
        ("node", "dtypes"),
        [
            ("LayerNormalization (x, w)", (FP16, BF16)),
            ("Softmax (x)", (FP16, BF16)),
            ("LogSoftmax (x)", (FP16, BF16)),
            ("Exp (x)", (FP16,)),
            ("Pow (x, w)", (FP16,)),
            ("Sqrt (x)", (FP16,)),
        ],
    )
    def test_by_operator(self, node, dtypes):
        head = "(float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}>"
        text = f"{head} {{ t = Neg (x) u = {node.replace('(x', '(t')} v = Neg (u) y = Neg (v) }}"
        for dtype in (FP16, BF16):
            model, reasons = convert(text, dtype, opset=22, keep_io_types=False)
            assert set(reasons) == ({"u"} if dtype in dtypes else set())
            casts = ["Cast"] if reasons else []
            assert ops(model) == ["Neg", *casts, node.split()[0], *casts, "Neg", "Neg"]

    def test_a_region_has_one_cast_in_and_one_out(self):
        model, reasons = convert(
            """(float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}, int64[2] n = {3, 2}> {
            a = Neg (x)  s = Softmax (a)  t = Transpose (s)  r = Reshape (t, n)  u = Transpose (r)
            l = LayerNormalization (u, w)  y = Neg (l)
        }""",
            keep_io_types=False,
        )
        assert ops(model).count("Cast") == 2
        assert {
            name for name, reason in reasons.items() if reason == "lies between nodes in float32"
        } == {"t", "r", "u"}

    def test_decomposed_layernorm(self):
        text = """(float[2,8] x) => (float[2,8] y) <int64[1] a = {-1}, float e = {0.00001}, float two = {2},
             float[8] g = {1,2,3,4,5,6,7,8}> {
            p = Neg (x)
            m = ReduceMean (p, a)  c = Sub (p, m)  s = Pow (c, two)  v = ReduceMean (s, a)
            w = Add (v, e)  r = Sqrt (w)  d = Div (c, r)  y = Mul (d, g)
        }"""
        model, reasons = convert(text, BF16, keep_io_types=False)
        assert set(reasons) == {"m", "c", "s", "v", "w", "r", "d"}
        assert ops(model).count("Cast") == 2

    @pytest.mark.parametrize("epsilon", ["1e-12", "0.01"])
    def test_division_by_what_has_a_floor(self, epsilon):
        """`F.normalize`: in float16 the floor is zero, and a row of zeros is divided by it."""
        text = (
            f"(float[2,4] x) => (float[2,4] y) <float low = {{{epsilon}}}, float[2,4] like = {{1,1,1,1,1,1,1,1}}>"
            "{ n = ReduceL2 <keepdims = 1> (x) c = Clip (n, low) h = Shape (like) e = Expand (c, h) y = Div (x, e) }"
        )
        model, reasons = convert(text, keep_io_types=False)
        assert ({"c", "e", "y"} <= reasons.keys()) == (epsilon == "1e-12")
        assert np.isfinite(run(model, np.zeros((2, 4), np.float16))[0]).all()

    @pytest.mark.parametrize("division", ["y = Div (x, p)", "r = Reciprocal (p) y = Mul (x, r)"])
    def test_division_by_a_product_of_floors(self, division):
        """Cosine similarity written out; ONNX Runtime computes this in float32 and would not show it."""
        text = (
            "(float[2,4] x) => (float[2,4] y) <float low = {1e-8}>"
            "{ n = ReduceL2 <keepdims = 1> (x) c = Clip (n, low) p = Mul (c, c) " + division + " }"
        )
        model, reasons = convert(text, keep_io_types=False)
        assert {"c", "p", "y"} <= reasons.keys()
        (outputs,) = ReferenceEvaluator(ir.to_proto(model)).run(
            None, {"x": np.zeros((2, 4), np.float16)}
        )
        assert np.isfinite(outputs).all()

    def test_large_reductions(self):
        for size, names in ((1024, set()), (1025, {"r"})):
            head = f"(float[2,{size}] x) => (float[2,1] y) <int64[1] a = {{1}}>"
            text = f"{head} {{ t = Neg (x) r = ReduceMean (t, a) y = Neg (r) }}"
            assert set(convert(text, keep_io_types=False)[1]) == names

    def test_resize_scales_stay_float32_and_the_data_does_not(self):
        model, reasons = (
            convert("""(float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] s = {1, 1, 2, 2}> {
            y = Resize <mode = "linear"> (x, , s)
        }""")
        )
        assert reasons == {}
        assert value(model, "s").dtype == FP32
        assert ops(model) == ["Cast", "Resize", "Cast"]

    def test_operators_without_the_type(self):
        model, reasons = convert(
            """(float[1,2,4,4] x, float n) => (float[1,2,2,2] y, float[M] r)
            <float o = {0}, float i = {1}> {
            t = Neg (x)  y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)  r = Range (o, n, i)
        }""",
            BF16,
            opset=19,
        )
        assert reasons["y"] == "MaxPool has no bfloat16 in ONNX 19"
        assert reasons["r"] == "Range has no bfloat16 in ONNX 19"
        assert value(model, "t").dtype == FP32  # lies between the input and a kept node

    def test_an_operator_of_others(self):
        model = read(
            "(float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) c = Neg (b) y = Neg (c) }"
        )
        node = model.graph[2]
        node.domain = "own"
        graph_pass = ConvertPrecision(FP16, keep_io_types=False)
        graph_pass(model)
        assert [entry.node for entry in graph_pass.kept] == ["c"]

    def test_constants_that_do_not_fit(self):
        model, reasons = convert(
            """(float[3] x) => (float[3] y)
            <float e = {0.0000001}, float m = {-3.4e38}, float[3] w = {1, 0.0000001, 2}> {
            a = Neg (x)  b = Add (a, e)  c = Neg (b)  d = Max (c, m)  f = Neg (d)  y = Mul (f, w)
        }""",
            keep_io_types=False,
        )
        assert reasons == {
            "b": "its constant e of 1e-07 is too small for float16",
            "c": "lies between nodes in float32",
            "d": "its constant m reaches 3.4e+38",
        }
        assert ops(model).count("Cast") == 2

    def test_measured_values(self):
        head = "(float[3] x) => (float[3] y) <float k = {1000}>"
        text = f"{head} {{ a = Mul (x, k) b = Mul (a, k) c = Div (b, k) y = Neg (c) }}"
        x = np.float32([1, -70, 3])
        peaks = measure_peaks(read(text), {"x": x})
        assert peaks == {"x": 70, "a": 7e4, "b": 7e7, "c": 7e4, "y": 7e4}
        model, reasons = convert(text, peaks=peaks)
        assert set(reasons) == {"a", "b", "c", "y"}
        assert reasons["a"] == "a reaches 7e+04, and float16 ends at 65504"
        np.testing.assert_array_equal(run(model, x)[0], -x * 1000)
        assert convert(text, BF16, peaks=peaks)[1] == {}
        without, _ = convert(text)
        assert not np.isfinite(run_rounded(without, {"x": x})[0]).all()  # that is what it is for

    def test_inputs_and_outputs_that_do_not_fit(self):
        text = "(float[3] x) => (float[3] y) <float k = {1000}> { a = Div (x, k) b = Neg (a) y = Mul (b, k) }"
        peaks = measure_peaks(read(text), {"x": np.float32([1e6, 0, 1])})
        model, reasons = convert(text, peaks=peaks, keep_io_types=False)
        assert {"x", "y"} <= set(reasons)
        assert value(model, "x").dtype == value(model, "y").dtype == FP32


class TestRefused:
    def test_dtype(self):
        with pytest.raises(ArgumentError, match="INT8"):
            ConvertPrecision(ir.DataType.INT8)

    @pytest.mark.parametrize("dtype", [FP16, BF16])
    def test_opset_without_such_scales(self, dtype):
        with pytest.raises(ExportError, match="the lowest that has is 19"):
            convert("(float[3] x) => (float[3] y) { y = Neg (x) }", dtype, opset=18)

    def test_bfloat16_convolution(self):
        model = read(TestPairs.CONV, 21)
        content = ir.to_proto(model)
        with pytest.raises(
            ExportError,
            match="Conv of opset 21 has no bfloat16: y; the lowest opset that has is 22",
        ):
            ConvertPrecision(BF16)(model)
        assert ir.to_proto(model) == content
        assert convert(TestPairs.CONV, BF16, opset=22)[1] == {}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        heads = self.qkv(self.norm(x)).reshape(x.shape[0], x.shape[1], 3, 2, 16)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        features = torch.relu(self.first(x))
        return self.second(F.interpolate(features, scale_factor=2, mode="bilinear"))


class Huge(nn.Module):
    """Its activations are far outside of float16, its outputs are not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        nn.init.constant_(self.first.weight, 1e5)
        nn.init.constant_(self.second.weight, 1e-6)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class DeadChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        with torch.no_grad():
            self.first.weight[3] *= 1e-6

    def forward(self, x):
        return self.second(torch.relu(self.first(x)) + 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(self.pool(torch.relu(self.conv(x) + x)).flatten(1))


# network -> what stays in float32: operators and words of their reasons
NETWORKS = {
    Block: {},
    Attention: {"LayerNormalization": "normalization", "Softmax": "softmax"},
    Upsampling: {},
    Huge: {"Conv": "reaches", "Relu": "reaches", "DequantizeLinear": "codes reach"},
    DeadChannel: {"DequantizeLinear": "1 of 16 scales"},
}


def calibrated(kind):
    torch.manual_seed(0)
    model = kind().eval()
    shape = (2, 20, 32) if kind is Attention else (2, 3, 12, 12)
    x = torch.randn(shape)
    swap_modules(model, x)
    calibrate_model(model, [x], method="max")
    return model, x


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """Network class, example, and the reports of both exports."""
    model, x = calibrated(request.param)
    folder = tmp_path_factory.mktemp("precision")
    full = export_onnx(model, x, folder / "fp32.onnx", precision="fp32")
    half = export_onnx(model, x, folder / "fp16.onnx", precision="fp16")
    return request.param, x, full, half


def noise_db(expected, outputs):
    noise = np.linalg.norm(outputs - expected) / np.linalg.norm(expected)
    return 20 * np.log10(max(noise, 1e-12))


def session_run(path, *arrays):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, arrays, strict=True)))
    return output


def codes(path):
    tensors = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    return {t.name: onnx.numpy_helper.to_array(t).tolist() for t in tensors}


class TestExport:
    def test_report_and_file(self, exported):
        kind, _, full, half = exported
        onnx.checker.check_model(half.path, full_check=True)
        reasons = [(entry.op_type, entry.reason) for entry in half.precision.kept]
        assert bool(reasons) == bool(NETWORKS[kind])
        for op_type, words in NETWORKS[kind].items():
            assert any(op == op_type and words in reason for op, reason in reasons)
        assert half.precision.not_measured == ()
        assert full.precision is None
        assert (half.quantize_nodes, half.dequantize_nodes) == (
            full.quantize_nodes,
            full.dequantize_nodes,
        )
        assert codes(half.path) == codes(full.path)

    def test_near_float32_in_onnx_runtime(self, exported):
        _, x, full, half = exported
        expected = session_run(full.path, x.numpy())
        outputs = session_run(half.path, x.numpy())
        assert outputs.dtype == np.float32
        assert noise_db(expected, outputs) < -30
        assert half.precision.parity.sqnr_db > 30

    def test_near_float32_in_the_reference(self, exported):
        """numpy rounds every value to float16; ONNX Runtime does so where the report measures."""
        _, x, full, half = exported
        feed = {next(iter(full.inputs)): x.numpy()}
        (expected,) = ReferenceEvaluator(str(full.path)).run(None, feed)
        (outputs,) = ReferenceEvaluator(str(half.path)).run(None, feed)
        assert noise_db(expected, outputs) < -30

    @needs_rtx
    def test_same_int8_layers_in_tensorrt_rtx(self, exported):
        _, _, full, half = exported
        full_engine = build_engine(full.path, backend="rtx")
        half_engine = build_engine(half.path, backend="rtx")
        full_layers = [(layer.node, layer.int8) for layer in full_engine.layers]
        half_layers = [(layer.node, layer.int8) for layer in half_engine.layers]
        assert half_layers == full_layers
        assert full_engine.missing_int8 == half_engine.missing_int8 == []

    @needs_rtx
    def test_kernels_of_the_rest_are_half(self, tmp_path):
        model, x = calibrated(Block)
        types = []
        for precision in ("fp32", "fp16"):
            path = export_onnx(model, x, tmp_path / f"{precision}.onnx", precision=precision).path
            shape = {kind: tuple(x.shape) for kind in ("min", "opt", "max")}
            plan = build_plan(find_backend("rtx"), path, {"x": shape}, 89)
            types.append(
                [{*k.input_types, *k.constant_types, *k.output_types} for k in plan.kernels]
            )
        assert not any("Half" in kernel for kernel in types[0])
        # the input's own Q reads float32; int8 convolutions of TensorRT-RTX write it, whatever the file says
        assert sum("Half" in kernel for kernel in types[1]) >= 3

    def test_io_in_float16(self, tmp_path):
        model, x = calibrated(Block)
        full = export_onnx(model, x, tmp_path / "fp32.onnx")
        half = export_onnx(model, x, tmp_path / "fp16.onnx", precision="fp16", keep_io_types=False)
        assert half.precision.casts == 0
        assert half.precision.parity.sqnr_db > 30
        outputs = session_run(half.path, x.numpy().astype(np.float16))
        assert outputs.dtype == np.float16
        assert noise_db(session_run(full.path, x.numpy()), outputs.astype(np.float32)) < -30

    def test_float_weights_keep_their_codes(self, tmp_path):
        model, x = calibrated(Block)
        path = export_onnx(model, x, tmp_path / "m.onnx", precision="fp16", weights="float").path
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        assert tensors["conv.weight"].dtype == np.float32
        assert tensors["conv.bias"].dtype == np.float16

    def test_bfloat16_says_what_onnx_runtime_cannot(self, tmp_path):
        model, x = calibrated(Block)
        report = export_onnx(model, x, tmp_path / "m.onnx", precision="bf16", opset=22)
        onnx.checker.check_model(report.path, full_check=True)
        assert report.precision.parity is None
        assert "the outputs in bf16: ONNX Runtime cannot load" in report.precision.not_measured[0]
        assert "not measured" in report.precision.format_table()

    def test_what_a_person_reads(self, exported):
        _, _, _, half = exported
        lines = half.precision.format_table().splitlines()
        assert lines[0].startswith("fp16 against fp32 on 2 example inputs: SQNR ")
        assert (
            lines[1]
            == f"{len(half.precision.kept)} nodes stay in fp32, {half.precision.casts} Casts"
        )

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"precision": "fp8"}, ArgumentError, "'fp8'"),
            ({"precision": "fp16", "opset": 18}, ExportError, "the lowest that has is 19"),
            (
                {"precision": "bf16"},
                ExportError,
                "stem/Conv, conv/Conv; the lowest opset that has is 22",
            ),
        ],
    )
    def test_refused(self, tmp_path, options, error, words):
        model, x = calibrated(Block)
        with pytest.raises(error, match=words):
            export_onnx(model, x, tmp_path / "m.onnx", **options)
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_rtx
def test_resnet50(tmp_path):
    models = pytest.importorskip("torchvision", reason="needs the extra 'demo'").models
    model, x = models.resnet50(weights=None).eval(), torch.randn(2, 3, 96, 96)
    fold_batchnorm(model, x)
    swap_modules(model, x)
    calibrate_model(model, [x], method="max")
    full = export_onnx(model, x, tmp_path / "fp32.onnx", precision="fp32")
    half = export_onnx(model, x, tmp_path / "fp16.onnx", precision="fp16")
    assert half.precision.kept == ()
    assert half.precision.casts == 1  # at the end; the input enters through its Q
    assert half.precision.parity.sqnr_db > 30
    engines = [build_engine(report.path, backend="rtx") for report in (full, half)]
    assert engines[0].int8 == engines[1].int8 == engines[1].expected_int8 == 54
