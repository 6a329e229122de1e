"""Files as other tools write them: what is there is found, and nothing else; TensorRT-RTX is of the same mind."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from small_graphs import floats, ints, op

from qdq import check_onnx
from qdq.errors import BuildError

SHAPE = (4, 3, 16, 16)
FOR_TENSORRT = {
    "per_channel": True,
    "activation_type": QuantType.QInt8,
    "weight_type": QuantType.QInt8,
    "extra_options": {"ActivationSymmetric": True, "QuantizeBias": False},
}
LAYERS_ONLY = {**FOR_TENSORRT, "op_types_to_quantize": ["Conv", "MatMul"]}


class _Reader(CalibrationDataReader):
    def __init__(self):
        rng = np.random.default_rng(0)
        self._batches = iter([{"x": rng.normal(size=SHAPE).astype(np.float32)} for _ in range(2)])

    def get_next(self):
        return next(self._batches, None)


@pytest.fixture
def float_file(tmp_path):
    """Two convolutions, a shortcut, max pooling, global pooling, a linear layer."""
    rng = np.random.default_rng(0)
    constants = {
        "w0": rng.normal(size=(16, 3, 3, 3)),
        "b0": rng.normal(size=16),
        "w1": rng.normal(size=(16, 16, 3, 3)),
        "b1": rng.normal(size=16),
        "w2": rng.normal(size=(16, 32)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("MaxPool", ["r0"], ["p0"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p0", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Add", ["c1", "p0"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r1"], "relu1"),
        helper.make_node("GlobalAveragePool", ["r1"], ["g"], "gap"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "w2"], ["y"], "head"),
    ]
    initializers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", *SHAPE[1:]])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 32])
    graph = helper.make_graph(nodes, "net", [x], [y], initializers)
    path = tmp_path / "float.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path
    )
    return path


@pytest.fixture
def quantize(float_file, tmp_path):
    def call(**options):
        quantize_static(float_file, tmp_path / "q.onnx", _Reader(), **options)
        return tmp_path / "q.onnx"

    return call


@pytest.fixture
def build():
    """Kernels and census of TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from qdq.graph.coverage import list_work_nodes
    from qdq.trt.backend import find_backend
    from qdq.trt.builder import build_plan
    from qdq.trt.census import take_census

    def call(path):
        kernels = build_plan(
            find_backend("rtx"), path, {"x": dict.fromkeys(("min", "opt", "max"), SHAPE)}, 89
        ).kernels
        return kernels, take_census(list_work_nodes(ir.load(path)), kernels)

    return call


def found_in(path):
    return Counter((finding.rule, finding.node) for finding in check_onnx(path).findings)


def pairs_of(*tensors):
    """What ONNX Runtime names the Q and the DQ of a tensor."""
    return [f"{tensor}_{kind}Linear" for tensor in tensors for kind in ("Quantize", "Dequantize")]


def expect(**nodes):
    return Counter((rule, node) for rule, names in nodes.items() for node in names)


# Every tensor between two operators has a pair. Relu goes into the range of what comes before it where codes are
# asymmetric, and takes a pair of its own where they are symmetric. Max pooling passes on the range of its input.
ASYMMETRIC = pairs_of("x", "r0", "p0", "c1", "r1", "g", "f", "y")
ON_EVERY_OPERATOR = {
    "QDQ112": ["add"],  # both sides have a pair, the one of the convolution too
    "QDQ119": ["g_DequantizeLinear"],  # pair, Flatten, pair
    "QDQ121": ["net"],
    "QDQ124": ["y_DequantizeLinear"],  # the logits
}
BIASES = ["b0_DequantizeLinear", "b1_DequantizeLinear"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"QDQ102": ASYMMETRIC, "QDQ108": BIASES, **ON_EVERY_OPERATOR}),
        (
            {"activation_type": QuantType.QUInt8},
            {"QDQ129": ASYMMETRIC, "QDQ108": BIASES, **ON_EVERY_OPERATOR},
        ),
        (FOR_TENSORRT, {"QDQ111": ["relu0"], **ON_EVERY_OPERATOR}),
        # Flatten is no operator of the list: the one pair behind it stays, and is right
        (LAYERS_ONLY, {"QDQ111": ["relu0"], **ON_EVERY_OPERATOR, "QDQ119": []}),
    ],
    ids=["defaults", "unsigned", "for TensorRT", "layers only"],
)
def test_onnxruntime(quantize, options, expected):
    assert found_in(quantize(**options)) == expect(**expected)


