"""The arithmetic of quantization: scale, codes, `fake_quantize` and its gradients.

With B the largest code and L the smallest (`formats.Format`), everything in float32:

    scale = max(amax, 2^-64) / B
    code  = clamp(round_half_even(x * (1 / scale)), L, B)
    value = code * scale

The gradient passes where the code is inside the range (straight-through; Bengio, Leonard, Courville, arXiv 1308.3432).
A learned range has the gradient of LSQ (Esser et al., ICLR 2020, arXiv 1902.08153) or of PACT (Choi et al.,
arXiv 1805.06085).

For FP8 (E4M3), B is 448, and a code is a number of that format. The scale divides, as in ONNX, and the codes are those
of a cast of torch:

    code  = float8_e4m3fn(clamp(x / scale, -448, 448))
    value = code * scale

ONNX and TensorRT store the same scale, a divisor. `graph.raise_scales` documents the scales of an exported file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]

from qdq.errors import ArgumentError
from qdq.formats import AMAX_FLOOR, FP8_LOWEST_OPSET, Format, scale_from_amax

RANGE_RULES = ("lsq", "pact")
"""Gradients of a learned range, see `fake_quantize`."""

_FLOAT16_MAX = torch.finfo(torch.float16).max
_PIECE = 1 << 17  # elements: a CPU cache holds this many of the input and of the result at once


def _make_meta_result(values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and mask of the operator below, without data."""
    return torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)


# torch has no shape rule for this operator, and torch.export needs one as soon as a dimension is dynamic.
_OPERATOR = "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"
if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_OPERATOR}", "Meta"):
    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _library.impl(_OPERATOR, _make_meta_result, "Meta")  # type: ignore[no-untyped-call]


