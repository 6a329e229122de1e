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
from qdq.formats import AMAX_FLOOR, Format
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

_CALIB_METHODS = {"max": "max", "histogram": "mse"}  # -> what `load_calib_amax` solves by default


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

    @contextmanager
    def restoring_state(self) -> Iterator[None]:
        """Put back on exit whether it is enabled, quantizes and collects."""
        state = self._disabled, self._if_quant, self._if_calib
        try:
            yield
        finally:
            self._disabled, self._if_quant, self._if_calib = state

    @contextmanager
    def collecting_into(self, collector: TensorCollector) -> Iterator[None]:
        """Collect into another collector in the block, without quantizing."""
        leader = self.leader
        calibrator = leader._calibrator
        with self.restoring_state():
            leader._calibrator = collector
            self._if_quant = False
            self._if_calib = True
            try:
                yield
            finally:
                leader._calibrator = calibrator

    @contextmanager
    def using_range(self, amax: float) -> Iterator[None]:
        """Quantize with another range in the block, whatever the state."""
        buffers = self.leader._buffers
        former = buffers.get("_amax")
        device = None if former is None else former.device
        with self.restoring_state():
            self._disabled = False
            self._if_quant = True
            buffers["_amax"] = torch.tensor(amax, dtype=torch.float32, device=device)
            try:
                yield
            finally:
                if former is None:
                    del buffers["_amax"]
                else:
                    buffers["_amax"] = former

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

    def __init__(self, leader: TensorQuantizer) -> None:
        nn.Module.__init__(self)
        vars(self)["_leader"] = leader  # not a submodule: it stands elsewhere in the model
        self.name = None
        self._disabled = False
        self._if_quant = True
        self._if_calib = False

    @property
    def leader(self) -> TensorQuantizer:
        """The quantizer that holds the range."""
        leader: TensorQuantizer = vars(self)["_leader"]
        return leader

    @property
    def format(self) -> Format:
        """Format of the leader."""
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
    """Enables or disables all quantizers at once; as a with-block, puts back on exit the state of each one."""

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

    As a call it lasts. As a with-block (`with disable_quantization(model.layer1): ...`) it puts the state of each
    quantizer back on exit.
    """
    return _Switch(model, enabled=False)


def enable_quantization(model: nn.Module) -> _Switch:
    """Enable every quantizer of a model, or of a part of one; call or with-block as `disable_quantization`."""
    return _Switch(model, enabled=True)


@contextmanager
def toggling(quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
    """Disable in the block the quantizers that are enabled, and enable those that are not."""
    with ExitStack() as exits:
        for quantizer in dict.fromkeys(quantizers):
            exits.enter_context(quantizer.restoring_state())
            quantizer.is_enabled = not quantizer.is_enabled
        yield


def disable_until_exit(quantizers: Iterable[TensorQuantizer], exits: ExitStack) -> None:
    """Disable quantizers until `exits` is closed; for good where the caller empties it with `pop_all`."""
    for quantizer in quantizers:
        # A callback: a generator that is dropped with the stack would restore the state.
        exits.callback(setattr, quantizer, "is_enabled", quantizer.is_enabled)
        quantizer.disable()