def test_onnxruntime_for_tensorrt_has_no_errors(quantize):
    report = check_onnx(quantize(**FOR_TENSORRT))
    assert not [finding for finding in report.findings if finding.severity == "error"]


@pytest.mark.trt
def test_defaults_of_onnxruntime_are_refused(quantize, build):
    path = quantize()
    with pytest.raises(BuildError, match="b0_DequantizeLinear"):
        build(path)


@pytest.mark.trt
def test_zero_points_alone_are_refused(quantize, build):
    path = quantize(extra_options={"QuantizeBias": False})
    assert {
        finding.rule for finding in check_onnx(path).findings if finding.severity == "error"
    } == {"QDQ102"}
    with pytest.raises(BuildError, match=r"zero point"):
        build(path)


@pytest.mark.trt
@pytest.mark.parametrize("options", [FOR_TENSORRT, LAYERS_ONLY], ids=["all", "layers only"])
def test_options_for_tensorrt_are_built(quantize, build, options):
    _, census = build(quantize(**options))
    assert [layer.int8 for layer in census] == [True] * 3


# --- ModelOpt -----------------------------------------------------------------------------------------------------
# Written by hand after what mtq.quantize with INT8_DEFAULT_CFG and torch.onnx.export(dynamo=False) of ModelOpt 0.47
# write: scales and zero points are Constant nodes, 0-D for activations; weights are float with Q and DQ; every
# convolution, linear layer and pooling has a quantizer for its input, though two of them read one tensor; BatchNorm
# stays; the shortcut has no quantizer, only the Cast that a quantizer of its tensor leaves.


def quantizer(name, value, scale="float {0.05}", zero="int8 {0}", axis=""):
    return (
        op(f"{name}_zero", f"Constant<value = {zero}>()")
        + op(f"{name}_scale", f"Constant<value = {scale}>()")
        + op(f"{name}_q", f"QuantizeLinear{axis}({value}, {name}_scale, {name}_zero)")
        + op(f"{name}_dq", f"DequantizeLinear{axis}({name}_q, {name}_scale, {name}_zero)")
    )


def layer(name, value, call, channels=16):
    """A layer with both of its quantizers."""
    scales, zeros = (
        f"float[{channels}] {{{floats(channels, 0.01)}}}",
        f"int8[{channels}] {{{floats(channels, 0)}}}",
    )
    weight = quantizer(f"{name}_weight", f"{name}_w", scales, zeros, "<axis=0>")
    return (
        quantizer(f"{name}_input", value)
        + weight
        + op(name, call.format(f"{name}_input_dq, {name}_weight_dq"))
    )


def batchnorm(name, value):
    return op(name, f"BatchNormalization({value}, ones, zeros, {name}_mean, {name}_var)")


