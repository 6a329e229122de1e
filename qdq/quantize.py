"""The arithmetic of quantization: scale, codes, `fake_quantize` and its gradients.

With B the largest code and L the smallest (`formats.Format`), everything in float32:

    scale = max(amax, 2^-64) / B
    code  = clamp(round_half_even(x * (1 / scale)), L, B)
    value = code * scale

The gradient passes where the code is inside the range (straight-through; Bengio, Leonard, Courville, arXiv 1308.3432).
A learned range has the gradient of LSQ (Esser et al., ICLR 2020, arXiv 1902.08153) or of PACT (Choi et al.,
arXiv 1805.06085).

ONNX and TensorRT store the same scale, a divisor. The floor keeps a scale positive where amax is 0 (R-SCALE).
`graph.raise_scales` says what an exported file holds there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]

from qdq.errors import ArgumentError
from qdq.formats import AMAX_FLOOR, Format, scale_from_amax

RANGE_RULES = ("lsq", "pact")
_FLOAT16_MAX = torch.finfo(torch.float16).max
_PIECE = 1 << 17  # elements: what a CPU cache holds beside the result

# torch has no shape rule for this operator, and torch.export wants one as soon as a dimension is dynamic.
_OPERATOR = "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"
if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_OPERATOR}", "Meta"):
    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _library.impl(  # type: ignore[no-untyped-call]
        _OPERATOR,
        lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)),
        "Meta",
    )


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
    NaN stays NaN on the CPU; torch's operators make the smallest code of it.

    Args:
        inputs: Any shape, float16, bfloat16, float32 or float64; computed in float32, cast back once.
        amax: The range: one element, or as many as `inputs` has along `axis`.
        fmt: The format, int8 by default.
        axis: The axis that `amax` belongs to, None for one range. Where `amax` has the rank of `inputs`, its shape says
            so itself.
        range_rule: The gradient of `amax` where it requires one. "lsq": of rounding and clipping; "pact": of clipping
            alone. Both are divided by sqrt(N B), N elements a range (LSQ, section 2.2), to be of the size of others.

    Returns:
        A tensor of the shape and type of `inputs`.

    Raises:
        ArgumentError: `axis` or the size of `amax` does not fit `inputs`.
    """
    fmt = fmt or Format()
    if amax.dim() == inputs.dim():
        axis = find_range_axis(amax, axis)
    if axis is not None:
        axis = _checked_axis(inputs, amax, axis)
    if amax.numel() == 1:  # a scale of shape [1] costs TensorRT-RTX the int8 kernel (R-SHAPE)
        axis = None
    scale = (
        compute_scale(amax, fmt).flatten()
        if axis is not None
        else compute_scale(amax, fmt).reshape(())
    )
    values = inputs if inputs.dtype == torch.float32 else inputs.float()
    result = _quantize_values(values, scale, fmt, axis, range_rule)
    if inputs.dtype == torch.float16 and not torch.compiler.is_compiling():
        result = result.clamp(
            -_FLOAT16_MAX, _FLOAT16_MAX
        )  # code -128 lies beyond a range near the largest float16
    return result.to(inputs.dtype)


def find_range_axis(amax: torch.Tensor | None, axis: int | None) -> int | None:
    """The axis that ranges belong to: the one that their shape keeps, such as 1 of `[1, K, 1, 1]`.

    Args:
        amax: The ranges, None before calibration.
        axis: What holds where the shape does not say: for a list of ranges, for one range and for none.
    """
    if axis is None or amax is None or amax.dim() < 2:
        return axis
    kept = [dim for dim, size in enumerate(amax.shape) if size > 1]
    return kept[0] if len(kept) == 1 else axis


def own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that can be changed outside of `torch.inference_mode` too, wherever it is made."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _checked_axis(inputs: torch.Tensor, amax: torch.Tensor, axis: int) -> int:
    if not -inputs.dim() <= axis < inputs.dim() or amax.numel() not in (1, inputs.shape[axis]):
        raise ArgumentError(
            f"axis {axis} with {amax.numel()} ranges does not fit a tensor of shape {tuple(inputs.shape)}.",
            "give one range per index of an existing axis; for weights that is the output-channel axis.",
        )
    return axis % inputs.dim()


def _quantize_values(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None, range_rule: str
) -> torch.Tensor:
    """By torch's operators where they are needed: they export to Q/DQ, and on a GPU they are one kernel.

    On a CPU they cost three to five times the same arithmetic in place, because they fill a mask for the backward pass
    (tools/bench_forward.py); the numbers are the same to the last bit. They know no gradient of the scale.
    """
    if torch.is_grad_enabled() and scale.requires_grad:
        return _straight_through(values, scale, fmt, axis, range_rule)
    if torch.compiler.is_compiling() or is_tracing() or values.device.type != "cpu":  # type: ignore[no-untyped-call]
        return _by_operator(values, scale, fmt, axis)
    if torch.is_grad_enabled() and values.requires_grad:
        return _straight_through(values, scale, fmt, axis, range_rule)
    return _by_arithmetic(values, scale, fmt, axis)


class _StraightThrough(torch.autograd.Function):
    """Keeps what it is given, not a mask: the layer before has mostly kept the same tensor for its own gradient."""

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
        ctx.how = fmt, axis, range_rule
        return _by_arithmetic(values, scale, fmt, axis)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        values, scale = ctx.saved_tensors
        of_values, of_scale = _differentiate(
            grad, values, scale, *ctx.how, learns=ctx.needs_input_grad[1]
        )
        return of_values if ctx.needs_input_grad[0] else None, of_scale, None, None, None


