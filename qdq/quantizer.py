"""All quantize/dequantize arithmetic: `fake_quantize`, and `TensorQuantizer`, the module that applies it.

With B the largest code and L the smallest (`formats.Format`), everything in float32:

    scale = max(amax, 2^-64) / B
    code  = clamp(round_half_even(x * (1 / scale)), L, B)
    value = code * scale

The gradient passes where the code is inside the range (straight-through; Bengio, Leonard, Courville, arXiv 1308.3432).
A range that is learned has the gradient of LSQ (Esser et al., ICLR 2020, arXiv 1902.08153) or of PACT (Choi et al.,
arXiv 1805.06085).

ONNX and TensorRT store the same scale, a divisor. The floor keeps a scale positive where amax is 0 (R-SCALE); what an
exported file has there says `graph.raise_scales`.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.jit import is_tracing  # type: ignore[attr-defined]

from qdq.errors import ArgumentError, ArgumentTypeError, CalibrationError, StateError
from qdq.formats import Format
from qdq.observers.collector import TensorCollector
from qdq.observers.max import reduce_amax
from qdq.observers.solve import solve_amax
from qdq.observers.statistics import TensorStatistics

logger = logging.getLogger(__name__)

AMAX_FLOOR = 2.0**-64
_FLOAT16_MAX = torch.finfo(torch.float16).max
RANGE_RULES = ("lsq", "pact")
_CALIB_METHODS = {"max": "max", "histogram": "mse"}  # -> what `load_calib_amax` solves by default
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


@dataclass(frozen=True)
class QuantDescriptor:
    """How a tensor is quantized.

    Args:
        num_bits: Width in bits, 2 to 16.
        name: A name for messages.
        axis: The axis with a range for each index (negative counts from the end); None: one range per tensor.
        amax: The range, if it is already known.
        calib_method: How `load_calib_amax` solves the range by default: "max", or "histogram" for the least squared
            error. Whatever it is, everything is collected.
        unsigned: Codes start at 0 (TensorRT refuses such formats, R-SYM).
        narrow_range: Leave out the most negative code.

    Raises:
        ArgumentTypeError: A field of the wrong kind.
        ArgumentError: A field with an impossible value.
    """

    num_bits: int = 8
    name: str | None = None
    axis: int | None = None
    amax: float | Sequence[float] | None = None
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        for field, kinds in (("num_bits", int), ("axis", int | None), ("name", str | None)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ArgumentTypeError(
                    f"{field} is {value!r}, of type {type(value).__name__}.",
                    f"give {field} as {kinds}.",
                )
        if self.calib_method not in _CALIB_METHODS:
            raise ArgumentError(
                _unknown("calib_method", self.calib_method, tuple(_CALIB_METHODS)),
                "use one of those.",
            )
        if isinstance(self.amax, np.ndarray | list):
            object.__setattr__(
                self, "amax", tuple(np.asarray(self.amax, dtype=float).flatten().tolist())
            )
        _ = self.format

    @property
    def format(self) -> Format:
        """Codes and width as a `Format`."""
        return Format(self.num_bits, self.unsigned, self.narrow_range)

    def __str__(self) -> str:
        place = "per-tensor" if self.axis is None else f"axis={self.axis}"
        return f"QuantDescriptor({'unsigned ' if self.unsigned else ''}{self.num_bits}bit {place})"


def compute_scale(amax: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Scale (a divisor, as in ONNX) of a range: float32, of the shape of `amax`, always positive."""
    return amax.float().clamp_min(AMAX_FLOOR) / fmt.qmax


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