CONV = "Conv<kernel_shape=[3,3], pads=[1,1,1,1]>({})"
POINT = "Conv<kernel_shape=[1,1]>({})"
WEIGHTS = {
    "c0": "16,3,3,3",
    "c1": "16,16,3,3",
    "c2": "16,16,3,3",
    "c3": "16,16,3,3",
    "down": "16,16,1,1",
    "fc": "32,16",
}
NORMS = ["b0", "b1", "b2", "b3", "bdown"]
MODELOPT = "".join(
    [
        *[
            op(f"{n}_mean", "Identity(zeros)") + op(f"{n}_var", "Identity(ones)") for n in NORMS
        ],  # equal ones are one
        layer("c0", "x", CONV),
        batchnorm("b0", "c0"),
        op("r0", "Relu(b0)"),
        quantizer("pool_input", "r0"),
        op("pool", "MaxPool<kernel_shape=[2,2], strides=[2,2]>(pool_input_dq)"),
        layer("c1", "pool", CONV),
        batchnorm("b1", "c1"),
        op("r1", "Relu(b1)"),
        # an identity shortcut around c2
        layer("c2", "r1", CONV),
        op("c2_cast", "Cast<to=1>(r1)"),
        batchnorm("b2", "c2"),
        op("add", "Add(b2, c2_cast)"),
        op("r2", "Relu(add)"),
        # a convolution on the shortcut around c3
        layer("c3", "r2", CONV),
        batchnorm("b3", "c3"),
        layer("down", "r2", POINT),
        batchnorm("bdown", "down"),
        op("add_1", "Add(b3, bdown)"),
        op("r3", "Relu(add_1)"),
        quantizer("gap_input", "r3"),
        op("gap", "GlobalAveragePool(gap_input_dq)"),
        op("flat", "Flatten<axis=1>(gap)"),
        layer("fc", "flat", "Gemm<transB=1>({}, fc_b)", channels=32).replace(
            "[fc] fc =", "[fc] y ="
        ),
    ]
)
IN_MODELOPT = {
    "QDQ112": ["add", "add_1"],
    "QDQ120": ["down_input_q"],  # the same tensor and scale as c3_input_q
    "QDQ121": ["main_graph"],
    "QDQ122": NORMS,
    "QDQ124": ["fc"],
}


@pytest.fixture
def modelopt_file(tmp_path):
    def call(nodes=MODELOPT):
        sizes = {
            name: int(np.prod([int(size) for size in shape.split(",")]))
            for name, shape in WEIGHTS.items()
        }
        weights = [
            f"float[{shape}] {name}_w = {{{ints(sizes[name])}}}" for name, shape in WEIGHTS.items()
        ]
        rest = f"float[16] ones = {{{floats(16, 1.0)}}}, float[16] zeros = {{{floats(16, 0.0)}}}"
        text = (
            '<ir_version: 9, opset_import: ["": 19], producer_name: "pytorch">\n'
            "main_graph (float[N,3,16,16] x) => (float[N,32] y)\n"
            f"<{', '.join(weights)}, {rest}, float[32] fc_b = {{{floats(32, 0.5)}}}>\n{{{nodes}\n}}"
        )
        path = tmp_path / "modelopt.onnx"
        ir.save(ir.from_onnx_text(text), path)
        return path

    return call


def test_modelopt(modelopt_file):
    assert found_in(modelopt_file()) == expect(**IN_MODELOPT)


def test_modelopt_with_scales_of_shape_1(modelopt_file):
    """What both exporters make of a range that is a buffer of one element."""
    found = found_in(modelopt_file(MODELOPT.replace("float {0.05}", "float[1] {0.05}")))
    names = [*WEIGHTS, "pool", "gap"]
    assert found == expect(
        **IN_MODELOPT, QDQ103=[f"{name}_input_{kind}" for name in names for kind in ("q", "dq")]
    )


@pytest.mark.trt
def test_modelopt_is_built(modelopt_file, build):
    _, census = build(modelopt_file())
    assert [layer.int8 for layer in census] == [True] * 6


@pytest.mark.trt
def test_scales_of_shape_1_run_in_float(modelopt_file, build):
    _, census = build(modelopt_file(MODELOPT.replace("float {0.05}", "float[1] {0.05}")))
    assert not any(layer.int8 for layer in census if layer.op_type == "Conv")


@pytest.mark.trt
def test_float_shortcuts_are_written_in_float(modelopt_file, build):
    """QDQ112: with the shortcuts quantized as it tells, the same network writes less."""
    quantized = MODELOPT.replace("Add(b2, c2_cast)", "Add(b2, c2_input_dq)")
    assert ("QDQ112", "add") not in found_in(modelopt_file(quantized))
    after = build(modelopt_file(quantized))[0]
    before = build(modelopt_file())[0]
    assert sum(k.output_bytes for k in after) < sum(k.output_bytes for k in before)