def _straight_through(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None, range_rule: str
) -> torch.Tensor:
    result: torch.Tensor = _StraightThrough.apply(values, scale, fmt, axis, range_rule)
    return result


def _differentiate(
    grad: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
    axis: int | None,
    range_rule: str,
    *,
    learns: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the values and, where it `learns`, of the scale.

    That of a value passes where its code is inside, which a kernel of another function does in one pass over memory.
    With u = value / scale and the code c, d result / d scale is c where it is clipped; inside it is c - u, the rounding
    error, for "lsq", and 0 for "pact".
    """
    low, high = fmt.qmin - 0.5, fmt.qmax + 0.5
    of_values = torch.empty_like(values)
    if (
        not learns and axis is None and values.device.type == "cpu"
    ):  # on a GPU reading the scale would wait for it
        width = scale.item()
        torch.ops.aten.hardtanh_backward(
            grad, values, low * width, high * width, grad_input=of_values
        )
        return of_values, None
    sums = []
    for step, gained, given, passed, ratio, codes in _cut(
        scale, axis, grad, values, of_values, scratch=2
    ):
        torch.mul(given, step.reciprocal(), out=ratio)
        torch.ops.aten.hardtanh_backward(gained, ratio, low, high, grad_input=passed)
        if learns:
            torch.round(ratio, out=codes).clamp_(fmt.qmin, fmt.qmax)
            if range_rule == "lsq":
                codes.mul_(gained).addcmul_(passed, ratio, value=-1)
            else:
                codes.mul_(torch.sub(gained, passed, out=ratio))
            sums.append(_sum_to_scale(codes, axis))
    if not learns:
        return of_values, None
    total = torch.stack(sums).sum(0) if axis is None else torch.cat(sums)
    return of_values, total.reshape(scale.shape) / math.sqrt(
        max(values.numel(), 1) / scale.numel() * fmt.qmax
    )


def _sum_to_scale(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    others = [dim for dim in range(values.dim()) if dim != axis]
    return values.sum(others) if others else values.clone()


def _by_operator(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None
) -> torch.Tensor:
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, fmt.qmin, fmt.qmax)
    scale, zero_point = (t.expand(values.shape[axis]).contiguous() for t in (scale, zero_point))
    if not torch.compiler.is_compiling():
        # This operator casts to int64 before it clamps: a huge value in a channel of tiny range would change its sign.
        bound = _along((scale * 2.0**40).clamp_max(1e38), values, axis)
        values = torch.clamp(values, -bound, bound)
    return torch.fake_quantize_per_channel_affine(
        values, scale, zero_point, axis, fmt.qmin, fmt.qmax
    )


def _by_arithmetic(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None
) -> torch.Tensor:
    result = torch.empty_like(values)
    for step, piece, place in _cut(scale, axis, values, result):
        torch.mul(piece, step.reciprocal(), out=place).round_().clamp_(fmt.qmin, fmt.qmax).mul_(
            step
        )
    return result


def _cut(
    scale: torch.Tensor, axis: int | None, *tensors: torch.Tensor, scratch: int = 0
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of tensors of one shape in pieces that a cache holds, each behind its part of the scale, to broadcast.

    Several operators on each piece then read and write memory once. Behind the pieces come `scratch` tensors of their
    size, the same memory each time: new memory costs more than the arithmetic. A tensor that cannot be viewed so, or
    that is on a GPU, is one piece.
    """
    values = tensors[0]
    parts: list[tuple[torch.Tensor, ...]]
    pieces = -(-values.numel() // _PIECE)
    plain = values.device.type == "cpu" and all(tensor.is_contiguous() for tensor in tensors)
    if pieces > 1 and plain and axis is None:
        parts = [(scale,) * pieces, *(torch.split(tensor.view(-1), _PIECE) for tensor in tensors)]
    elif pieces > 1 and plain and axis == 0:
        rows = -(-len(values) // pieces)
        parts = [torch.split(tensor, rows) for tensor in (_along(scale, values, axis), *tensors)]
    else:
        parts = [(tensor,) for tensor in (_along(scale, values, axis), *tensors)]
    spare = [torch.empty_like(parts[1][0]) for _ in range(scratch)]
    for step, *cut in zip(*parts, strict=True):
        yield step, *cut, *(tensor[: len(cut[0])] if tensor.dim() else tensor for tensor in spare)


def quantize_codes(
    values: torch.Tensor, scale: torch.Tensor, fmt: Format, axis: int | None = None
) -> torch.Tensor:
    """The integer codes of a float32 tensor, as float32.

    Args:
        values: Any shape.
        scale: One element, or as many as `values` has along `axis`.
        fmt: The format.
        axis: The axis that `scale` belongs to, None for one scale.
    """
    return (values * _along(scale, values, axis).reciprocal()).round_().clamp_(fmt.qmin, fmt.qmax)


def _along(scale: torch.Tensor, values: torch.Tensor, axis: int | None) -> torch.Tensor:
    return (
        scale
        if axis is None
        else scale.reshape([-1 if dim == axis else 1 for dim in range(values.dim())])
    )


def from_log2(log2_amax: torch.Tensor) -> torch.Tensor:
    """The range that a learned parameter stands for; never below the floor."""
    return log2_amax.clamp_min(math.log2(AMAX_FLOOR)).exp2()