def compute_scale(amax: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Scale (a divisor, as in ONNX) of a range: float32, of the shape of `amax`, always positive."""
    scale: torch.Tensor = scale_from_amax(amax.float(), fmt)
    return scale


def fake_quantize(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    fmt: Format | None = None,
    axis: int | None = None,
    *,
    range_rule: str = "lsq",
) -> torch.Tensor:
    """Quantize and dequantize.

    The gradient passes unchanged where the code is inside the range and is zero elsewhere (straight-through).
    NaN stays NaN on the CPU; the operators of torch return the smallest code for it.

    Args:
        inputs: Any shape, float16, bfloat16, float32 or float64. The arithmetic is in float32 and rounds to the type
            of `inputs` once, at the end.
        amax: The range: one element, or as many as `inputs` has along `axis`.
        fmt: The format, int8 by default.
        axis: The axis that `amax` belongs to, None for one range. An `amax` of the rank of `inputs` shows its axis by
            its shape, which takes precedence.
        range_rule: The gradient of `amax` where it requires one. "lsq" includes rounding and clipping, "pact" clipping
            only. Both are divided by sqrt(N B), with N elements per range (LSQ, section 2.2), so that they are about
            as large as the gradients of weights.

    Returns:
        A tensor of the shape and type of `inputs`.

    Raises:
        ArgumentError: `axis` or the size of `amax` does not fit `inputs`.
    """
    fmt = fmt or Format()
    axis = resolve_axis(inputs, amax, axis)
    scale = compute_scale(amax, fmt)
    scale = scale.reshape(()) if axis is None else scale.flatten()
    result = _fake_quantize_float32(inputs.float(), scale, fmt, axis, range_rule)
    if inputs.dtype == torch.float16 and not torch.compiler.is_compiling():
        # For a range near the largest float16, the value of code -128 lies beyond it.
        result = result.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return result.to(inputs.dtype)


def find_range_axis(amax: torch.Tensor | None, axis: int | None) -> int | None:
    """The axis that ranges belong to: the only one longer than 1 in their shape, such as 1 of `[1, K, 1, 1]`.

    Args:
        amax: The ranges, None before calibration.
        axis: The result if the shape does not show it: for a list of ranges, for one range and for none.
    """
    if axis is None or amax is None or amax.dim() < 2:
        return axis
    long_dims = [dim for dim, size in enumerate(amax.shape) if size > 1]
    if len(long_dims) != 1:
        return axis
    return long_dims[0]


def own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that can be changed outside of `torch.inference_mode`, even if it is made inside."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def quantize_codes(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None = None
) -> torch.Tensor:
    """The codes of a float32 tensor, as float32.

    Args:
        values: Any shape.
        scale: One element, or as many as `values` has along `axis`.
        fmt: The format.
        axis: The axis that `scale` belongs to, None for one scale.
    """
    step = _broadcast_scale(scale, values, axis)
    if fmt.is_float:
        return _round_in_place(values / step, fmt)
    return _round_in_place(values * step.reciprocal(), fmt)


def _round_in_place(ratio: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Replace values in units of their scale by codes."""
    if fmt.is_float:
        return ratio.copy_(ratio.clamp_(fmt.qmin, fmt.qmax).to(torch.float8_e4m3fn))
    return ratio.round_().clamp_(fmt.qmin, fmt.qmax)


def _divide_by_scale(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, out: torch.Tensor
) -> None:
    """Fill `out` with values in units of their scale: by division for FP8, by the reciprocal for integers."""
    if fmt.is_float:
        torch.div(values, scale, out=out)
    else:
        torch.mul(values, scale.reciprocal(), out=out)


def from_log2(log2_amax: torch.Tensor) -> torch.Tensor:
    """The range of a learned parameter, log2 of amax; never below the floor."""
    return log2_amax.clamp_min(math.log2(AMAX_FLOOR)).exp2()


def resolve_axis(inputs: torch.Tensor, amax: torch.Tensor, axis: int | None) -> int | None:
    """The axis of the ranges, counted from the front; None for one range.

    Args:
        inputs: The tensor to quantize.
        amax: Its ranges.
        axis: The axis that they belong to, see `find_range_axis`.

    Raises:
        ArgumentError: The ranges do not fit the tensor.
    """
    if amax.dim() == inputs.dim():
        axis = find_range_axis(amax, axis)
    if axis is None:
        return None
    is_axis = -inputs.dim() <= axis < inputs.dim()
    if not is_axis or amax.numel() not in (1, inputs.shape[axis]):
        raise ArgumentError(
            f"axis {axis} with {amax.numel()} ranges does not fit a tensor of shape {tuple(inputs.shape)}.",
            "give one range per index of an existing axis; for weights that is the output-channel axis.",
        )
    if amax.numel() == 1:  # a scale of shape [1] costs TensorRT-RTX the int8 kernel (R-SHAPE)
        return None
    return axis % inputs.dim()


def _fake_quantize_float32(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None, range_rule: str
) -> torch.Tensor:
    """Choose one of three implementations, which give the same bits.

    The operators of torch export to Q/DQ, and on a GPU the one for a single range is one kernel. On a CPU they cost
    three to five times as much as the same arithmetic in place, because they fill a mask for the backward pass
    (tools/bench_forward.py). They have no gradient for the scale. The one for channels reads its zero points to check
    them, and so waits for a GPU.
    """
    has_gradients = torch.is_grad_enabled()
    if has_gradients and scale.requires_grad:
        return _straight_through(values, scale, fmt, axis, range_rule)
    if fmt.is_float and _is_captured():
        return _capture_fp8(values, scale, fmt, axis)
    if _is_captured() or _is_one_kernel(values, fmt, axis):
        return fake_quantize_with_operator(values, scale, fmt, axis)
    if has_gradients and values.requires_grad:
        return _straight_through(values, scale, fmt, axis, range_rule)
    return fake_quantize_in_pieces(values, scale, fmt, axis)


def _is_captured() -> bool:
    """Whether torch records the operators instead of only running them."""
    return torch.compiler.is_compiling() or bool(is_tracing())  # type: ignore[no-untyped-call]


def _is_one_kernel(values: torch.Tensor, fmt: Format, axis: int | None) -> bool:
    """Whether the operator of torch is the fastest implementation; it has integer codes only."""
    return axis is None and not fmt.is_float and values.device.type != "cpu"


def _capture_fp8(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None
) -> torch.Tensor:
    """FP8 while torch records operators: Q/DQ by name for an ONNX file, a cast for everything else."""
    if torch.onnx.is_in_onnx_export():
        return _write_fp8(values, scale, axis)
    step = _broadcast_scale(scale, values, axis)
    ratio = values.detach() / step
    codes = ratio.clamp(fmt.qmin, fmt.qmax).to(torch.float8_e4m3fn)
    quantized = codes.float() * step
    clipped = torch.where(ratio.abs() < fmt.clip_high, values, quantized)
    # The sum is exact: a code differs by at most a factor of two from what it rounds, or it is 0 (Sterbenz).
    return clipped + (quantized - clipped).detach()


def _write_fp8(values: torch.Tensor, scale: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Q/DQ of FP8 by the names of ONNX operators: torch has no operator that its exporter writes so."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    zero_point = torch.zeros_like(scale).to(torch.float8_e4m3fn)
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (values, scale, zero_point),
        attributes,
        dtype=torch.float8_e4m3fn,
        shape=values.shape,
        version=FP8_LOWEST_OPSET,
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, zero_point),
        attributes,
        dtype=torch.float32,
        shape=values.shape,
        version=FP8_LOWEST_OPSET,
    )


