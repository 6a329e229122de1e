"""Scales, zero points and axes: QDQ101 to QDQ106, QDQ109, QDQ129 and QDQ140."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import COMMUTING_OPS, Array, GraphView, is_op, name_of
from qdq.graph.coverage import follow_axis, output_axis
from qdq.graph.raise_scales import least_scale

_UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT4, ir.DataType.UINT2)
_SIGNED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)
"""Types that TensorRT reads."""
_SMALLEST_NORMAL_HALF = float(np.finfo(np.float16).smallest_normal)


def _all_pairs(view: GraphView) -> list[ir.Node]:
    return sorted([*view.quantizers, *view.dequantizers], key=view.position)


@register_rule(
    "QDQ101",
    "error",
    "A scale is zero, negative, NaN, infinite or no float; in fp16, too small (R-SCALE).",
    "TensorRT's parser wants positive scales. An infinite one is accepted and destroys the layer's values. "
    "An fp16 scale below 6.1e-5 is subnormal and loses precision (a warning).",
    "[probe] parser error for 0, negative and NaN, none for +inf; [src] ModelOpt's guards",
)
def _scale_is_no_scale(view: GraphView) -> Iterator[Flaw]:
    for node in _all_pairs(view):
        dtype, raw = view.dtype(node.inputs[1]), view.constant(node.inputs[1])
        if dtype is not None and not dtype.is_floating_point():
            yield Flaw(
                name_of(node),
                f"a scale is {dtype.name}, not a float (R-SCALE)",
                "write it as float32.",
            )
            continue
        if raw is None:
            continue
        values = raw.astype(np.float64)
        if not np.all(np.isfinite(values) & (values > 0)):
            yield Flaw(
                name_of(node), "a scale is zero, negative, NaN or Inf (R-SCALE)", "calibrate again."
            )
        elif raw.dtype == np.float16 and np.any(values < _SMALLEST_NORMAL_HALF):
            message = f"the fp16 scale {values.min():.3g} is subnormal and imprecise (R-SCALE)"
            yield Flaw(
                name_of(node),
                message,
                "keep this layer in fp32, or look why its range is tiny.",
                "warning",
            )


@register_rule(
    "QDQ102",
    "error",
    "A zero point is missing, not zero, or of a type that TensorRT does not read (R-SYM).",
    "TensorRT's int8 is symmetric. Without a zero point ONNX quantizes to uint8 and TensorRT to int8: the numbers "
    "differ in silence. A DQ of int8 codes without one is sound, and an info.",
    "[probe] 'Non-zero zero point is not supported'; [src] onnx-tensorrt",
)
def _zero_point_is_not_zero(view: GraphView) -> Iterator[Flaw]:
    fix = "write an int8 zero point of zero."
    for node in _all_pairs(view):
        name, code_type = name_of(node), view.code_type(node)
        if len(node.inputs) < 3 or node.inputs[2] is None:
            if node.op_type == "DequantizeLinear" and code_type in _SIGNED:
                yield Flaw(
                    name,
                    "no zero point is written; with int8 codes that is zero (R-SYM)",
                    fix,
                    "info",
                )
            elif code_type not in _SIGNED and code_type not in (*_UNSIGNED, ir.DataType.INT32):
                yield Flaw(
                    name, "the zero point is missing, which means uint8 in ONNX (R-SYM)", fix
                )
            continue
        zeros = view.constant(node.inputs[2])
        if code_type in (*_UNSIGNED, ir.DataType.INT32):  # QDQ129, QDQ108
            continue
        if code_type is not None and code_type not in _SIGNED:
            yield Flaw(name, f"the zero point is {code_type.name}, not INT8 (R-SYM)", fix)
        elif zeros is not None and np.any(zeros.astype(np.float32)):
            yield Flaw(name, "the zero point is not zero (R-SYM)", "quantize symmetrically.")
        elif (
            zeros is not None
            and (scale := view.constant(node.inputs[1])) is not None
            and zeros.size != scale.size
        ):
            yield Flaw(
                name,
                f"it has {zeros.size} zero points and {scale.size} scales",
                "write one for each scale.",
            )


@register_rule(
    "QDQ129",
    "error",
    "Codes are unsigned (R-SYM).",
    "TensorRT reads uint8 as int8: with zero point 0, codes above 127 saturate without an error; with another zero "
    "point the file is refused.",
    "[probe] accepted with a warning and treated as int8; legacy unsigned=True",
)
def _codes_are_unsigned(view: GraphView) -> Iterator[Flaw]:
    for node in _all_pairs(view):
        code_type = view.code_type(node)
        if code_type not in _UNSIGNED:
            continue
        zeros = view.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        found = "" if zeros is None else f" of {_describe(zeros)}"
        yield Flaw(
            name_of(node),
            f"the zero point{found} is {code_type.name}; TensorRT reads int8 (R-SYM)",
            "quantize to signed, symmetric int8; --fix does it where the zero point is 128.",
        )


def _describe(array: Array) -> str:
    low, high = int(array.min()), int(array.max())
    return str(low) if low == high else f"{low} to {high}"


@register_rule(
    "QDQ103",
    "error",
    "A per-tensor scale has shape [1] instead of none (R-SHAPE).",
    "It is valid ONNX and builds without a message, and every int8 convolution behind it runs in float.",
    "[probe] TensorRT-RTX 1.7.1; [doc] NvInfer.h asks for a 0-D scale",
)
def _scale_has_shape_1(view: GraphView) -> Iterator[Flaw]:
    for node in _all_pairs(view):
        scale = view.constant(node.inputs[1])
        if view.code_type(node) == ir.DataType.INT32:  # QDQ108
            continue
        if scale is not None and scale.shape == (1,) and not _is_one_channel(view, node):
            message = "a per-tensor scale has shape [1]; TensorRT-RTX then runs in float (R-SHAPE)"
            yield Flaw(name_of(node), message, "write it as a 0-D scalar; --fix does.")


def _is_one_channel(view: GraphView, node: ir.Node) -> bool:
    """A weight with a single output channel has one scale for it."""
    shape, axis = view.shape(node.inputs[0]), node.attributes.get("axis")
    if shape is None or axis is None or not view.is_weight(node):
        return False
    return -len(shape) <= axis.as_int() < len(shape) and shape[axis.as_int()] == 1


@register_rule(
    "QDQ104",
    "error",
    "An activation has more than one scale (R-ACT-PC).",
    "TensorRT takes one scale for an activation. TensorRT-RTX builds the file and runs the layer in float.",
    "[doc] NvInfer.h; [probe]",
)
def _activation_has_scales(view: GraphView) -> Iterator[Flaw]:
    for node in view.quantizers:
        scale = view.scale(node)
        if scale is not None and scale.size > 1 and not view.is_weight(node):
            yield Flaw(
                name_of(node),
                f"an activation has {scale.size} scales (R-ACT-PC)",
                "use one per tensor.",
            )


@register_rule(
    "QDQ105",
    "error",
    "A weight's scales do not lie on its output channels, or their axis is not written down (R-AXIS).",
    "On another axis the product leaves the int8 path, for a square weight without any message; a missing axis means "
    "1, which is wrong for most weights (R-MM-2). int8 has no block scales (R-BLOCK).",
    "[probe] a square weight with the wrong axis builds and runs in float; [src] the parser's default is 1",
)
def _axis_is_wrong(view: GraphView) -> Iterator[Flaw]:
    sound = set()
    for node in _all_pairs(view):
        scale, codes = view.scale(node), view.shape(node.inputs[0])
        if scale is None or scale.size == 1 or not view.is_weight(node):
            continue
        axis = node.attributes.get("axis")
        if scale.ndim > 1 or node.attributes.get_int("block_size", 0) != 0:
            if view.code_type(node) in (ir.DataType.INT8, None):
                message = f"int8 weights have block scales of shape {list(scale.shape)} (R-BLOCK)"
                yield Flaw(name_of(node), message, "use one scale per output channel.")
        elif axis is None:
            fix = "write the axis attribute; --fix does where the shape leaves no choice."
            yield Flaw(name_of(node), "the axis is not written down (R-AXIS)", fix)
        elif codes is not None and not _fits(codes, axis.as_int(), scale.size):
            message = f"{scale.size} scales do not fit axis {axis.as_int()} of shape {list(codes)} (R-AXIS)"
            yield Flaw(name_of(node), message, "give each output channel one scale.")
        else:
            sound.add(node)
    for node in view.weighted:
        if (weight := view.dequantizer(node.inputs[1])) in sound and weight is not None:
            yield from _check_axis(view, node, weight)


def _fits(shape: tuple[int | None, ...], axis: int, channels: int) -> bool:
    return -len(shape) <= axis < len(shape) and shape[axis] in (None, channels)


def _check_axis(view: GraphView, node: ir.Node, weight: ir.Node) -> Iterator[Flaw]:
    codes = view.shape(weight.inputs[0])
    if codes is None or len(codes) < 2:
        return
    rank = len(codes)
    found = follow_axis(node.inputs[1], weight, weight.attributes["axis"].as_int() % rank)
    expected = output_axis(node, rank)
    if found is not None and found != expected:
        message = f"the weight has scales on axis {found}, not on its output channels (R-AXIS)"
        yield Flaw(
            name_of(node), message, f"quantize the weight on axis {expected}: calibrate it again."
        )


@register_rule(
    "QDQ106",
    "error",
    "A Q and its DQ do not belong together, or one of them stands alone.",
    "With two scales or zero points the pair multiplies its values by their ratio. A Q that no DQ reads, or a DQ "
    "without codes, is no pair for TensorRT.",
    "numerics of the ONNX operators; an fp16 copy of an fp32 scale is legal [probe]",
)
def _pair_does_not_match(view: GraphView) -> Iterator[Flaw]:
    for node in view.quantizers:
        others = [
            r for r in view.reached(node.outputs[0], COMMUTING_OPS | {"Concat"}) if _is_alone(r)
        ]
        for other in others[:1]:
            message = (
                f"its codes are read by {other.op_type} {name_of(other)}, not by a DequantizeLinear"
            )
            yield Flaw(
                name_of(node), message, "put a DequantizeLinear behind every QuantizeLinear."
            )
    for node in view.dequantizers:
        source = view.source(node.inputs[0], COMMUTING_OPS)
        if source is not None and is_op(source, "QuantizeLinear"):
            if different := _difference(view, source, node):
                message = f"its {different} differs from that of {name_of(source)}"
                yield Flaw(name_of(node), message, "give both the same scale and zero point.")
        elif (
            view.is_computed(node.inputs[0])
            and source is not None
            and _makes_no_codes(view, source)
        ):
            message = f"it reads what {source.op_type} {name_of(source)} computes, not codes of a QuantizeLinear"
            yield Flaw(name_of(node), message, "put a QuantizeLinear in front of it.")


def _is_alone(reader: ir.Node) -> bool:
    """Whether a reader of codes makes no use of them in TensorRT; a plugin does (R-PLG), a body is not known."""
    integer = "Integer" in reader.op_type or reader.op_type.startswith("QLinear")  # QDQ108
    return (
        reader.domain == ""
        and not integer
        and reader.op_type not in ("DequantizeLinear", "If", "Loop", "Scan")
    )


def _makes_no_codes(view: GraphView, source: ir.Node) -> bool:
    codes = view.dtype(source.outputs[0])
    known = source.op_type in (
        "Concat",
        "If",
        "Loop",
        "Scan",
        "DynamicQuantizeLinear",
    ) or source.op_type.startswith("QLinear")
    return source.domain == "" and not known and codes != ir.DataType.INT32  # int32 is QDQ108


def _difference(view: GraphView, quantizer: ir.Node, dequantizer: ir.Node) -> str | None:
    first, second = view.constant(quantizer.inputs[1]), view.constant(dequantizer.inputs[1])
    if first is None or second is None:
        return None
    half = any(array.dtype.itemsize < 4 for array in (first, second))
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    if not np.all(np.isfinite(a) & np.isfinite(b)):  # QDQ101
        return None
    if a.size != b.size or not np.allclose(
        a, b, rtol=2**-8 if half else 1e-6, atol=6e-8 if half else 0
    ):
        return "scale"
    zeros = [view.constant(n.inputs[2]) for n in (quantizer, dequantizer) if len(n.inputs) > 2]
    if len(zeros) == 2 and zeros[0] is not None and zeros[1] is not None:
        za, zb = (array.astype(np.float64).ravel() for array in (zeros[0], zeros[1]))
        return None if za.size == zb.size and np.array_equal(za, zb) else "zero point"
    return None


@register_rule(
    "QDQ109",
    "error",
    "A scale is computed from the model's inputs (R-DYN).",
    "That is dynamic quantization, which TensorRT does not do from Q/DQ; the builder of TensorRT-RTX crashes on it.",
    "[probe] exit code 139 of the builder",
)
def _scale_is_computed(view: GraphView) -> Iterator[Flaw]:
    for node in _all_pairs(view):
        if view.is_computed(node.inputs[1]):
            message = "the scale is computed in the graph (R-DYN)"
            yield Flaw(name_of(node), message, "export with calibrated amax.")


@register_rule(
    "QDQ140",
    "warning",
    "A bias does not fit int32 in units of input scale * weight scale.",
    "A runtime that computes the product in integers adds the bias as int32 in these units and clips it. ONNX Runtime "
    "does so by default; TensorRT adds the bias in float. Mostly the weights of the channel are all zero.",
    "measured: ONNX Runtime 1.31 loses the bias of such a channel of Conv, ConvTranspose and Gemm",
)
def _bias_does_not_fit(view: GraphView) -> Iterator[Flaw]:
    for node in view.weighted:
        least = least_scale(node)
        weight = view.dequantizer(node.inputs[1])
        scale = None if weight is None else view.scale(weight)
        if least is None or scale is None or not (channels := int(np.sum(scale < least / 2))):
            continue
        message = (
            f"the bias of {channels} channels is clipped where it is added as int32: "
            "the weight scale is too small"
        )
        fix = "write a larger scale; --fix does where all codes of the channel are 0, export_onnx for any channel."
        yield Flaw(name_of(node), message, fix)