class TensorQuantizer(nn.Module):
    """Quantizes and dequantizes its input; collects ranges while calibrating; passes it through while disabled.

    Without amax the range is dynamic: the maximum of the tensor at hand. `amax` is the buffer `_amax`, which exists
    only once set, so that an uncalibrated quantizer adds nothing to a state dict. While the range is learned it is the
    parameter `_log2_amax` instead: no step of any optimizer can make it negative, and every step is relative to it.

    Args:
        quant_desc: Format, axis and the collector for calibration.
        disabled: Start disabled.
        if_quant: Start quantizing.
        if_calib: Start collecting.
    """

    _amax: torch.Tensor
    _range_rule: str | None = None
    """The gradient of a learned range, see `fake_quantize`; None while it is not learned."""

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        desc = quant_desc or QuantDescriptor()
        self.name = desc.name
        self._num_bits = desc.num_bits
        self._unsigned = desc.unsigned
        self._narrow_range = desc.narrow_range
        self._axis = desc.axis
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_calib = if_calib
        self._calibrator: TensorCollector | None = None
        self.set_calib_method(desc.calib_method)
        if desc.amax is not None:
            self.amax = desc.amax

    @property
    def format(self) -> Format:
        """Codes and width as a `Format`."""
        return Format(self._num_bits, self._unsigned, self._narrow_range)

    @property
    def axis(self) -> int | None:
        """The axis with a range for each index, or None."""
        return self._axis

    @property
    def range_axis(self) -> int | None:
        """Where the present ranges lie, by their shape: those of a checkpoint may lie on another axis than `axis`."""
        return find_range_axis(self.amax, self._axis)

    @property
    def amax(self) -> torch.Tensor | None:
        """The range as the buffer itself (edits in place take effect at once), or None before calibration.

        While it is learned, a tensor of its own.
        """
        log2_amax = self._parameters.get("_log2_amax")
        return self._buffers.get("_amax") if log2_amax is None else from_log2(log2_amax)

    @amax.setter
    def amax(self, value: float | Sequence[float] | np.ndarray[Any, Any] | torch.Tensor) -> None:
        amax = torch.as_tensor(value).detach().float()
        self._require_valid(amax)
        if self._range_rule is not None:
            raise StateError(
                f"the range of {self._label} is being learned.", "call keep_range first."
            )
        if self.amax is None or self._mends_axis(amax):
            self.register_buffer("_amax", own_tensor(amax))
        elif self._is_along_present(amax):
            if self.amax.is_inference():
                self._amax = own_tensor(self.amax)
            self.amax.copy_(amax.reshape(self.amax.shape))
        else:
            raise StateError(
                f"Changing shape when setting amax is not allowed: {self._label} has {tuple(self.amax.shape)}, "
                f"the new value {tuple(amax.shape)}.",
                "make a new quantizer for another axis.",
            )

    def _mends_axis(self, amax: torch.Tensor) -> bool:
        """Whether new ranges lie on the axis of this quantizer, and the present ones, of a checkpoint, on another."""
        if (
            not isinstance(self._axis, int)
            or self.amax is None
            or not amax.dim() == self.amax.dim() > 0
        ):
            return False
        axis = self._axis % amax.dim()
        return find_range_axis(self.amax, axis) != axis and find_range_axis(amax, axis) == axis

    def _is_along_present(self, amax: torch.Tensor) -> bool:
        """Whether new ranges have the number, and where their shape says so the axis, of the present ones."""
        present = self.amax
        assert present is not None  # noqa: S101  # the caller has looked
        if present.numel() != amax.numel():
            return False
        axis = self.range_axis
        return find_range_axis(amax, axis) == axis or amax.dim() != present.dim()

    def _require_valid(self, amax: torch.Tensor) -> None:
        if not amax.is_meta and not bool((torch.isfinite(amax) & (amax >= 0)).all()):
            raise ArgumentError(
                f"amax of {self._label} holds NaN, Inf or a negative number: {summarize_amax(amax)}.",
                "a range is the largest absolute value: finite and not below 0.",
            )
        if self._axis is None and amax.numel() != 1:
            raise ArgumentError(
                f"{self._label} is per tensor, found an amax of shape {tuple(amax.shape)}.",
                "give one number, or build the quantizer with the axis that the numbers belong to.",
            )

    def reason_against_range(self, weight: torch.Tensor | None = None) -> str:
        """What is wrong with the range, however it came into the buffer; "" if nothing is, or if there is none.

        Args:
            weight: What it quantizes, if that is a weight.
        """
        amax = self.amax
        if amax is None or amax.is_meta:
            return ""
        if not bool(torch.isfinite(amax).all()):
            return "has an amax of NaN or Inf"
        if bool((amax < 0).any()):
            return f"has a negative amax, {float(amax.min()):.3g}"
        axis, shape = self.range_axis, tuple(amax.shape)
        if amax.numel() == 1 or isinstance(axis, tuple):  # qdq.compat has ranges along several axes
            return ""
        if axis is None:
            return f"is per tensor and has {amax.numel()} ranges, of shape {shape}"
        if weight is not None and not (
            -weight.dim() <= axis < weight.dim() and amax.numel() == weight.shape[axis]
        ):
            return f"has an amax of shape {shape}, which does not fit axis {axis} of its weight {tuple(weight.shape)}"
        return ""

    def learn_range(self, rule: str = "lsq") -> nn.Parameter:
        """Make the range a parameter, log2 of amax, until `keep_range`.

        Args:
            rule: The gradient of the range, "lsq" or "pact", see `fake_quantize`.

        Returns:
            The parameter, of the shape of amax.

        Raises:
            ArgumentError: Another rule.
            StateError: No amax yet.
        """
        if rule not in RANGE_RULES:
            raise ArgumentError(_unknown("rule", rule, RANGE_RULES), "use one of those.")
        if self.amax is None:
            raise StateError(
                f"{self._label} has no amax to start from.", "calibrate first (`calibrate_model`)."
            )
        start = own_tensor(self.amax.clamp_min(AMAX_FLOOR).log2())
        self._buffers.pop("_amax", None)
        self._parameters.pop("_log2_amax", None)
        self.register_parameter("_log2_amax", parameter := nn.Parameter(start))
        self._range_rule = rule
        return parameter

    def keep_range(self) -> None:
        """End `learn_range`: the range that was reached is the buffer again; nothing where it was not learned."""
        if self._range_rule is not None:
            reached = self._parameters.pop("_log2_amax")
            assert reached is not None  # noqa: S101
            self._range_rule = None
            self.register_buffer("_amax", own_tensor(from_log2(reached)))

    @property
    def scale(self) -> torch.Tensor:
        """Scale of the current range, a divisor as in ONNX, of the shape of amax.

        Raises:
            StateError: No amax yet.
        """
        if self.amax is None:
            raise StateError(
                f"{self._label} has no amax.", "calibrate first (`calibrate_model`) or set `amax`."
            )
        return compute_scale(self.amax, self.format)

    @property
    def _label(self) -> str:
        return f"quantizer {self.name}" if self.name else "this quantizer"

    def enable(self) -> None:
        """Take part again in whatever was switched on."""
        self._disabled = False

    def disable(self) -> None:
        """Return every input as it is."""
        self._disabled = True

    def enable_quant(self) -> None:
        """Quantize from now on."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Stop quantizing; collecting is not affected."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Collect ranges from now on.

        Raises:
            StateError: There is no calibrator.
        """
        if self._calibrator is None:
            raise StateError(
                f"Calibrator was not created for {self._label}.", "call `set_calib_method` first."
            )
        self._if_calib = True

    def disable_calib(self) -> None:
        """Stop collecting; what was collected stays."""
        self._if_calib = False

    def set_calib_method(self, method: str) -> None:
        """Start over with an empty collector; "max" or "histogram" says how `load_calib_amax` solves by default.

        Raises:
            ArgumentError: Another method, or a histogram for a per-channel quantizer.
        """
        if method not in _CALIB_METHODS:
            raise ArgumentError(
                _unknown("calib_method", method, tuple(_CALIB_METHODS)), "use one of those."
            )
        if method == "histogram" and self._axis is not None:
            raise ArgumentError(
                f"{self._label} has axis={self._axis}; histograms are per tensor.",
                "use calib_method='max' for per-channel ranges.",
            )
        self._default_method = _CALIB_METHODS[method]
        self._calibrator = TensorCollector(self._axis)

    def load_calib_amax(self, method: str | None = None, **options: Any) -> None:
        """Solve amax from what was collected and store it; may be called again with another method.

        Args:
            method: As for `observers.solve.solve_amax`; None: that of `set_calib_method`.
            **options: As for `observers.solve.solve_amax`.

        Raises:
            StateError: No collector, or it saw no data.
            ArgumentError: As for `solve_amax`; another method than "max" for a per-channel quantizer.
        """
        if self._calibrator is None:
            raise StateError(
                f"Calibrator not created for {self._label}.", "call `set_calib_method` first."
            )
        statistics = self._calibrator.statistics()
        if not statistics.num_batches:
            raise StateError(
                f"{self._label} saw no data.",
                "feed batches that reach this layer between `enable_calib` and `load_calib_amax`.",
            )
        self.amax = self.solve_range(statistics, method or self._default_method, **options)

    def solve_range(
        self, statistics: TensorStatistics, method: str, **options: Any
    ) -> float | np.ndarray[Any, np.dtype[np.float32]]:
        """The range that statistics give for the format and axis of this quantizer; nothing is stored.

        Args:
            statistics: Of the tensor that it quantizes.
            method: As for `observers.solve.solve_amax`; with an axis only "max".
            **options: As for `observers.solve.solve_amax`.

        Returns:
            One number; with an axis float32, of the rank of the tensor with size 1 on all other axes.

        Raises:
            ArgumentError: As for `solve_amax`; another method than "max" with an axis.
            StateError: The axis had another length in another batch.
        """
        if self._axis is None:
            return solve_amax(statistics, self.format, method, **options)
        if method != "max":
            raise ArgumentError(
                f"{self._label} has axis={self._axis}; its ranges are maxima, not {method}.",
                "use method='max'.",
            )
        if statistics.channel_absmax is None:
            raise StateError(
                f"amax shape changed! Axis {self._axis} of {self._label} differs in length between batches.",
                "feed batches whose kept axis always has the same length, or calibrate per tensor (axis=None).",
            )
        return statistics.channel_absmax

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Collect, quantize, both or neither; the same object comes back if there is nothing to do.

        Args:
            inputs: Any shape; per channel, the kept axis must be as long as amax.
        """
        if self._disabled:
            return inputs
        if self._if_calib and self._calibrator is not None:
            self._collect(inputs, self._calibrator)
        if not self._if_quant:
            return inputs
        amax = self._range_for(inputs)
        return fake_quantize(
            inputs, amax, self.format, self._axis, range_rule=self._range_rule or RANGE_RULES[0]
        )

    def _collect(self, inputs: torch.Tensor, calibrator: TensorCollector) -> None:
        try:
            calibrator.collect(inputs)
        except CalibrationError as error:
            raise CalibrationError(
                f"the input of {self._label}: {error.message}", error.fix
            ) from None

    def _range_for(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.amax is None:
            return reduce_amax(inputs, self._axis)
        if self._range_rule is not None:
            return self.amax
        if self.amax.device != inputs.device and not torch.compiler.is_compiling():
            self._amax = own_tensor(self._amax.to(inputs.device))
        return self._amax

    def _apply(self, fn: Any, recurse: bool = True) -> TensorQuantizer:
        """Follow the module to another device; a range stays float32 in a model of halves."""
        before = self._buffers.get("_amax")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self._amax.dtype != torch.float32:
            self._amax = own_tensor(before.to(self._amax.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Create `_amax` where the checkpoint has one and this quantizer does not yet."""
        incoming = state_dict.get(prefix + "_amax")
        if incoming is not None:
            if not isinstance(incoming, torch.Tensor):
                raise ArgumentTypeError(
                    f"{prefix}_amax in the checkpoint is a {type(incoming).__name__}, not a tensor.",
                    "save it with torch.tensor(...).",
                )
            self._require_valid(incoming)
            state_dict[prefix + "_amax"] = incoming = incoming.float()
            if self.amax is None:
                self.register_buffer("_amax", own_tensor(incoming))
            elif self._lies_elsewhere(incoming):
                self._amax = own_tensor(incoming.to(self.amax.device))
            elif self.amax.numel() == incoming.numel() == 1:  # [], [1] and [1, 1] say the same
                state_dict[prefix + "_amax"] = incoming.reshape(self.amax.shape)
            if self._range_rule is None and self._amax.is_inference():
                self._amax = own_tensor(self._amax)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _lies_elsewhere(self, amax: torch.Tensor) -> bool:
        """Whether ranges of a checkpoint keep another axis than the present ones, as 2.1 did for transposed weights."""
        axes = [
            find_range_axis(ranges, None if self._axis is None else -1)
            for ranges in (self.amax, amax)
        ]
        return None not in axes and -1 not in axes and axes[0] != axes[1]

    def extra_repr(self) -> str:
        """One line: format, place, range, state."""
        parts = [
            "disabled" if self._disabled else "",
            f"{'unsigned ' if self._unsigned else ''}{self._num_bits}bit",
            "narrow" if self._narrow_range else "",
            "per-tensor" if self._axis is None else f"axis={self._axis}",
            f"amax={summarize_amax(self.amax)}",
            "quant" if self._if_quant else "",
            "calib" if self._if_calib else "",
        ]
        return " ".join(part for part in parts if part)


