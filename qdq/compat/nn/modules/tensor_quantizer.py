"""`TensorQuantizer` as pytorch-quantization has it."""

from __future__ import annotations

import difflib
import logging
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import nn

from qdq.compat import calib
from qdq.compat.capture import is_capturing, is_exporting, is_tracing_for_onnx
from qdq.compat.nn.modules.clip import Clip
from qdq.compat.qdq_nodes import Constants, write_qdq
from qdq.compat.tensor_quant import (
    E4M3,
    E4M3_MAX,
    Axis,
    FakeTensorQuantFunction,
    NumBits,
    QuantDescriptor,
    ScaledE4M3Function,
    TensorQuantFunction,
    divide_by_number,
    largest_code,
)
from qdq.errors import ArgumentError, ArgumentTypeError, ModelError, QdqError, StateError
from qdq.formats import Format
from qdq.observers.finite import require_tensor
from qdq.observers.max import reduce_amax
from qdq.quantize import fake_quantize, find_range_axis, own_tensor
from qdq.quantizer import TensorQuantizer as CoreTensorQuantizer
from qdq.quantizer import summarize_amax

logger = logging.getLogger(__name__)

_CALIBRATORS = {"max": calib.MaxCalibrator, "histogram": calib.HistogramCalibrator}
_RANGES = ("_amax", "_pre_quant_scale")


class _NotedNan(NamedTuple):
    """Whether a range was NaN at a version of its buffer."""

    amax: torch.Tensor
    version: int
    has_nan: bool