def fake_quantize_with_operator(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None
) -> torch.Tensor:
    """Fake-quantize a float32 tensor with the operators of torch.

    Args:
        values: Any shape.
        scale: 0-D, or 1-D with one or as many elements as `values` has along `axis`.
        fmt: An integer format.
        axis: The axis that `scale` belongs to, counted from the front; None for one scale.
    """
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, fmt.qmin, fmt.qmax)
    num_channels = values.shape[axis]
    scale = scale.expand(num_channels).contiguous()
    zero_point = zero_point.expand(num_channels).contiguous()
    if not torch.compiler.is_compiling():
        # This operator casts to int64 before it clamps: a huge value in a channel of tiny range would change its sign.
        bound = _broadcast_scale((scale * 2.0**40).clamp_max(1e38), values, axis)
        values = torch.clamp(values, -bound, bound)
    return torch.fake_quantize_per_channel_affine(
        values, scale, zero_point, axis, fmt.qmin, fmt.qmax
    )


def fake_quantize_in_pieces(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None
) -> torch.Tensor:
    """Fake-quantize a float32 tensor with arithmetic in place, without a gradient.

    Args:
        values: Any shape.
        scale: As for `fake_quantize_with_operator`.
        fmt: The format.
        axis: Likewise.
    """
    result = torch.empty_like(values)
    length = _choose_piece_length(axis, [values, result])
    scales = _split_scale(scale, values, axis, length)
    sources = _split(values, axis, length)
    targets = _split(result, axis, length)
    for step, source, target in zip(scales, sources, targets, strict=True):
        _divide_by_scale(source, step, fmt, target)
        _round_in_place(target, fmt).mul_(step)
    return result


class _StraightThrough(torch.autograd.Function):
    """`fake_quantize_in_pieces`, or the operator of torch where it is one kernel, with gradients.

    It saves its inputs, not a mask: the layer before has usually saved the same tensor for its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        scale: torch.Tensor,
        fmt: Format,
        axis: int | None,
        range_rule: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        ctx.fmt = fmt
        ctx.axis = axis
        ctx.range_rule = range_rule
        if _is_one_kernel(values, fmt, axis):
            return fake_quantize_with_operator(values, scale, fmt, axis)
        return fake_quantize_in_pieces(values, scale, fmt, axis)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        values, scale = ctx.saved_tensors
        needs_grad_values, needs_grad_scale, *_ = ctx.needs_input_grad
        grad_values: torch.Tensor | None
        if needs_grad_scale:
            grad_values, grad_scale = _differentiate(
                grad, values, scale, ctx.fmt, ctx.axis, ctx.range_rule
            )
        else:
            grad_values = _differentiate_values(grad, values, scale, ctx.fmt, ctx.axis)
            grad_scale = None
        if not needs_grad_values:
            grad_values = None
        return grad_values, grad_scale, None, None, None


def _straight_through(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None, range_rule: str
) -> torch.Tensor:
    result: torch.Tensor = _StraightThrough.apply(values, scale, fmt, axis, range_rule)
    return result


def _differentiate_values(
    grad: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None
) -> torch.Tensor:
    """The gradient of the values: it passes where a code is inside.

    `hardtanh_backward` does that in one pass over memory.
    """
    grad_values = torch.empty_like(values)
    if axis is None and values.device.type == "cpu":  # on a GPU reading the scale would wait for it
        width = scale.item()
        low, high = fmt.clip_low * width, fmt.clip_high * width
        torch.ops.aten.hardtanh_backward(grad, values, low, high, grad_input=grad_values)
        return grad_values

    length = _choose_piece_length(axis, [grad, values, grad_values])
    scales = _split_scale(scale, values, axis, length)
    grads = _split(grad, axis, length)
    sources = _split(values, axis, length)
    targets = _split(grad_values, axis, length)
    scratch = torch.empty_like(grads[0])
    for step, piece_grad, source, target in zip(scales, grads, sources, targets, strict=True):
        ratio = _trim(scratch, source)
        _pass_inside(piece_grad, source, step, fmt, ratio, target)
    return grad_values


def _differentiate(
    grad: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    axis: int | None,
    range_rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the values and of the scale.

    With u = value / scale and the code c, d result / d scale is c where the value is clipped. Inside it is c - u, the
    rounding error, for "lsq", and 0 for "pact".
    """
    grad_values = torch.empty_like(values)
    length = _choose_piece_length(axis, [grad, values, grad_values])
    scales = _split_scale(scale, values, axis, length)
    grads = _split(grad, axis, length)
    sources = _split(values, axis, length)
    targets = _split(grad_values, axis, length)
    # The same scratch memory for every piece: new memory costs more than the arithmetic.
    ratio_scratch = torch.empty_like(grads[0])
    codes_scratch = torch.empty_like(grads[0])
    sums = []
    for step, piece_grad, source, target in zip(scales, grads, sources, targets, strict=True):
        ratio = _trim(ratio_scratch, source)
        codes = _trim(codes_scratch, source)
        _pass_inside(piece_grad, source, step, fmt, ratio, target)
        _round_in_place(codes.copy_(ratio), fmt)
        if range_rule == "lsq":
            codes.mul_(piece_grad).addcmul_(target, ratio, value=-1)
        else:
            codes.mul_(torch.sub(piece_grad, target, out=ratio))
        sums.append(_sum_to_scale(codes, axis))

    total = _join_sums(sums, axis)
    elements_per_range = max(values.numel(), 1) / scale.numel()
    return grad_values, total.reshape(scale.shape) / math.sqrt(elements_per_range * fmt.qmax)


