"""`TensorQuantizer`: the module that holds a range, collects statistics for it and applies `quantize.fake_quantize`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qdq.errors import ArgumentError, ArgumentTypeError, CalibrationError, StateError
from qdq.formats import AMAX_FLOOR, FP8_BITS, Format, NumBits
from qdq.observers.collector import TensorCollector
from qdq.observers.max import reduce_amax
from qdq.observers.solve import solve_amax
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.quantize import (
    RANGE_RULES,
    compute_scale,
    fake_quantize,
    find_range_axis,
    from_log2,
    own_tensor,
)

logger = logging.getLogger(__name__)

# Method of `set_calib_method` -> default method of `load_calib_amax`
_CALIB_METHODS = {"max": "max", "histogram": "mse"}


@dataclass(frozen=True)
class QuantDescriptor:
    """How a tensor is quantized.

    Args:
        num_bits: Width in bits, 2 to 16; (4, 3) for FP8 E4M3.
        name: A name for messages.
        axis: The axis with a range for each index (negative counts from the end); None for one range per tensor.
        amax: The range, if it is already known.
        calib_method: The default method of `load_calib_amax`: "max", or "histogram" for the least squared error. Both
            collect the same statistics.
        unsigned: Codes start at 0 (TensorRT refuses such formats, R-SYM).
        narrow_range: Leave out the most negative code.

    Raises:
        ArgumentTypeError: A field of the wrong kind.
        ArgumentError: A field with an invalid value.
    """

    num_bits: NumBits = 8
    name: str | None = None
    axis: int | None = None
    amax: float | Sequence[float] | None = None
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_bits, list):  # from JSON or YAML
            object.__setattr__(self, "num_bits", tuple(self.num_bits))
        self._require_type("num_bits", int | tuple)
        self._require_type("axis", int | None)
        self._require_type("name", str | None)
        _require_choice("calib_method", self.calib_method, tuple(_CALIB_METHODS))
        if isinstance(self.amax, np.ndarray | list):  # a tuple can be hashed
            ranges = np.asarray(self.amax, dtype=float).flatten().tolist()
            object.__setattr__(self, "amax", tuple(ranges))
        _ = self.format  # refuses an invalid width

    def _require_type(self, field: str, kinds: Any) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ArgumentTypeError(
                f"{field} is {value!r}, of type {type(value).__name__}.",
                f"give {field} as {kinds}.",
            )

    @property
    def format(self) -> Format:
        """Codes and width as a `Format`."""
        return Format(self.num_bits, self.unsigned, self.narrow_range)

    def __str__(self) -> str:
        place = "per-tensor" if self.axis is None else f"axis={self.axis}"
        sign = "unsigned " if self.unsigned else ""
        return f"QuantDescriptor({sign}{_describe_width(self.num_bits)} {place})"


class TensorQuantizer(nn.Module):
    """Quantizes and dequantizes its input; collects statistics while calibrating; returns it unchanged while disabled.

    Without amax the range is dynamic: the maximum of the input. `amax` is the buffer `_amax`, which exists only once it
    is set, so that an uncalibrated quantizer adds nothing to a state dict. While the range is learned it is the
    parameter `_log2_amax` instead: no step of an optimizer can make it negative, and every step is relative to it.

    A range is stored on the device of the quantizer, wherever its value comes from. `module.to(device)` moves the
    quantizer even before it has a range.

    Args:
        quant_desc: Format, axis and the collector for calibration.
        disabled: Start disabled.
        if_quant: Start quantizing.
        if_calib: Start collecting.
    """

    _amax: torch.Tensor
    calibration_call = "calibrate_model"
    """The function that gives it a range, for messages; another one where ranges come from elsewhere."""
    is_fixed = False
    """Whether the range is known without data."""
    _range_rule: str | None = None
    """The gradient of a learned range, see `fake_quantize`; None while it is not learned."""
    _place = torch.empty(0, device="cpu")
    """An empty tensor where the first range will be stored: unlike a device, it follows `torch.load(map_location=)`."""

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        self._move(torch.empty(0))  # follows `with torch.device(...)`
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
    def num_bits(self) -> NumBits:
        """Width of the codes in bits; (4, 3) for FP8 E4M3."""
        return self.format.num_bits

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0."""
        return self.format.unsigned

    @property
    def narrow_range(self) -> bool:
        """Whether the most negative code is left out."""
        return self.format.narrow_range

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
        """The axis of the current ranges, from their shape; for ranges of a checkpoint it may differ from `axis`."""
        return find_range_axis(self.amax, self._axis)

    @property
    def device(self) -> torch.device:
        """Where the range is, or where the first one will be stored."""
        stored = self._stored_range
        return self._place.device if stored is None else stored.device

    @property
    def _stored_range(self) -> torch.Tensor | None:
        """The buffer or the parameter with the range."""
        amax = self._buffers.get("_amax")
        return self._parameters.get("_log2_amax") if amax is None else amax

    def _move(self, neighbour: torch.Tensor) -> None:
        """Store the first range on the device of a tensor, unless that is "meta", which holds no values."""
        if not neighbour.is_meta and neighbour.device != self._place.device:
            self._place = torch.empty(0, device=neighbour.device)

    @property
    def amax(self) -> torch.Tensor | None:
        """The range as the buffer itself (edits in place take effect at once), or None before calibration.

        While it is learned, a new tensor.

        Setting it before calibration creates the buffer; later it changes the values in the buffer. Numbers, sequences,
        arrays and tensors are accepted: one range, or one for each index of the axis.

        Raises:
            ArgumentError: NaN, infinity or a negative number; several ranges for a quantizer without an axis.
            StateError: The number of ranges differs from before; the range is being learned.
        """
        log2_amax = self._parameters.get("_log2_amax")
        if log2_amax is not None:
            return from_log2(log2_amax)
        return self._buffers.get("_amax")

    @amax.setter
    def amax(self, value: float | Sequence[float] | np.ndarray[Any, Any] | torch.Tensor) -> None:
        amax = torch.as_tensor(value).detach().float()
        self._require_valid(amax)
        if self._range_rule is not None:
            raise StateError(
                f"the range of {self._label} is being learned.", "call keep_range first."
            )
        former = self.amax
        if former is None or self._mends_axis(amax):
            self.register_buffer("_amax", self._own_range(amax))
            return
        if not self._fits_range(former, amax):
            raise StateError(
                f"Changing shape when setting amax is not allowed: {self._label} has {tuple(former.shape)}, "
                f"the new value {tuple(amax.shape)}.",
                "make a new quantizer for another axis.",
            )
        if former.is_inference():
            self._amax = former = own_tensor(former)
        former.copy_(self._own_range(amax).reshape(former.shape))

    def _own_range(self, amax: torch.Tensor) -> torch.Tensor:
        """A copy on the device of the quantizer; one that comes from the CPU does not wait for that device."""
        device = self._place.device if self.device.type == "meta" else self.device
        with torch.inference_mode(False):
            # Nobody else changes this copy while it is being sent.
            owned = own_tensor(amax)
            return owned if amax.is_meta else owned.to(device, non_blocking=amax.is_cpu)

    def _mends_axis(self, amax: torch.Tensor) -> bool:
        """Whether new ranges are on the axis of this quantizer while the current ones, from a checkpoint, are not."""
        former = self.amax
        if former is None or not isinstance(self._axis, int):  # qdq.compat has several axes
            return False
        if amax.dim() == 0 or amax.dim() != former.dim():
            return False
        axis = self._axis % amax.dim()
        return find_range_axis(former, axis) != axis and find_range_axis(amax, axis) == axis

    def _fits_range(self, former: torch.Tensor, amax: torch.Tensor) -> bool:
        """Whether there are as many new ranges as former ones, on the same axis as far as their shape shows."""
        if former.numel() != amax.numel():
            return False
        axis = find_range_axis(former, self._axis)
        return find_range_axis(amax, axis) == axis or amax.dim() != former.dim()

    def _require_valid(self, amax: torch.Tensor) -> None:
        is_valid = torch.isfinite(amax) & (amax >= 0)
        if not amax.is_meta and not bool(is_valid.all()):
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
        """The reason why the range in the buffer cannot be used; "" if it can be, or if there is none.

        Args:
            weight: The weight that it quantizes, if it quantizes one.
        """
        amax = self.amax
        if amax is None or amax.is_meta:
            return ""
        if not bool(torch.isfinite(amax).all()):
            return "has an amax of NaN or Inf"
        if bool((amax < 0).any()):
            return f"has a negative amax, {float(amax.min()):.3g}"
        axis = self.range_axis
        if amax.numel() == 1 or isinstance(axis, tuple):  # qdq.compat has ranges along several axes
            return ""
        shape = tuple(amax.shape)
        if axis is None:
            return f"is per tensor and has {amax.numel()} ranges, of shape {shape}"
        if weight is not None and not _fits_axis(amax, weight, axis):
            return f"has an amax of shape {shape}, which does not fit axis {axis} of its weight {tuple(weight.shape)}"
        return ""

    def learn_range(self, rule: str = "lsq") -> nn.Parameter:
        """Make the range a parameter, log2 of amax, until `keep_range`.

        Args:
            rule: The gradient of the range, "lsq" or "pact", see `fake_quantize`.

        Returns:
            The parameter, of the shape of amax.

        Raises:
            ArgumentError: An unknown rule.
            StateError: No amax yet.
        """
        _require_choice("rule", rule, RANGE_RULES)
        if self.amax is None:
            raise StateError(
                f"{self._label} has no amax to start from.", "calibrate first (`calibrate_model`)."
            )
        start = own_tensor(self.amax.clamp_min(AMAX_FLOOR).log2())
        self._buffers.pop("_amax", None)
        self._parameters.pop("_log2_amax", None)
        parameter = nn.Parameter(start)
        self.register_parameter("_log2_amax", parameter)
        self._range_rule = rule
        return parameter

    def keep_range(self) -> None:
        """End `learn_range`: the learned range becomes the buffer. Does nothing if it was not learned."""
        if self._range_rule is None:
            return
        log2_amax = self._parameters.pop("_log2_amax")
        assert log2_amax is not None  # noqa: S101  # `learn_range` registered it
        self._range_rule = None
        self.register_buffer("_amax", own_tensor(from_log2(log2_amax)))

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

    @property
    def leader(self) -> TensorQuantizer:
        """The quantizer that holds the range: this one, unless it shares the range of another one."""
        return self

    @property
    def is_enabled(self) -> bool:
        """Whether it takes part at all; a disabled quantizer returns its input."""
        return not self._disabled

    @is_enabled.setter
    def is_enabled(self, value: bool) -> None:
        self._disabled = not value

    @property
    def is_quantizing(self) -> bool:
        """Whether it quantizes while it is enabled."""
        return self._if_quant

    @property
    def is_collecting(self) -> bool:
        """Whether it collects statistics while it is enabled."""
        return self._if_calib

    @property
    def is_active(self) -> bool:
        """Whether it does anything to its input, or collects it."""
        return not self._disabled and (self._if_quant or self._if_calib)

    @contextmanager
    def restoring_state(self) -> Iterator[None]:
        """Restore on exit whether it is enabled, quantizes and collects."""
        state = self._disabled, self._if_quant, self._if_calib
        try:
            yield
        finally:
            self._disabled, self._if_quant, self._if_calib = state

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Neither quantize nor collect in the block. `enable` and `disable` in the block outlast it."""
        modes = self._if_quant, self._if_calib
        self._if_quant = False
        self._if_calib = False
        try:
            yield
        finally:
            self._if_quant, self._if_calib = modes

    @contextmanager
    def collecting_into(self, collector: TensorCollector) -> Iterator[None]:
        """Collect into another collector in the block, without quantizing.

        Args:
            collector: Gets the statistics; the collectors of this quantizer and of its leader do not change.
        """
        leader = self.leader
        calibrator = leader._calibrator
        with self.pausing():
            leader._calibrator = collector
            self._if_calib = True
            try:
                yield
            finally:
                leader._calibrator = calibrator

    @contextmanager
    def restoring_range_on_error(self) -> Iterator[None]:
        """Restore the range, or its absence, if the block raises."""
        former = self._buffers.get("_amax")
        if former is not None:
            former = former.clone()
        try:
            yield
        except BaseException:
            self._buffers.pop("_amax", None)
            if former is not None:
                self._buffers["_amax"] = former
            raise

    @contextmanager
    def using_range(self, amax: float) -> Iterator[None]:
        """Quantize with another range in the block, even if the quantizer is disabled.

        Args:
            amax: One range for the whole tensor.
        """
        leader = self.leader
        buffers = leader._buffers
        former = buffers.get("_amax")
        temporary = torch.full((), amax, dtype=torch.float32, device=leader.device)
        with self.restoring_state():
            self._disabled = False
            self._if_quant = True
            buffers["_amax"] = temporary
            try:
                yield
            finally:
                if former is None:
                    del buffers["_amax"]
                else:
                    buffers["_amax"] = former

    def enable(self) -> None:
        """Quantize and collect again, as far as these are switched on."""
        self._disabled = False

    def disable(self) -> None:
        """Return every input unchanged from now on."""
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
        """Stop collecting; the collected statistics stay."""
        self._if_calib = False

    def set_calib_method(self, method: str) -> None:
        """Start again with an empty collector.

        Args:
            method: The default of `load_calib_amax`: "max", or "histogram" for the least squared error.

        Raises:
            ArgumentError: An unknown method, or a histogram for a per-channel quantizer.
        """
        _require_choice("calib_method", method, tuple(_CALIB_METHODS))
        if method == "histogram" and self._axis is not None:
            raise ArgumentError(
                f"{self._label} has axis={self._axis}; histograms are per tensor.",
                "use calib_method='max' for per-channel ranges.",
            )
        self._default_method = _CALIB_METHODS[method]
        self._calibrator = TensorCollector(self._axis)

    def set_format(self, num_bits: NumBits, axis: int | None = None) -> None:
        """Change the format and the axis; the range and the collected statistics are dropped.

        Args:
            num_bits: As for `QuantDescriptor`.
            axis: Likewise.

        Raises:
            ArgumentError: An invalid width, or FP8 for an unsigned quantizer.
            StateError: The range is being learned.
        """
        if self._range_rule is not None:
            raise StateError(
                f"the range of {self._label} is being learned.", "call keep_range first."
            )
        _ = Format(num_bits, self._unsigned, self._narrow_range)  # refuses an invalid one
        self._num_bits = num_bits
        self._axis = axis
        self._buffers.pop("_amax", None)
        self._calibrator = TensorCollector(axis)

    def load_calib_amax(self, method: str | None = None, **options: Any) -> None:
        """Compute amax from the collected statistics and store it; may be called again with another method.

        Args:
            method: As for `observers.solve.solve_amax`; None for the default of `set_calib_method`.
            **options: As for `observers.solve.solve_amax`.

        Raises:
            StateError: No collector, or it saw no data.
            ArgumentError: As for `solve_amax`; a method other than "max" for a per-channel quantizer.
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
        """Compute a range from statistics, for the format and axis of this quantizer; nothing is stored.

        Args:
            statistics: Statistics of the tensor that it quantizes.
            method: As for `observers.solve.solve_amax`; with an axis only "max".
            **options: As for `observers.solve.solve_amax`.

        Returns:
            One number; with an axis float32, of the rank of the tensor with size 1 on all other axes.

        Raises:
            ArgumentError: As for `solve_amax`; a method other than "max" with an axis.
            StateError: The length of the axis differs between batches.
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
                "feed batches in which that axis always has the same length, or calibrate per tensor (axis=None).",
            )
        return statistics.channel_absmax

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Collect, quantize, both or neither, depending on the state.

        Args:
            inputs: Any shape; per channel, the axis must be as long as amax.

        Returns:
            The quantized tensor, of the shape and type of `inputs`; `inputs` itself if it does not quantize.

        Raises:
            ArgumentError: The range does not fit the shape.
            CalibrationError: The input contains NaN or infinity while it collects.
        """
        if self._disabled:
            return inputs
        if self._if_calib and self._calibrator is not None:
            self._collect(inputs, self._calibrator)
        if not self._if_quant:
            return inputs
        return self._quantize(inputs)

    def _quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        amax = self._range_for(inputs)
        range_rule = self._range_rule or RANGE_RULES[0]
        return fake_quantize(inputs, amax, self.format, self._axis, range_rule=range_rule)

    def _collect(self, inputs: torch.Tensor, calibrator: TensorCollector) -> None:
        self.leader._move(inputs)
        try:
            calibrator.collect(inputs)
        except CalibrationError as error:
            raise CalibrationError(
                f"the input of {self._label}: {error.message}", error.fix
            ) from None

    def _range_for(self, inputs: torch.Tensor) -> torch.Tensor:
        amax = self.amax
        if amax is None:
            return reduce_amax(inputs, self._axis)
        if self._range_rule is not None:
            return amax
        if amax.device != inputs.device and not torch.compiler.is_compiling():
            self._amax = own_tensor(self._amax.to(inputs.device))
        return self._amax

    def _apply(self, fn: Any, recurse: bool = True) -> TensorQuantizer:
        """Follow the module to another device; a range stays float32 in a half-precision model."""
        former = self._buffers.get("_amax")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if former is not None and self._amax.dtype != torch.float32:
            self._amax = own_tensor(former.to(self._amax.device))
        stored = self._stored_range
        self._move(fn(self._place) if stored is None else stored)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load `_amax` even if this quantizer has none yet, or has ranges of another axis."""
        key = prefix + "_amax"
        saved = state_dict.get(key)
        if saved is not None:
            if not isinstance(saved, torch.Tensor):
                raise ArgumentTypeError(
                    f"{key} in the checkpoint is a {type(saved).__name__}, not a tensor.",
                    "save it with torch.tensor(...).",
                )
            self._require_valid(saved)
            state_dict[key] = self._prepare_loading(saved.float())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _prepare_loading(self, saved: torch.Tensor) -> torch.Tensor:
        """Give `_amax` the shape of the saved ranges; returns them in the shape of `_amax`."""
        former = self.amax
        if former is None:
            self.register_buffer("_amax", self._own_range(saved))
        elif self._has_other_axis(former, saved):
            self._amax = own_tensor(saved.to(former.device))
        elif former.numel() == saved.numel() == 1:  # [], [1] and [1, 1] are the same range
            saved = saved.reshape(former.shape)
        if self._range_rule is None and self._amax.is_inference():
            self._amax = own_tensor(self._amax)
        return saved

    def _has_other_axis(self, former: torch.Tensor, saved: torch.Tensor) -> bool:
        """Whether saved ranges are on another axis than the current ones, like those of 2.1 for transposed weights."""
        if self._axis is None:
            return False
        unknown = -1
        former_axis = find_range_axis(former, unknown)
        saved_axis = find_range_axis(saved, unknown)
        return unknown not in (former_axis, saved_axis) and former_axis != saved_axis

    def extra_repr(self) -> str:
        """One line: state, format, axis and range."""
        parts = []
        if self._disabled:
            parts.append("disabled")
        if self._unsigned:
            parts.append("unsigned")
        parts.append(_describe_width(self._num_bits))
        if self._narrow_range:
            parts.append("narrow")
        parts.append("per-tensor" if self._axis is None else f"axis={self._axis}")
        parts.append(f"amax={summarize_amax(self.amax)}")
        if self._if_quant:
            parts.append("quant")
        if self._if_calib:
            parts.append("calib")
        return " ".join(parts)


class SoftmaxQuantizer(TensorQuantizer):
    """An FP8 quantizer of the output of a softmax, whose range is 1: its scale is exactly 1/448.

    TensorRT fuses FP8 attention with this scale. Calibration and training leave the range as it is.
    """

    is_fixed = True

    def __init__(self) -> None:
        super().__init__(QuantDescriptor(num_bits=FP8_BITS, amax=1.0))


class SharedQuantizer(TensorQuantizer):
    """A quantizer with the range of another one, for tensors that must have the same scale (R-FAN).

    It has a separate state, but collects into the collector of the leader. The range is saved once, with the leader:
    a shared quantizer has no buffer and adds nothing to a state dict.

    Args:
        leader: The quantizer that has the range.
    """

    def __init__(self, leader: TensorQuantizer) -> None:
        nn.Module.__init__(self)
        vars(self)["leader"] = leader  # not a submodule: it is elsewhere in the model
        self.name = None
        self._disabled = False
        self._if_quant = True
        self._if_calib = False

    @property
    def leader(self) -> TensorQuantizer:
        """The quantizer that holds the range."""
        leader: TensorQuantizer = vars(self)["leader"]
        return leader

    @property
    def device(self) -> torch.device:
        """Where the range of the leader is, or will be."""
        return self.leader.device

    @property
    def format(self) -> Format:
        """Format of the leader."""
        return self.leader.format

    @property
    def amax(self) -> torch.Tensor | None:
        """The range of the leader."""
        return self.leader.amax

    @amax.setter
    def amax(self, value: Any) -> None:
        self.leader.amax = value

    def learn_range(self, rule: str = "lsq") -> nn.Parameter:
        """Learn the range of the leader, see `TensorQuantizer.learn_range`."""
        return self.leader.learn_range(rule)

    def keep_range(self) -> None:
        """End `learn_range` of the leader."""
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

    def set_format(self, num_bits: NumBits, axis: int | None = None) -> None:
        """Change the format of the leader."""
        self.leader.set_format(num_bits, axis)

    def set_calib_method(self, method: str) -> None:
        """Start again with an empty collector of the leader."""
        self.leader.set_calib_method(method)

    def _range_for(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.leader._range_for(inputs)

    def extra_repr(self) -> str:
        """One line: the leader, and its line."""
        state = "disabled " if self._disabled else ""
        return f"{state}range of {self.leader.name or 'another'}: {self.leader.extra_repr()}"


def summarize_amax(amax: torch.Tensor | None) -> str:
    """A range in a few characters, with four decimals.

    Several ranges are summarized by the smallest, the largest and their number. Without a value it is "dynamic" (no
    range), "meta" (no data) or "traced".
    """
    if amax is None:
        return "dynamic"
    if amax.is_meta:
        return "meta"
    if torch.compiler.is_compiling():
        return "traced"  # torch.export prints modules, and a value that is read then becomes part of the graph
    if amax.numel() == 1:
        return f"{amax.item():.4f}"
    return f"[{amax.min().item():.4f}, {amax.max().item():.4f}]({amax.numel()})"


def _describe_width(num_bits: NumBits) -> str:
    """The width for a line of text."""
    return "E4M3" if isinstance(num_bits, tuple) else f"{num_bits}bit"


def _fits_axis(amax: torch.Tensor, weight: torch.Tensor, axis: int) -> bool:
    """Whether a weight has the axis, and one range for each index of it."""
    is_axis = -weight.dim() <= axis < weight.dim()
    return is_axis and amax.numel() == weight.shape[axis]


def _require_choice(field: str, value: object, choices: Sequence[str]) -> None:
    if value in choices:
        return
    message = f"{field} is {value!r}; known are {', '.join(map(repr, choices))}"
    matches = difflib.get_close_matches(str(value), choices, n=1)
    if matches:
        message += f", did you mean {matches[0]!r}?"
    raise ArgumentError(message, "use one of those.")


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """All quantizers of a model with their dotted names.

    Args:
        model: Any module.

    Yields:
        Name and quantizer, in the order of `named_modules`; a quantizer that is used twice only once.
    """
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            yield name, module


class _Switch:
    """Enables or disables all quantizers at once; as a with-block, restores their states on exit."""

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(
                f"model is of type {type(model).__name__}.", "pass a torch.nn.Module."
            )
        self._former_states = [
            (quantizer, quantizer.is_enabled) for _, quantizer in named_quantizers(model)
        ]
        for quantizer, _ in self._former_states:
            quantizer.is_enabled = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for quantizer, was_enabled in self._former_states:
            quantizer.is_enabled = was_enabled


def disable_quantization(model: nn.Module) -> _Switch:
    """Disable every quantizer of a model, or of a part of one.

    A plain call is permanent. As a with-block (`with disable_quantization(model.layer1): ...`) it restores the state of
    every quantizer on exit.

    Args:
        model: The model or the part.

    Raises:
        ArgumentTypeError: `model` is not a module.
    """
    return _Switch(model, enabled=False)


def enable_quantization(model: nn.Module) -> _Switch:
    """Enable every quantizer of a model, or of a part of one; a call or a with-block, like `disable_quantization`.

    Args:
        model: The model or the part.

    Raises:
        ArgumentTypeError: `model` is not a module.
    """
    return _Switch(model, enabled=True)


@contextmanager
def toggling(quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
    """In the block, disable the quantizers that are enabled and enable those that are not.

    Args:
        quantizers: A quantizer that occurs twice is switched once.
    """
    with ExitStack() as exits:
        for quantizer in dict.fromkeys(quantizers):
            exits.enter_context(quantizer.restoring_state())
            quantizer.is_enabled = not quantizer.is_enabled
        yield


def disable_until_exit(quantizers: Iterable[TensorQuantizer], exits: ExitStack) -> None:
    """Disable quantizers until `exits` is closed, or permanently if the caller empties it with `pop_all`.

    Args:
        quantizers: The quantizers to disable.
        exits: Restores their states when it is closed.
    """
    for quantizer in quantizers:
        # A callback: a generator that is dropped with the stack would restore the state.
        exits.callback(setattr, quantizer, "is_enabled", quantizer.is_enabled)
        quantizer.disable()