class TensorQuantizer(CoreTensorQuantizer):
    """Quantizes its input in the order pre-quant scale, calibrator, clip, quantization.

    Every flag may be read and written as a plain attribute (`_disabled`, `_if_quant`, `_calibrator` ...).

    Args:
        quant_desc: Format, axes, range and calibrator.
        disabled: Start disabled.
        if_quant: Start quantizing.
        if_clip: Start clipping (needs `learn_amax`).
        if_calib: Start collecting.
    """

    use_fb_fake_quant: ClassVar[bool] = False
    """torch's own fake quantization, full range: the export switch of pytorch-quantization 2.1."""
    _enable_onnx_export: ClassVar[bool] = False

    _pre_quant_scale: torch.Tensor
    _calibrator: Any
    _export_constants: list[Constants]
    _export_calls: int
    _export_dtype: torch.dtype | None = None
    _noted_nan: _NotedNan | None = None

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        desc = QuantDescriptor() if quant_desc is None else quant_desc
        if not isinstance(desc, QuantDescriptor):
            raise ArgumentTypeError(
                f"quant_desc must be a QuantDescriptor, found {desc!r} of type {type(desc).__name__}.",
                "give one of qdq.compat.tensor_quant, such as QuantDescriptor(num_bits=8).",
            )
        self._move(torch.empty(0))
        self.name = desc.name
        self._num_bits: NumBits = desc.num_bits  # type: ignore[assignment]  # also (4, 3)
        self._fake_quant = desc.fake_quant
        self._axis: Axis = desc.axis  # type: ignore[assignment]  # also several
        self._scale_amax = desc.scale_amax
        self._learn_amax = desc.learn_amax
        self._unsigned = desc.unsigned
        self._narrow_range = desc.narrow_range
        self._scale: Any = 1.0 if desc.fake_quant else None
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_clip = if_clip
        self._if_calib = if_calib
        self._calibrator = None
        self.set_calib_method(desc.calib_method)
        if desc.amax is not None:
            self.amax = desc.amax
        if desc.learn_amax:
            bound = 1.0 if desc.amax is None else float(np.max(desc.amax))
            self.clip = Clip(-bound, bound, learn_min=True, learn_max=True)
            self.enable_clip()

    def set_calib_method(self, method: str) -> None:
        """Start over with an empty "max" or "histogram" calibrator; any other name gives none, and a warning (F11)."""
        kind = _CALIBRATORS.get(method)
        if kind is None:
            close = difflib.get_close_matches(method, _CALIBRATORS, n=1, cutoff=0)[0]
            logger.warning(
                "%s: calib_method %r is unknown, did you mean %r? There is no calibrator; ranges are dynamic.",
                self._label,
                method,
                close,
            )
        self._calibrator = kind and kind(self._num_bits, self._axis, self._unsigned)

    def __setattr__(self, name: str, value: Any) -> None:
        """`_amax = tensor` creates the buffer if there is none yet; a plain attribute would be in its way."""
        if name in _RANGES and isinstance(value, torch.Tensor) and value.is_inference():
            value = own_tensor(value)  # a later load_state_dict writes into it
        if name in _RANGES and isinstance(value, torch.Tensor) and name not in self._buffers:
            self.register_buffer(name, value.detach())
        else:
            super().__setattr__(name, value)

    # -- fields ------------------------------------------------------------------------------------------------

    @property
    def num_bits(self) -> NumBits:
        """Width of the codes, or (4, 3)."""
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: NumBits) -> None:
        self._num_bits = QuantDescriptor(num_bits=value).num_bits  # type: ignore[assignment]
        if self._calibrator is not None:
            self._calibrator._num_bits = value

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self._unsigned = value
        if self._calibrator is not None:
            self._calibrator._unsigned = value

    @property
    def narrow_range(self) -> bool:
        """Whether the most negative code is left out."""
        return self._narrow_range

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        self._narrow_range = value

    @property
    def axis(self) -> Axis:  # type: ignore[override]
        """The axes with a range for each index."""
        return self._axis

    @property
    def fake_quant(self) -> bool:
        """Whether values come back dequantized."""
        return self._fake_quant

    @property
    def format(self) -> Format:
        """Codes and width of an integer format that can be stored.

        Raises:
            AttributeError: FP8, or a width that no file can have.
        """
        if not isinstance(self._num_bits, int) or not 2 <= self._num_bits <= 16:
            raise AttributeError(
                f"num_bits={self._num_bits} is not an integer format of 2 to 16 bits."
            )
        return super().format

    @property
    def maxbound(self) -> float:
        """The largest code, 448 for FP8."""
        if self._num_bits == E4M3:
            return E4M3_MAX
        return largest_code(self._num_bits, self._unsigned)

    @property
    def scale(self) -> Any:
        """The multiplier of the last real quantization; 1.0, with an error log, while quantization is fake."""
        if self._fake_quant:
            logger.error("%s quantizes and dequantizes: it has no scale.", self._label)
        return self._scale

    @property
    def step_size(self) -> torch.Tensor | None:
        """Amax / largest code; None, with an error log, before there is an amax."""
        if self.amax is None:
            logger.error("%s has no amax: its step size is not defined.", self._label)
            return None
        return divide_by_number(self.amax, self.maxbound)

    @property
    def amax(self) -> torch.Tensor | None:
        """The range as the buffer itself, None until set."""
        # Not through super(): torch.compile cannot follow it to a property.
        return self._buffers.get("_amax")

    @amax.setter
    def amax(self, value: Any) -> None:
        self._set_range("_amax", value)

    @property
    def pre_quant_scale(self) -> torch.Tensor | None:
        """The factor on every input, None until set."""
        return self._buffers.get("_pre_quant_scale")

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        self._set_range("_pre_quant_scale", value)

    def _set_range(self, buffer: str, value: Any) -> None:
        """Create the buffer, or overwrite it in place."""
        name = buffer.removeprefix("_")
        if value is None:
            logger.error(
                "%s: setting %s to None is ignored; use disable() to stop quantizing.",
                self._label,
                name,
            )
            return
        if isinstance(value, torch.Tensor):
            logger.warning("%s: %s is set from a tensor; it is copied.", self._label, name)
        values = _as_float(value, name)
        if buffer == "_amax" and not values.is_meta and bool((values < 0).any()):
            raise ArgumentError(
                f"Negative values in amax of {self._label}: the smallest is {values.min().item()}.",
                "a range is the largest absolute value.",
            )
        self._store(buffer, values)

    def _store(self, buffer: str, value: torch.Tensor) -> None:
        current = self._buffers.get(buffer)
        owned = self._own_range(value)
        if current is None or self._is_replaced(buffer, current, value):
            self.register_buffer(buffer, owned)
        elif current.shape != value.shape and not current.numel() == value.numel() == 1:
            name = buffer.removeprefix("_")
            raise StateError(
                f"Changing shape when setting {name} is not allowed: {self._label} has {tuple(current.shape)}, "
                f"the new value {tuple(value.shape)}.",
                "make a new quantizer for another axis.",
            )
        elif current.is_inference():
            self.register_buffer(buffer, owned.reshape(current.shape))
        else:
            current.copy_(owned.reshape(current.shape))
        self._has_nan()  # now, not in a forward

    def _is_replaced(self, buffer: str, current: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether a new value of any shape may replace the current one."""
        if bool(current.isnan().all()):  # calibrated without data; any other range is better
            return True
        return buffer == "_amax" and self._mends_axis(value)

    # -- switches ----------------------------------------------------------------------------------------------

    def enable_calib(self) -> None:
        """Collect ranges from now on.

        Raises:
            ValueError: There is no calibrator.
        """
        if self._calibrator is None:
            raise ArgumentError(
                f"Calibrator was not created for {self._label}.", "name one in calib_method."
            )
        self._if_calib = True
        _told_collecting.discard(self)
        _told_empty.discard(self)

    def enable_clip(self) -> None:
        """Clip from now on, and train the bounds.

        Raises:
            ValueError: The range is not learned.
        """
        self._switch_clip(True)

    def disable_clip(self) -> None:
        """Stop clipping, and freeze the bounds.

        Raises:
            ValueError: The range is not learned.
        """
        self._switch_clip(False)

    def _switch_clip(self, on: bool) -> None:
        if not self._learn_amax:
            raise ArgumentError(
                f"learn_amax is False: {self._label} has no clip stage.",
                "build it with QuantDescriptor(learn_amax=True).",
            )
        self._if_clip = on
        for bound in self.clip.parameters():
            bound.requires_grad_(on)

    # -- calibration -------------------------------------------------------------------------------------------

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Compute amax from the statistics of the calibrator, and store it.

        Args:
            *args: For `compute_amax` of the calibrator.
            strict: A calibrator without data is an error; otherwise a warning, and amax becomes NaN.
            **kwargs: As `args`.

        Raises:
            RuntimeError: No calibrator, or one without data.
            TypeError: Arguments that this kind of calibrator does not take.
        """
        if self._calibrator is None:
            raise StateError(
                f"Calibrator not created for {self._label}.", "name one in calib_method."
            )
        if self._if_calib:
            self._warn_once(
                _told_collecting,
                lambda quantizer: quantizer._if_calib,
                "%d quantizers are still collecting while amax is computed: %s. Call disable_calib() first.",
            )
        amax = self._solve(*args, **kwargs)
        if amax is None:
            if strict:
                raise StateError(
                    f"Calibrator returned None: {self._label} saw no data.",
                    "feed batches that reach it between enable_calib and load_calib_amax.",
                )
            self._warn_once(
                _told_empty,
                lambda quantizer: getattr(quantizer._calibrator, "num_batches", None) == 0,
                "Calibrator returned None: %d quantizers saw no data: %s. With strict=False their amax becomes NaN, "
                "and a forward through one or an export will be refused.",
            )
            amax = (
                torch.tensor(math.nan)
                if self.amax is None
                else torch.full_like(self.amax, math.nan)
            )
        self._store("_amax", amax.detach().float())

    def _warn_once(
        self,
        told: WeakSet[TensorQuantizer],
        applies: Callable[[TensorQuantizer], bool],
        message: str,
    ) -> None:
        """Warn once for all quantizers of the model that it applies to; scripts call them one after the other."""
        if self in told:
            return
        quantizers = named_quantizers(find_root(self)[0])
        names = {
            name: quantizer
            for name, quantizer in quantizers.items()
            if quantizer is self or applies(quantizer)
        }
        told.update(names.values())
        logger.warning(message, len(names), _join(names))

    def _solve(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        try:
            result: torch.Tensor | None = self._calibrator.compute_amax(*args, **kwargs)
        except TypeError as error:
            if isinstance(error, QdqError):
                raise
            raise ArgumentTypeError(
                f"{type(self._calibrator).__name__} of {self._label}: {error}.",
                'a max calibrator takes no arguments, a histogram one a method, such as method="mse".',
            ) from error
        return result

    def init_learn_amax(self) -> None:
        """Start the learned bounds at -amax and amax, the largest over channels.

        Raises:
            RuntimeError: The range is not learned, or there is none yet.
        """
        if not self._learn_amax:
            raise StateError(
                f"learn_amax is False: {self._label} learns no range.",
                "build it with QuantDescriptor(learn_amax=True).",
            )
        if self.amax is None:
            raise StateError(
                f"{self._label} has no amax to start from.", "call load_calib_amax first."
            )
        bound = self.amax.max()
        with torch.no_grad():
            for parameter, value in zip(self.clip.parameters(), (-bound, bound), strict=True):
                parameter.fill_(value)

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scale, collect, clip and quantize, as far as each is switched on; otherwise return the same object.

        Args:
            inputs: Any shape.

        Raises:
            RuntimeError: Collecting without a calibrator, clipping without learned bounds, amax NaN.
        """
        if self._enable_onnx_export and not is_capturing():
            self._require_range()
        if "_pre_quant_scale" in self._buffers:
            inputs = inputs * self._pre_quant_scale.to(inputs)
        if self._disabled:
            return inputs
        require_tensor(inputs)
        if self._if_calib and not is_exporting():
            if self._calibrator is None:
                raise StateError(
                    f"Calibrator was not created for {self._label}.", "name one in calib_method."
                )
            self._collect(inputs, self._calibrator)
        if self._if_clip:
            if not self._learn_amax:
                raise StateError(
                    f"Clip without learning the range is not implemented: {self._label}.",
                    "set learn_amax.",
                )
            inputs = self.clip(inputs)
        if self._if_quant:
            return self._quantize(inputs)
        return inputs

    def _quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._learn_amax:
            inputs = self.clip(inputs)
        constants = self.__dict__.get("_export_constants")
        if constants:
            return self._write_qdq(inputs, constants)
        if constants is None and is_tracing_for_onnx():
            raise StateError(
                "this export does not know about quantizers: torch.onnx.export was bound before qdq.compat was "
                "imported, or another function of torch.onnx was called.",
                "import qdq.compat first, or call torch.onnx.export(model, ...) by that name.",
            )
        amax = self._get_amax(inputs)
        if not is_capturing() and self._has_nan():
            self._refuse_nan()
        if self._num_bits == E4M3:
            return self._round_to_e4m3(inputs, amax)
        if self._fake_quant and self.use_fb_fake_quant:
            return fake_quantize(
                inputs, amax, Format(self._num_bits, self._unsigned), self._single_axis()
            )
        # The program that is captured may become ONNX.
        if self._fake_quant and is_exporting() and self._is_int8():
            fmt = Format(8, self._unsigned, self._narrow_range)
            return fake_quantize(inputs, amax, fmt, self._single_axis())
        return self._apply_arithmetic(inputs, amax)

    def _round_to_e4m3(self, inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        """FP8; on a GPU the values are not checked, because that would wait for them."""
        result: torch.Tensor = ScaledE4M3Function.apply(inputs, amax, *E4M3, inputs.is_cpu)
        return result

    def _apply_arithmetic(self, inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        """Values or codes by the legacy formula; on a GPU the values are not checked."""
        arguments = (inputs, amax, self._num_bits, self._unsigned, self._narrow_range)
        result: torch.Tensor
        if self._fake_quant:
            result = FakeTensorQuantFunction.apply(*arguments, inputs.is_cpu)
            return result
        result, self._scale = TensorQuantFunction.apply(*arguments, inputs.is_cpu)
        return result

    def _is_int8(self) -> bool:
        """Whether torch's operators, which become Q/DQ, can express it."""
        return self._num_bits == 8 and (not isinstance(self._axis, tuple) or len(self._axis) == 1)

    def _write_qdq(self, inputs: torch.Tensor, constants: list[Constants]) -> torch.Tensor:
        """Q/DQ with the constants that the export has prepared for this call."""
        current = constants[self._export_calls % len(constants)]
        self._export_calls += 1
        result = write_qdq(inputs, current, self._num_bits, self._unsigned)
        if self._export_dtype is None:
            return result
        return result.to(self._export_dtype)

    def _get_amax(self, inputs: torch.Tensor) -> torch.Tensor:
        """The static range if there is one, else the maximum of |x| of this input times `scale_amax`."""
        if self._learn_amax or self.amax is None:
            amax = self.static_amax()
            if amax is None:
                return self._scaled(_dynamic_amax(inputs, self._axis))
            return amax
        if self.amax.device != inputs.device and not is_capturing():
            self._amax = own_tensor(self._amax.to(inputs.device))
        return self._scaled(self._along_axis(self._amax, inputs))

    def _along_axis(self, amax: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """A flat list of ranges in keep-dims shape; unchanged, it would broadcast along the last axis."""
        if (
            amax.dim() != 1
            or amax.numel() == 1
            or not isinstance(self._axis, int)
            or inputs.dim() < 2
        ):
            return amax
        shape = [1] * inputs.dim()
        shape[self._axis] = -1
        return amax.reshape(shape)

    def static_amax(self) -> torch.Tensor | None:
        """The range that does not depend on the input: learned, or the buffer times `scale_amax`; None without one."""
        if self._learn_amax:
            return torch.maximum(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
        if self.amax is None:
            return None
        return self._scaled(self.amax)

    def _scaled(self, amax: torch.Tensor) -> torch.Tensor:
        if self._scale_amax is None:
            return amax
        return amax * self._scale_amax

    def _single_axis(self) -> int | None:
        """The one kept axis, which torch's operators can express.

        If the shape of the ranges shows another axis, like those of 2.1 for transposed convolutions, that axis counts.

        Raises:
            TypeError: There are several.
        """
        if isinstance(self._axis, tuple):
            if len(self._axis) != 1:
                raise ArgumentTypeError(
                    f"{self._label} keeps the axes {self._axis}; torch and ONNX quantize along one.",
                    "use one axis, or none.",
                )
            return self._axis[0]
        return find_range_axis(self.amax, self._axis)

    def _require_range(self) -> None:
        """With `enable_onnx_export`, refuse a model with uncalibrated quantizers, naming all of them (F30)."""
        if self.is_written() and not self.has_range():
            quantizers = named_quantizers(find_root(self)[0])
            raise missing_ranges(
                {name: q for name, q in quantizers.items() if q.is_written() and not q.has_range()}
            )

    def is_written(self) -> bool:
        """Whether an export writes it."""
        return self._if_quant and not self._disabled

    def has_range(self) -> bool:
        """Whether there is a range that does not depend on the input."""
        amax = self.static_amax()
        return amax is not None and not bool(torch.isnan(amax).any())

    def _refuse_nan(self) -> None:
        """Refuse a range without data."""
        names = {
            name: q for name, q in named_quantizers(find_root(self)[0]).items() if q._has_nan()
        }
        raise StateError(
            f"{len(names)} quantizers have amax NaN, because they were calibrated without data: {_join(names)}.",
            "feed batches that reach them and call load_calib_amax again, or disable() them.",
        )

    def _has_nan(self) -> bool:
        """Whether the range is NaN. On a GPU, a range that has not changed is not read again: that would wait."""
        amax = self.amax
        if self._disabled or amax is None or amax.is_meta:
            return False
        if amax.is_cpu or amax.is_inference():  # an inference tensor has no version
            return bool(torch.isnan(amax).any())
        noted = self._noted_nan
        if noted is None or noted.amax is not amax or noted.version != amax._version:
            noted = _NotedNan(amax, amax._version, bool(torch.isnan(amax).any()))
            self._noted_nan = noted
        return noted.has_nan

    def _apply(self, fn: Any, recurse: bool = True) -> TensorQuantizer:
        """Follow the module to another device."""
        super()._apply(fn, recurse)
        self._has_nan()  # now, not in a forward
        return self

    @property
    def _label(self) -> str:
        _, path = find_root(self)
        if path or self.name:
            return f"quantizer {path or self.name}"
        return "this quantizer"

    # -- state -------------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Refuse a pickle of pytorch-quantization: its attributes differ, and half of them would be missing."""
        if "name" not in state:
            raise ModelError(
                "this model was pickled as a whole by pytorch-quantization, whose classes are not these.",
                "there, save model.state_dict(); here, build the model again and call load_state_dict.",
            )
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def _require_valid(self, amax: torch.Tensor) -> None:
        """Accept any range: NaN marks a quantizer that was calibrated without data, and forward refuses it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Create `_pre_quant_scale` if the checkpoint has one; warn if a range is missing in it."""
        if self.amax is not None and self._has_nan() and prefix + "_amax" in state_dict:
            del self._amax
        incoming = state_dict.get(prefix + "_pre_quant_scale")
        if incoming is not None and self.pre_quant_scale is None:
            self.register_buffer("_pre_quant_scale", self._own_range(incoming.float()))
        elif incoming is not None and incoming.numel() == self._pre_quant_scale.numel() == 1:
            state_dict[prefix + "_pre_quant_scale"] = incoming.reshape(self._pre_quant_scale.shape)
        if self.amax is not None and prefix + "_amax" not in state_dict:
            logger.error(
                "%s has an amax, but the checkpoint has none for it: the current one stays.",
                prefix.rstrip("."),
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_nan()  # now, not in a forward

    def extra_repr(self) -> str:
        """Format, axes, range, calibrator, state, as pytorch-quantization prints them."""
        if self._disabled:
            return "disabled"
        parts = []
        if self._unsigned:
            parts.append("unsigned")
        parts.append(f"{self._num_bits}bit")
        if self._narrow_range:
            parts.append("narrow")
        if self._fake_quant:
            parts.append("fake")
        parts += self._describe_range()
        if self._if_quant:
            parts.append("quant")
        if self._if_clip:
            parts.append("clip")
        if self._if_calib:
            parts.append("calib")
        return " ".join(parts)

    def _describe_range(self) -> list[str]:
        parts = ["per-tensor" if self._axis is None else f"axis={self._axis}"]
        parts.append(f"amax={summarize_amax(self.amax)}")
        if self._scale_amax:
            parts.append(f"*{self._scale_amax}")
        if self.pre_quant_scale is not None:
            parts.append("pre_quant_scale")
        if self._learn_amax:
            parts.append("learned")
        if self._calibrator is not None:
            parts.append(f"calibrator={type(self._calibrator).__name__}")
        if isinstance(self._scale, float):
            parts.append(f"scale={self._scale}")
        elif self._scale is not None:
            parts.append(f"scale={summarize_amax(self._scale)}")
        return parts


_told_collecting: WeakSet[TensorQuantizer] = WeakSet()
_told_empty: WeakSet[TensorQuantizer] = WeakSet()


def named_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """All quantizers of a model by dotted name; a shared one is listed once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    }


def missing_ranges(quantizers: dict[str, TensorQuantizer]) -> StateError:
    """The error for quantizers without a range."""
    return StateError(
        f"{len(quantizers)} quantizers have no amax: {_join(quantizers)}.",
        "feed batches with enable_calib(), then call load_calib_amax() on each (or qdq.calibrate_model), or "
        "disable() those that should stay float.",
    )


def find_root(quantizer: nn.Module) -> tuple[nn.Module, str]:
    """The largest module on the call stack that contains a quantizer, and the quantizer's dotted name in it.

    A quantizer does not know the model that it is in. When a message names it, its callers are still on the call stack,
    and one of them usually has the model in a variable. Otherwise it is its own root and has no name.
    """
    root, size, frame = quantizer, 1, sys._getframe(1)
    while frame is not None:
        for candidate in {
            id(value): value for value in frame.f_locals.values() if isinstance(value, nn.Module)
        }.values():
            modules = list(candidate.modules())
            if len(modules) > size and any(module is quantizer for module in modules):
                root, size = candidate, len(modules)
        frame = frame.f_back  # type: ignore[assignment]
    return root, next((name for name, module in root.named_modules() if module is quantizer), "")


def _join(quantizers: dict[str, TensorQuantizer]) -> str:
    return ", ".join(
        name or quantizer.name or "this quantizer" for name, quantizer in quantizers.items()
    )


def _dynamic_amax(inputs: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The maximum of |x| on the kept axes, float64 for float64 inputs, else float32; one element is 0-D."""
    amax = reduce_amax(inputs, axis)
    if inputs.dtype == torch.float64:
        reduced = [
            dim
            for dim in range(inputs.dim())
            if axis is None or amax.shape[dim] < inputs.shape[dim]
        ]
        amax = inputs.detach().abs()
        amax = amax.amax(reduced, keepdim=True) if reduced else amax
    if amax.numel() == 1:
        return amax.reshape(())
    return amax


def _as_float(value: Any, name: str) -> torch.Tensor:
    try:
        return (
            torch.as_tensor(value.copy() if isinstance(value, np.ndarray) else value)
            .detach()
            .float()
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"{name} must be a number, list, ndarray or tensor; found {value!r} of type {type(value).__name__}.",
            "give a range such as 2.5.",
        ) from error