class SharedQuantizer(TensorQuantizer):
    """A quantizer with the range of another one: one tensor, or tensors that must agree, have one scale (R-FAN).

    It is switched on and off, and collects, on its own; what it collects goes to the other one, whose range is saved
    once and used by both. Without a buffer of its own it adds nothing to a state dict.

    Args:
        leader: The quantizer that has the range.
    """

    leader: TensorQuantizer

    def __init__(self, leader: TensorQuantizer) -> None:
        nn.Module.__init__(self)
        vars(self)["leader"] = leader  # no submodule: it stands elsewhere in the model
        self.name = None
        self._disabled = False
        self._if_quant = True
        self._if_calib = False

    @property
    def format(self) -> Format:
        """The leader's."""
        return self.leader.format

    @property
    def amax(self) -> torch.Tensor | None:
        """The leader's."""
        return self.leader.amax

    @amax.setter
    def amax(self, value: Any) -> None:
        self.leader.amax = value

    def learn_range(self, rule: str = "lsq") -> nn.Parameter:
        """The leader's is learned."""
        return self.leader.learn_range(rule)

    def keep_range(self) -> None:
        """The leader keeps its."""
        self.leader.keep_range()

    @property
    def _range_rule(self) -> str | None:  # type: ignore[override]
        return self.leader._range_rule

    @property
    def _axis(self) -> int | None:  # type: ignore[override]
        return self.leader._axis

    @property
    def _default_method(self) -> str:  # type: ignore[override]
        return self.leader._default_method

    @property
    def _calibrator(self) -> TensorCollector | None:  # type: ignore[override]
        return self.leader._calibrator

    def set_calib_method(self, method: str) -> None:
        """The leader starts over."""
        self.leader.set_calib_method(method)

    def _range_for(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.leader._range_for(inputs)

    def extra_repr(self) -> str:
        """That of the leader, and whose range it is."""
        state = "disabled " if self._disabled else ""
        return f"{state}range of {self.leader.name or 'another'}: {self.leader.extra_repr()}"


def from_log2(log2_amax: torch.Tensor) -> torch.Tensor:
    """The range that a learned parameter stands for; never below the floor."""
    return log2_amax.clamp_min(math.log2(AMAX_FLOOR)).exp2()


def summarize_amax(amax: torch.Tensor | None) -> str:
    """A range in a few characters: four decimals; smallest, largest and number of several."""
    if amax is None:
        return "dynamic"
    if amax.is_meta:
        return "meta"
    if torch.compiler.is_compiling():
        return "traced"  # torch.export prints modules, and a value that is read then becomes part of the graph
    if amax.numel() == 1:
        return f"{amax.item():.4f}"
    return f"[{amax.min().item():.4f}, {amax.max().item():.4f}]({amax.numel()})"


def _unknown(field: str, value: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{field} is {value!r}; known are {', '.join(map(repr, known))}{hint}"


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """All quantizers of a model with their dotted names; a shared one comes once."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


class _Switch:
    """Sets `_disabled` of all quantizers at once; as a with-block, puts back on exit what each one had."""

    def __init__(self, model: nn.Module, disabled: bool) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(
                f"model is of type {type(model).__name__}.", "pass a torch.nn.Module."
            )
        self._before = [
            (quantizer, quantizer._disabled) for _, quantizer in named_quantizers(model)
        ]
        for quantizer, _ in self._before:
            quantizer._disabled = disabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for quantizer, disabled in self._before:
            quantizer._disabled = disabled


def disable_quantization(model: nn.Module) -> _Switch:
    """Turn every quantizer of a model, or of a part of one, off.

    As a call it lasts; as a with-block (`with disable_quantization(model.layer1): ...`) each quantizer gets
    back the state it had.
    """
    return _Switch(model, disabled=True)


def enable_quantization(model: nn.Module) -> _Switch:
    """Turn every quantizer of a model, or of a part of one, on; call or with-block as `disable_quantization`."""
    return _Switch(model, disabled=False)