def _pass_inside(
    grad: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    ratio: torch.Tensor,
    grad_values: torch.Tensor,
) -> None:
    """Fill `ratio` with value / scale, and `grad_values` with the gradient where the code is inside, 0 elsewhere."""
    _divide_by_scale(values, scale, fmt, ratio)
    torch.ops.aten.hardtanh_backward(
        grad, ratio, fmt.clip_low, fmt.clip_high, grad_input=grad_values
    )


def _join_sums(sums: list[torch.Tensor], axis: int | None) -> torch.Tensor:
    """The sums of all pieces: their sum without an axis, else one after the other."""
    if len(sums) == 1:
        return sums[0]
    return torch.stack(sums).sum(0) if axis is None else torch.cat(sums)


def _sum_to_scale(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The sum over all dimensions but `axis`."""
    summed_dims = [dim for dim in range(values.dim()) if dim != axis]
    if not summed_dims:
        return values.clone()
    return values.sum(summed_dims)


def _broadcast_scale(scale: torch.Tensor, values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """A view of the scale that broadcasts to the values along the axis."""
    if axis is None:
        return scale
    shape = [1] * values.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _choose_piece_length(axis: int | None, tensors: Sequence[torch.Tensor]) -> int | None:
    """Length of the pieces in which to compute with tensors of one shape, so that a CPU cache holds them.

    Several operators on each piece then read and write memory once.

    Returns:
        A number of elements without an axis, or of rows along axis 0. None for one piece: the tensors are small, on a
        GPU, or cannot be viewed in pieces.
    """
    values = tensors[0]
    if values.device.type != "cpu" or values.numel() <= _PIECE:
        return None
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    if axis is None:
        return _PIECE
    if axis == 0:
        num_pieces = math.ceil(values.numel() / _PIECE)
        return math.ceil(len(values) / num_pieces)
    return None


def _split(tensor: torch.Tensor, axis: int | None, length: int | None) -> Sequence[torch.Tensor]:
    """Views of the pieces of a tensor, of the length that `_choose_piece_length` returned."""
    if length is None:
        return (tensor,)
    if axis is None:
        tensor = tensor.view(-1)
    return torch.split(tensor, length)


def _split_scale(
    scale: torch.Tensor, values: torch.Tensor, axis: int | None, length: int | None
) -> Sequence[torch.Tensor]:
    """The scale of each piece of `values`, to broadcast."""
    if axis is not None:
        return _split(_broadcast_scale(scale, values, axis), axis, length)
    if length is None:
        return (scale,)
    return (scale,) * math.ceil(values.numel() / length)


def _trim(scratch: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """The part of a scratch tensor that has the shape of a piece: the last piece may be shorter."""
    if scratch.shape == piece.shape:
        return scratch
    return scratch[: len(piece)]
