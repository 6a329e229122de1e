"""Small ONNX files in the formats of other tools: FP8, int16, int4, FP4 and blocks, as ModelOpt and onnx write them.

Every file has one product of `x`, except attention. `xd_q` and `xd` are the pair of x, `wd` is the DQ of the weight,
and `m` the product.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

E4M3, HALF, SINGLE = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16, TensorProto.FLOAT
TRT = helper.make_opsetid("trt", 1)


def constant(name, values, dtype):
    """An initializer of any type, from numbers."""
    values = np.asarray(values, np.float32)
    if dtype == TensorProto.FLOAT8E8M0:
        exponents = values.astype(ml_dtypes.float8_e8m0fnu)
        return helper.make_tensor(name, dtype, values.shape, exponents.tobytes(), raw=True)
    if dtype == E4M3:
        codes = values.astype(ml_dtypes.float8_e4m3fn)
        return helper.make_tensor(name, dtype, values.shape, codes.tobytes(), raw=True)
    numbers = (
        values
        if dtype in (HALF, SINGLE, TensorProto.BFLOAT16, TensorProto.FLOAT4E2M1)
        else values.astype(int)
    )
    return helper.make_tensor(name, dtype, values.shape, numbers.ravel())


class File:
    """An ONNX file under construction.

    Args:
        real: Element type of the float part.
        opset: Opset of the file.
    """

    def __init__(self, real=HALF, opset=21):
        self.real, self.opset = real, opset
        self.nodes, self.constants, self.uses_trt = [], [], False

    def add(self, name, values, dtype=None):
        self.constants.append(constant(name, values, self.real if dtype is None else dtype))

    def node(self, op_type, inputs, output, **attributes):
        outputs = [output] if isinstance(output, str) else output
        if op_type.startswith("TRT_"):
            attributes["domain"], self.uses_trt = "trt", True
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes))

    def pair(self, value, output, scale=0.01, dtype=E4M3, zero=0.0, **attributes):
        """A Q and a DQ with constants of their own."""
        self.add(f"{output}_s", scale)
        self.add(f"{output}_z", np.full(np.shape(scale), zero), dtype)
        parameters = [f"{output}_s", f"{output}_z"]
        self.node("QuantizeLinear", [value, *parameters], f"{output}_q", **attributes)
        self.node("DequantizeLinear", [f"{output}_q", *parameters], output)

    def weight(self, codes, scale, dtype=E4M3, zero=0.0, **attributes):
        """The DQ of a stored weight, `wd`; without a zero point if `zero` is None."""
        self.add("w", codes, dtype)
        self.add("ws", scale)
        parameters = ["ws"]
        if zero is not None:
            self.add("wz", np.full(np.shape(scale), zero), dtype)
            parameters.append("wz")
        self.node("DequantizeLinear", ["w", *parameters], "wd", **attributes)

    def save(self, path, x, y, more=()):
        """Write the file; x and y are the shapes of input and output."""
        inputs = [helper.make_tensor_value_info("x", self.real, x)]
        inputs += [helper.make_tensor_value_info(name, self.real, x) for name in more]
        outputs = [helper.make_tensor_value_info("y", self.real, y)]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.constants)
        imports = [helper.make_opsetid("", self.opset), *([TRT] if self.uses_trt else [])]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), path)
        return path


def codes_of(*shape, limit=8):
    return np.random.default_rng(0).integers(-limit, limit, shape).astype(np.float32)


def fp8_matmul(path, *, real=HALF, opset=21, axis=None, dtype=E4M3, **pair):
    file = File(real, opset)
    file.pair("x", "xd", dtype=dtype, **pair)
    attributes = {} if axis is None else {"axis": axis}
    file.weight(codes_of(64, 64), 0.02 if axis is None else np.full(64, 0.02), dtype, **attributes)
    file.node("MatMul", ["xd", "wd"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def fp8_after_clip(path):
    """A clip before the Q, as a ReLU6 is exported: ONNX Runtime knows no FP8 where it would merge the two."""
    file = File(SINGLE)
    file.add("low", 0)
    file.add("high", 6)
    file.node("Neg", ["x"], "n")
    file.node("Clip", ["n", "low", "high"], "c")
    file.pair("c", "xd")
    file.weight(codes_of(64, 64), 0.02)
    file.node("MatMul", ["xd", "wd"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def fp8_conv(
    path,
    *,
    kernel=(3, 3),
    op_type="Conv",
    scale=0.01,
    channel_scales=False,
    real=HALF,
    relu_before=False,
):
    file = File(real)
    if relu_before:
        file.node("Relu", ["x"], "r")
    file.pair("r" if relu_before else "x", "xd", scale)
    weight_scale = np.full(16, 0.02) if channel_scales else 0.02
    file.weight(codes_of(16, 16, *kernel), weight_scale, **({"axis": 0} if channel_scales else {}))
    file.node(op_type, ["xd", "wd"], "m", pads=[size // 2 for size in kernel] * 2)
    file.node("Relu", ["m"], "y")
    return file.save(path, [1, 16, 8, 8], [1, 16, 8, 8])


def weight_only(path, dtype, *, opset=21, zero=None):
    """Blocks of 32 along the sum, as in weight-only quantization to 4 bit."""
    file = File(opset=opset)
    file.weight(
        np.abs(codes_of(64, 64, limit=4)),
        np.full((2, 64), 0.02),
        dtype,
        zero,
        axis=0,
        block_size=32,
    )
    file.node("MatMul", ["x", "wd"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def trt_fp8(path):
    """FP8 in TensorRT's own operators, which ModelOpt writes where ONNX has none."""
    file = File(opset=17)
    file.add("s", 0.01)
    file.add("w", codes_of(64, 64))
    for value, output in (("x", "xd"), ("w", "wd")):
        file.node("TRT_FP8QuantizeLinear", [value, "s"], f"{output}_q")
        file.node("TRT_FP8DequantizeLinear", [f"{output}_q", "s"], output)
    file.node("MatMul", ["xd", "wd"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def mxfp8(path):
    file = File()
    blocks = {"axis": -1, "block_size": 32}
    file.add("w", codes_of(64, 64), E4M3)
    file.add("ws", np.full((64, 2), 120), TensorProto.UINT8)
    file.node("TRT_MXFP8DynamicQuantize", ["x"], ["x8", "xs"], output_dtype=E4M3, **blocks)
    file.node("TRT_MXFP8DequantizeLinear", ["x8", "xs"], "xd", output_dtype=HALF, **blocks)
    file.node("TRT_MXFP8DequantizeLinear", ["w", "ws"], "wd", output_dtype=HALF, **blocks)
    file.node("Transpose", ["wd"], "wt", perm=[1, 0])
    file.node("MatMul", ["xd", "wt"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def nvfp4(path, *, activations=True):
    """FP4 codes, FP8 scales of blocks of 16, one float32 scale of those; the blocks of x are computed by TensorRT."""
    file = File(opset=23)
    blocks = {"axis": -1, "block_size": 16}
    file.add("g", 0.01, SINGLE)
    file.add("w", np.abs(codes_of(64, 64, limit=4)), TensorProto.FLOAT4E2M1)
    file.add("ws8", np.full((64, 4), 2), E4M3)
    file.node("DequantizeLinear", ["ws8", "g"], "wsd")
    file.node("DequantizeLinear", ["w", "wsd"], "wd", **blocks)
    file.node("Cast", ["wd"], "wh", to=HALF)
    file.node("Transpose", ["wh"], "wt", perm=[1, 0])
    operand = "x"
    if activations:
        file.node("TRT_FP4DynamicQuantize", ["x", "g"], ["x4", "xs8"], scale_type=E4M3, **blocks)
        file.node("DequantizeLinear", ["xs8", "g"], "xsd")
        file.node("DequantizeLinear", ["x4", "xsd"], "xd", **blocks)
        file.node("Cast", ["xd"], "xh", to=HALF)
        operand = "xh"
    file.node("MatMul", [operand, "wt"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def power_of_two_scales(path):
    """MXFP8 in ONNX's own DequantizeLinear."""
    file = File(opset=24)
    file.add("w", codes_of(64, 64), E4M3)
    file.add("ws", np.full((2, 64), 0.5), TensorProto.FLOAT8E8M0)
    file.node("DequantizeLinear", ["w", "ws"], "wd", axis=0, block_size=32, output_dtype=HALF)
    file.node("MatMul", ["x", "wd"], "m")
    file.node("Relu", ["m"], "y")
    return file.save(path, [8, 64], [8, 64])


def attention(
    path,
    *,
    real=HALF,
    softmax_scale=1 / 448,
    quantized=("q", "k", "v"),
    scaled="before",
    dtype=E4M3,
    tokens=64,
):
    """Attention of 2 heads; the pair of the softmax is `pd`, and without a scale there is none."""
    file = File(real)
    file.add("factor", 0.125)

    def read(value):
        if value[0] not in quantized:
            return value
        file.pair(value, f"{value}d", dtype=dtype)
        return f"{value}d"

    file.node("Neg", ["x"], "v")
    query = "x"
    if scaled == "before":
        file.node("Mul", ["x", "factor"], "qs")
        query = read("qs")
    else:
        file.node("Abs", ["x"], "qa")
        file.node("Mul", [read("qa"), "factor"], "qs")
        query = "qs"
    file.node("Transpose", ["x"], "kt", perm=[0, 1, 3, 2])
    file.node("MatMul", [query, read("kt")], "scores")
    file.node("Softmax", ["scores"], "p", axis=-1)
    if softmax_scale is not None:
        file.pair("p", "pd", softmax_scale, dtype)
    file.node("MatMul", ["p" if softmax_scale is None else "pd", read("v")], "o")
    file.node("Neg", ["o"], "y")
    return file.save(path, [1, 2, tokens, 32], [1, 2, tokens, 32])
