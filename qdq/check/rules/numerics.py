"""Scales, zero points and axes: QDQ101 to QDQ106, QDQ109, QDQ129 and QDQ140."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import (
    COMMUTING_OPS,
    Array,
    GraphView,
    is_op,
    name_of,
    producer_of,
)
from qdq.graph.code_types import find_code_type, is_trt_quantizer
from qdq.graph.coverage import follow_axis, output_axis
from qdq.graph.pairs import input_of
from qdq.graph.raise_scales import least_scale

_UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT4, ir.DataType.UINT2)
_TYPES_OF_OTHER_RULES = (*_UNSIGNED, ir.DataType.INT32)
"""Types of codes that QDQ129 and QDQ108 report."""
_SMALLEST_NORMAL_HALF = float(np.finfo(np.float16).smallest_normal)
# Relative and absolute difference of scales that are the same number. A 16 bit copy is rounded to 8 bits (bfloat16), or
# to a multiple of the smallest subnormal number of float16.
_FLOAT_TOLERANCE = (1e-6, 0.0)
_HALF_TOLERANCE = (2**-8, 6e-8)
_BODY_OPS = ("If", "Loop", "Scan")


@register_rule(
    "QDQ101",
    "error",
    "A scale is zero, negative, NaN, infinite or not a float; in fp16, too small (R-SCALE).",
    "TensorRT's parser requires positive scales. An infinite one is accepted and destroys the layer's values. "
    "An fp16 scale below 6.1e-5 is subnormal and loses precision (a warning).",
    "[probe] parser error for 0, negative and NaN, none for +inf; [src] ModelOpt's guards",
)
def _scale_is_invalid(view: GraphView) -> Iterator[Flaw]:
    """Name each Q and DQ with such a scale.

    A scale without numbers in the file is skipped: QDQ109 reports the computed ones.
    """
    for node in view.qdq_nodes:
        dtype = view.dtype(node.inputs[1])
        if dtype == ir.DataType.FLOAT8E8M0:
            yield Flaw(
                node=name_of(node),
                message="a scale is FLOAT8E8M0, a power of two, which TensorRT's parser does not read (R-SCALE)",
                fix="write MXFP8 with TRT_MXFP8DequantizeLinear, as ModelOpt does, or use float scales.",
            )
            continue
        if dtype is not None and not dtype.is_floating_point():
            yield Flaw(
                node=name_of(node),
                message=f"a scale is {dtype.name}, not a float (R-SCALE)",
                fix="write it as float32.",
            )
            continue

        scale = view.constant(node.inputs[1])
        if scale is None:
            continue

        smallest = float(scale.astype(np.float64).min(initial=np.inf))
        if not _is_positive(scale):
            yield Flaw(
                node=name_of(node),
                message="a scale is zero, negative, NaN or Inf (R-SCALE)",
                fix="calibrate again.",
            )
        elif scale.dtype == np.float16 and smallest < _SMALLEST_NORMAL_HALF:
            yield Flaw(
                node=name_of(node),
                message=f"the fp16 scale {smallest:.3g} is subnormal and imprecise (R-SCALE)",
                fix="keep this layer in fp32, or find out why its range is so small.",
                severity="warning",
            )


def _is_positive(scale: Array) -> bool:
    """Whether all scales are finite and above zero."""
    values = scale.astype(np.float64)
    return bool(np.all(np.isfinite(values) & (values > 0)))


@register_rule(
    "QDQ102",
    "error",
    "A zero point is missing, not zero, or of a type that TensorRT does not read (R-SYM).",
    "TensorRT's codes are symmetric. Without a zero point ONNX quantizes to uint8 and TensorRT to int8: the numbers "
    "silently differ. A DQ of int8 codes without one is valid, and an info. TensorRT-RTX ignores the zero point of FP8 "
    "codes, and refuses the file for the types of codes that it does not read.",
    "[probe] 'Non-zero zero point is not supported' for int8, no message for FP8; [src] onnx-tensorrt",
)
def _zero_point_is_not_zero(view: GraphView) -> Iterator[Flaw]:
    """Name each Q and DQ with such a zero point.

    Unsigned codes are left to QDQ129, and int32 codes to QDQ108.
    """
    for node in view.qdq_nodes:
        code_type = view.code_type(node)
        if code_type in _TYPES_OF_OTHER_RULES:
            continue

        if code_type is not None and not find_code_type(node).is_read:
            yield Flaw(
                node=name_of(node),
                message=f"its codes are {code_type.name}, which TensorRT does not read (R-SYM)",
                fix="quantize to int8 or to FP8 (FLOAT8E4M3FN).",
            )
        elif input_of(node, 2) is None:
            yield from _check_missing_zero_point(view, node)
        else:
            yield from _check_zero_point(view, node)


def _check_missing_zero_point(view: GraphView, node: ir.Node) -> Iterator[Flaw]:
    """A Q or DQ without zero point: ONNX then takes zero, and uint8 for the codes of a Q that states no type."""
    code_type = view.code_type(node)
    if code_type is None:
        yield Flaw(
            node=name_of(node),
            message="the zero point is missing, which means uint8 in ONNX (R-SYM)",
            fix="write an int8 zero point of zero.",
        )
    elif code_type == ir.DataType.INT8 and node.op_type == "DequantizeLinear":
        yield Flaw(
            node=name_of(node),
            message="no zero point is written; with int8 codes that is zero (R-SYM)",
            fix="write an int8 zero point of zero.",
            severity="info",
        )


def _check_zero_point(view: GraphView, node: ir.Node) -> Iterator[Flaw]:
    """The numbers and the number of zero points, in this order; the first flaw counts."""
    zero_points = view.constant(node.inputs[2])
    if zero_points is None:
        return
    if np.any(zero_points.astype(np.float32)):
        yield Flaw(
            node=name_of(node),
            message="the zero point is not zero (R-SYM)",
            fix="quantize symmetrically.",
        )
        return

    scale = view.constant(node.inputs[1])
    if scale is not None and zero_points.size != scale.size:
        yield Flaw(
            node=name_of(node),
            message=f"it has {zero_points.size} zero points and {scale.size} scales",
            fix="write one for each scale.",
        )


@register_rule(
    "QDQ129",
    "error",
    "Codes are unsigned (R-SYM).",
    "TensorRT reads uint8 as int8: with zero point 0, codes above 127 saturate without an error; with another zero "
    "point the file is refused. It does not read other unsigned types at all.",
    "[probe] accepted with a warning and treated as int8; pytorch-quantization's unsigned=True writes such codes",
)
def _codes_are_unsigned(view: GraphView) -> Iterator[Flaw]:
    """Name each Q that writes such codes and each DQ that reads them."""
    for node in view.qdq_nodes:
        code_type = view.code_type(node)
        if code_type not in _UNSIGNED:
            continue

        if code_type != ir.DataType.UINT8:
            yield Flaw(
                node=name_of(node),
                message=f"its codes are {code_type.name}, which TensorRT does not read (R-SYM)",
                fix="quantize to signed, symmetric codes.",
            )
            continue

        zero_point = "the zero point"
        numbers = view.constant(input_of(node, 2))
        if numbers is not None:
            zero_point += f" of {_describe_range(numbers)}"
        yield Flaw(
            node=name_of(node),
            message=f"{zero_point} is {code_type.name}; TensorRT reads int8 (R-SYM)",
            fix="quantize to signed, symmetric int8; --fix does this if the zero point is 128.",
        )


def _describe_range(array: Array) -> str:
    """The only number in an array, or the smallest and the largest."""
    low, high = int(array.min()), int(array.max())
    if low == high:
        return f"{low}"
    return f"{low} to {high}"


@register_rule(
    "QDQ103",
    "error",
    "A per-tensor scale has shape [1] instead of being 0-D (R-SHAPE).",
    "It is valid ONNX and builds without a message, and every convolution after it, in int8 or FP8, runs in float.",
    "[probe] TensorRT-RTX 1.7.1; [doc] NvInfer.h asks for a 0-D scale",
)
def _scale_has_shape_1(view: GraphView) -> Iterator[Flaw]:
    """Name each Q and DQ with such a scale.

    The scale of a weight with one output channel may have this shape, and a scale of FP8 that no convolution reads.
    """
    for node in view.qdq_nodes:
        scale = view.constant(node.inputs[1])
        if scale is None or scale.shape != (1,):
            continue
        if view.code_type(node) == ir.DataType.INT32:  # QDQ108
            continue
        if _has_one_channel(view, node):
            continue
        if view.code_word(node) == "FP8" and not _reaches_convolution(view, node):
            continue

        yield Flaw(
            node=name_of(node),
            message="a per-tensor scale has shape [1]; TensorRT-RTX then runs in float (R-SHAPE)",
            fix="write it as a 0-D scalar; --fix does this.",
        )


def _reaches_convolution(view: GraphView, node: ir.Node) -> bool:
    """Whether a convolution reads what a Q or DQ writes."""
    readers = view.reached(node.outputs[0], COMMUTING_OPS | {"DequantizeLinear"})
    return any(is_op(reader, "Conv", "ConvTranspose") for reader in readers)


def _has_one_channel(view: GraphView, node: ir.Node) -> bool:
    """Whether a Q or DQ belongs to a weight with one output channel, for which a list of one scale is correct."""
    axis = node.attributes.get("axis")
    if axis is None or not view.is_weight(node):
        return False
    return _size_of_axis(view.shape(node.inputs[0]), axis.as_int()) == 1


def _size_of_axis(shape: tuple[int | None, ...] | None, axis: int) -> int | None:
    """The number of channels on an axis.

    Args:
        shape: Of the tensor; None if it is not known.
        axis: A negative axis counts from the end.

    Returns:
        The size; None if it is not known; -1 if there is no such axis.
    """
    if shape is None:
        return None
    if not -len(shape) <= axis < len(shape):
        return -1
    return shape[axis]


@register_rule(
    "QDQ104",
    "error",
    "An activation has more than one scale (R-ACT-PC).",
    "TensorRT takes one scale for an activation. TensorRT-RTX builds the file and runs the layer in float.",
    "[doc] NvInfer.h; [probe]",
)
def _activation_has_scales(view: GraphView) -> Iterator[Flaw]:
    """Name the Q; its DQ has the same scales, or QDQ106 names it."""
    for node in view.quantizers:
        scale = view.scale(node)
        if scale is None or scale.size < 2:
            continue

        if not view.is_weight(node):
            yield Flaw(
                node=name_of(node),
                message=f"an activation has {scale.size} scales (R-ACT-PC)",
                fix="use one per tensor.",
            )


@register_rule(
    "QDQ105",
    "error",
    "A weight's scales are not along its output channels, or the axis is missing (R-AXIS).",
    "On another axis the product leaves the int8 path, for a square weight without any message; a missing axis means "
    "1, which is wrong for most weights (R-MM-2). int8 has no block scales (R-BLOCK).",
    "[probe] a square weight with the wrong axis builds and runs in float; [src] the parser's default is 1",
)
def _axis_is_wrong(view: GraphView) -> Iterator[Flaw]:
    """Name the Q or DQ whose axis does not fit its own weight, or the product whose channels are on another axis.

    A product is looked at only if its weight is flawless by itself.
    """
    flawless = set()
    for node in view.qdq_nodes:
        scale = view.scale(node)
        if scale is None or scale.size == 1:
            continue
        if not view.is_weight(node):  # QDQ104
            continue
        if _has_blocks(node, scale):
            yield from _check_blocks(view, node, scale)
            continue

        flaws = list(_check_axis(view, node, scale))
        yield from flaws
        if not flaws:
            flawless.add(node)

    for product in view.weighted:
        dequantizer = view.dequantizer(product.inputs[1])
        if dequantizer in flawless:
            yield from _check_axis_in_product(view, product, dequantizer)


def _has_blocks(node: ir.Node, scale: Array) -> bool:
    """Whether each scale belongs to a block of values of a channel."""
    if scale.ndim > 1:
        return True
    return node.attributes.get_int("block_size", 0) != 0


def _check_blocks(view: GraphView, node: ir.Node, scale: Array) -> Iterator[Flaw]:
    """Block scales, which TensorRT supports only for types narrower than int8."""
    if view.code_type(node) in (ir.DataType.INT8, None):
        yield Flaw(
            node=name_of(node),
            message=f"int8 weights have block scales of shape {list(scale.shape)} (R-BLOCK)",
            fix="use one scale per output channel.",
        )


def _check_axis(view: GraphView, node: ir.Node, scale: Array) -> Iterator[Flaw]:
    """Whether the axis exists and has as many channels as there are scales.

    Args:
        view: The graph.
        node: The Q or DQ of a weight.
        scale: Its scales, more than one.
    """
    axis = node.attributes.get("axis")
    if axis is None:
        yield Flaw(
            node=name_of(node),
            message="the axis is missing (R-AXIS)",
            fix="write the axis attribute; --fix does this if the shape leaves no choice.",
        )
        return

    shape = view.shape(node.inputs[0])
    channels = _size_of_axis(shape, axis.as_int())
    if shape is not None and channels not in (None, scale.size):
        yield Flaw(
            node=name_of(node),
            message=f"{scale.size} scales do not fit axis {axis.as_int()} of shape {list(shape)} (R-AXIS)",
            fix="give each output channel one scale.",
        )


def _check_axis_in_product(
    view: GraphView, product: ir.Node, dequantizer: ir.Node
) -> Iterator[Flaw]:
    """Whether the axis of the scales is that of the output channels.

    The axis is followed through a Transpose. After a Reshape nothing is reported.

    Args:
        view: The graph.
        product: A weighted node.
        dequantizer: The DQ of its weight, with one scale per channel of its axis.
    """
    shape = view.shape(dequantizer.inputs[0])
    if shape is None or len(shape) < 2:
        return

    rank = len(shape)
    axis_of_weight = dequantizer.attributes["axis"].as_int() % rank
    axis = follow_axis(product.inputs[1], dequantizer, axis_of_weight)
    expected = output_axis(product, rank)
    if axis is not None and axis != expected:
        yield Flaw(
            node=name_of(product),
            message=f"the weight has scales on axis {axis}, not on its output channels (R-AXIS)",
            fix=f"quantize the weight on axis {expected}: calibrate it again.",
        )


@register_rule(
    "QDQ106",
    "error",
    "A Q and its DQ do not match, or one of them stands alone.",
    "With two scales or zero points the pair multiplies its values by their ratio. A Q that no DQ reads, or a DQ "
    "without codes, is not a pair for TensorRT.",
    "numerics of the ONNX operators; an fp16 copy of an fp32 scale is legal [probe]",
)
def _pair_does_not_match(view: GraphView) -> Iterator[Flaw]:
    """Name the Q whose codes no DQ reads, and the DQ that does not match its Q or reads no codes."""
    for node in view.quantizers:
        yield from _check_readers(view, node)
    for node in view.dequantizers:
        yield from _check_source(view, node)


def _check_readers(view: GraphView, quantizer: ir.Node) -> Iterator[Flaw]:
    """Report the first reader of the codes that is not a DQ.

    Args:
        view: The graph.
        quantizer: The Q that writes the codes.
    """
    for reader in view.reached(quantizer.outputs[0], COMMUTING_OPS | {"Concat"}):
        if not _needs_floats(reader):
            continue
        yield Flaw(
            node=name_of(quantizer),
            message=f"its codes are read by {reader.op_type} {name_of(reader)}, not by a DequantizeLinear",
            fix="put a DequantizeLinear after every QuantizeLinear.",
        )
        return


def _needs_floats(reader: ir.Node) -> bool:
    """Whether a reader of codes cannot use them in TensorRT."""
    if reader.domain != "":  # a plugin reads codes (R-PLG)
        return False
    if "Integer" in reader.op_type or reader.op_type.startswith("QLinear"):  # QDQ108
        return False
    return reader.op_type not in ("DequantizeLinear", *_BODY_OPS)


def _check_source(view: GraphView, dequantizer: ir.Node) -> Iterator[Flaw]:
    """Whether a DQ reads codes of a Q with the same parameters, or codes of the file."""
    source = view.source(dequantizer.inputs[0], COMMUTING_OPS)
    if source is None:
        return
    if is_op(source, "QuantizeLinear"):
        parameter = _find_difference(view, source, dequantizer)
        if parameter:
            yield Flaw(
                node=name_of(dequantizer),
                message=f"its {parameter} differs from that of {name_of(source)}",
                fix="give both the same scale and zero point.",
            )
        return

    if view.is_computed(dequantizer.inputs[0]) and not _may_write_codes(view, source):
        yield Flaw(
            node=name_of(dequantizer),
            message=f"it reads what {source.op_type} {name_of(source)} computes, not codes of a QuantizeLinear",
            fix="put a QuantizeLinear before it.",
        )


def _may_write_codes(view: GraphView, source: ir.Node) -> bool:
    """Whether the output of a node may be codes, or is the int32 of QDQ108.

    Codes come from plugins, integer operators and bodies; a Concat may join the codes of several Q.
    """
    if source.domain != "" or source.op_type.startswith("QLinear"):
        return True
    if source.op_type in ("Concat", "DynamicQuantizeLinear", *_BODY_OPS):
        return True
    return view.dtype(source.outputs[0]) == ir.DataType.INT32


def _find_difference(view: GraphView, quantizer: ir.Node, dequantizer: ir.Node) -> str:
    """The parameter that differs between a Q and a DQ.

    Returns:
        Its name; empty if they match, or if the numbers are not known.
    """
    scale_of_q = view.constant(quantizer.inputs[1])
    scale_of_dq = view.constant(dequantizer.inputs[1])
    if scale_of_q is None or scale_of_dq is None:
        return ""
    if not _is_finite(scale_of_q) or not _is_finite(scale_of_dq):  # QDQ101
        return ""
    if not _are_scales_equal(scale_of_q, scale_of_dq):
        return "scale"

    zeros_of_q = view.constant(input_of(quantizer, 2))
    zeros_of_dq = view.constant(input_of(dequantizer, 2))
    if zeros_of_q is None or zeros_of_dq is None:
        return ""
    if np.array_equal(_flatten(zeros_of_q), _flatten(zeros_of_dq)):
        return ""
    return "zero point"


def _are_scales_equal(first: Array, second: Array) -> bool:
    """Whether scales are equal, or a 16 bit copy of each other.

    Args:
        first: Scales, all finite.
        second: Scales, all finite.
    """
    if first.size != second.size:
        return False
    is_half = min(first.dtype.itemsize, second.dtype.itemsize) < 4
    relative, absolute = _HALF_TOLERANCE if is_half else _FLOAT_TOLERANCE
    return np.allclose(_flatten(first), _flatten(second), rtol=relative, atol=absolute)


def _is_finite(array: Array) -> bool:
    return bool(np.all(np.isfinite(_flatten(array))))


def _flatten(array: Array) -> Array:
    """The numbers of an array in one row, as float64."""
    numbers: Array = array.astype(np.float64).ravel()
    return numbers


@register_rule(
    "QDQ109",
    "error",
    "A scale is computed from the model's inputs (R-DYN).",
    "That is dynamic quantization, which TensorRT does not do from Q/DQ; the builder of TensorRT-RTX crashes on it.",
    "[probe] exit code 139 of the builder",
)
def _scale_is_computed(view: GraphView) -> Iterator[Flaw]:
    """Name each Q and DQ with such a scale; constants after Identity or Cast are not computed."""
    for node in view.qdq_nodes:
        if is_trt_quantizer(
            producer_of(node.inputs[0])
        ):  # a dynamic Q, which TensorRT has for blocks
            continue
        if view.is_computed(node.inputs[1]):
            yield Flaw(
                node=name_of(node),
                message="the scale is computed in the graph (R-DYN)",
                fix="export with calibrated amax.",
            )


@register_rule(
    "QDQ140",
    "warning",
    "A bias does not fit int32 in units of input scale * weight scale.",
    "A runtime that computes the product in integers adds the bias as int32 in these units and clips it. ONNX Runtime "
    "does so by default; TensorRT adds the bias in float. Usually the weights of the channel are all zero.",
    "measured: ONNX Runtime 1.31 loses the bias of such a channel of Conv, ConvTranspose and Gemm",
)
def _bias_does_not_fit(view: GraphView) -> Iterator[Flaw]:
    """Name the product with the bias, once for all of its channels."""
    for node in view.weighted:
        dequantizer = view.dequantizer(node.inputs[1])
        if dequantizer is None or view.code_word(dequantizer) not in ("int8", "uint8"):
            continue
        scale, smallest_scale = view.scale(dequantizer), least_scale(node)
        if scale is None or smallest_scale is None:
            continue

        # `least_scale` includes a margin of 2; within it there is no fault yet
        channels = int(np.sum(scale < smallest_scale / 2))
        if channels:
            yield Flaw(
                node=name_of(node),
                message=f"the bias of {channels} channels is clipped when it is added as int32: "
                "the weight scale is too small",
                fix="write a larger scale; --fix does this if all codes of the channel are 0, "
                "export_onnx for any channel.",
            )
